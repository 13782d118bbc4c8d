/* exp as a function that the compiler can vectorize. */

#ifdef DOUBLE
typedef int64_t whole;
#define LARGEST_EXPONENT 709.0
#define SMALLEST_EXPONENT -708.0
#define EXPONENT_BIAS 1023
#define MANTISSA_BITS 52
#define ROUNDER 6755399441055744.0
#define TERMS 13
#else
typedef int32_t whole;
#define LARGEST_EXPONENT 88.0f
#define SMALLEST_EXPONENT -87.0f
#define EXPONENT_BIAS 127
#define MANTISSA_BITS 23
#define ROUNDER 12582912.0f
#define TERMS 7
#endif

static const real INVERSE[] = {1, 1, 1.0 / 2, 1.0 / 3, 1.0 / 4, 1.0 / 5, 1.0 / 6, 1.0 / 7,
                               1.0 / 8, 1.0 / 9, 1.0 / 10, 1.0 / 11, 1.0 / 12, 1.0 / 13};

/* exp(x) = 2^n exp(r) with |r| <= ln(2) / 2. The series has as many terms as the type's precision
   needs. The result is 0 or infinity outside the range of the type. libm's exp is not used, because
   it is not a vector function. */
ALWAYS_INLINE real exponential(real x) {
    real held = x < (real)LARGEST_EXPONENT ? x : (real)LARGEST_EXPONENT;
    held = held > (real)SMALLEST_EXPONENT ? held : (real)SMALLEST_EXPONENT;
    real n = held * (real)1.4426950408889634 + (real)ROUNDER - (real)ROUNDER;
    /* ln(2) has two parts; the first has so few digits that its product with n is exact */
    real r = held - n * (real)0.693359375 + n * (real)2.12194440054690583e-4;
    real sum = 1;
#pragma GCC unroll 16
    for (int term = TERMS; term > 0; term--) sum = 1 + sum * r * INVERSE[term];
    union { whole bits; real value; } power = {.bits = ((whole)n + EXPONENT_BIAS) << MANTISSA_BITS};
    real result = sum * power.value;
    result = x < (real)SMALLEST_EXPONENT ? 0 : result;
    result = x > (real)LARGEST_EXPONENT ? (real)INFINITY : result;
    return x == x ? result : x;
}
