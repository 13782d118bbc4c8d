/* exp, activations and slopes of losses over contiguous rows, written so that a compiler makes vectors of the loops. */

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

/* exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, by as many terms of its series as the type can tell; 0 or infinity
   beyond the range of the type. libm's own is not used because it is no vector function. */
ALWAYS_INLINE real exponential(real x) {
    real held = x < (real)LARGEST_EXPONENT ? x : (real)LARGEST_EXPONENT;
    held = held > (real)SMALLEST_EXPONENT ? held : (real)SMALLEST_EXPONENT;
    real n = held * (real)1.4426950408889634 + (real)ROUNDER - (real)ROUNDER;
    /* ln(2) in two parts, the first so short that its product with n is exact */
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

typedef double wide; /* in which gelu is computed */

#include "work.h"

/* A loop for each activation, which is a constant in it. */
#define EACH(kind, does) \
    if (kind == RELU) { const int OF = RELU; for (long i = 0; i < n; i++) does; } \
    else if (kind == TANH) { const int OF = TANH; for (long i = 0; i < n; i++) does; } \
    else if (kind == SILU) { const int OF = SILU; for (long i = 0; i < n; i++) does; } \
    else { const int OF = GELU; for (long i = 0; i < n; i++) does; }

/* h = activation(z) over n numbers; z may be h. */
static void activate(int64_t kind, long n, const real *z, real *h) { EACH(kind, h[i] = activated(OF, z[i])) }

/* The slope in z of what has the slope ``above`` in h = activation(z), in place. */
static void slope_below(int64_t kind, long n, real *above, const real *z, const real *h) {
    EACH(kind, above[i] = slope_in(OF, above[i], z[i], h[i]))
}

/* Turn outputs z (rows, z_row) into the slope of the cross-entropy in them: share (softmax(z) - onehot).

   ``present`` (classes) is 0 for a class that takes no part. ``work`` has room for (classes + 2) x rows: there the
   rows lie side by side, so that every loop runs over rows. */
static void cross_entropy_slope(long rows, long classes, real *restrict z, long z_row, const real *present,
                                const int64_t *codes, const real *share, real *restrict work) {
    real *restrict top = work + classes * rows, *restrict total = top + rows;
    for (long k = 0; k < classes; k++)
        for (long i = 0; i < rows; i++) work[k * rows + i] = z[i * z_row + k];
    for (long i = 0; i < rows; i++) top[i] = -(real)INFINITY, total[i] = 0;
    for (long k = 0; k < classes; k++)
        if (present[k] != 0)
            for (long i = 0; i < rows; i++) top[i] = work[k * rows + i] > top[i] ? work[k * rows + i] : top[i];
    for (long k = 0; k < classes; k++) {
        real *restrict p = work + k * rows;
        if (present[k] != 0)
            for (long i = 0; i < rows; i++) p[i] = exponential(p[i] - top[i]), total[i] += p[i];
        else
            for (long i = 0; i < rows; i++) p[i] = 0;
    }
    for (long i = 0; i < rows; i++) total[i] = share[i] / total[i];
    for (long k = 0; k < classes; k++)
        for (long i = 0; i < rows; i++) z[i * z_row + k] = work[k * rows + i] * total[i];
    for (long i = 0; i < rows; i++) z[i * z_row + codes[i]] -= share[i];
}
