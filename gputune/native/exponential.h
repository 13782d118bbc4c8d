/* exp as a function that the compiler can vectorize. */

#ifdef DOUBLE
typedef int64_t whole;
typedef uint64_t unsigned_whole;
#define LARGEST_EXPONENT 710.0
#define SMALLEST_EXPONENT -709.0
#define EXPONENT_BIAS 1023
#define MANTISSA_BITS 52
#define ROUNDER 6755399441055744.0
#define TERMS 13
#else
typedef int32_t whole;
typedef uint32_t unsigned_whole;
#define LARGEST_EXPONENT 89.0f
#define SMALLEST_EXPONENT -88.0f
#define EXPONENT_BIAS 127
#define MANTISSA_BITS 23
#define ROUNDER 12582912.0f
#define TERMS 7
#endif

/* 1 / k! */
static const real COEFFICIENT[] = {1, 1, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040,
                                   1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600,
                                   1.0 / 6227020800};

/* exp(x) = 2^n exp(r) with |r| <= ln(2) / 2. The series has as many terms as the type's precision
   needs. libm's exp is not used, because it is not a vector function.

   Outside of the type's range, n is its largest exponent, whose power is infinity, or its smallest
   exponent, whose power is 0. The comparisons leave NaN as it is. */
ALWAYS_INLINE real exponential(real x) {
    real held = x > (real)LARGEST_EXPONENT ? (real)LARGEST_EXPONENT : x;
    held = held < (real)SMALLEST_EXPONENT ? (real)SMALLEST_EXPONENT : held;
    /* The last bits of this sum are n. */
    union { real value; whole bits; } rounded = {.value = held * (real)1.4426950408889634 + (real)ROUNDER};
    real n = rounded.value - (real)ROUNDER;
    /* ln(2) has two parts; the first has so few digits that its product with n is exact */
    real r = held - n * (real)0.693359375 + n * (real)2.12194440054690583e-4;
    real sum = COEFFICIENT[TERMS]; /* by Horner's rule */
#pragma GCC unroll 16
    for (int term = TERMS - 1; term >= 0; term--) sum = sum * r + COEFFICIENT[term];
    union { whole bits; real value; } power = {
        .bits = (whole)((unsigned_whole)(rounded.bits + EXPONENT_BIAS) << MANTISSA_BITS)};
    return sum * power.value;
}
