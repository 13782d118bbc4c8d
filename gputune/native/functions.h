/* Activations and gradients of losses over contiguous rows. The compiler can vectorize these loops. */

#include "exponential.h"

typedef double wide; /* the type in which gelu is computed */

#include "work.h"

/* One loop for each activation. The activation is a constant inside the loop, so its branches
   disappear. */
#define EACH(kind, does) \
    if (kind == RELU) { const int OF = RELU; for (long i = 0; i < n; i++) does; } \
    else if (kind == TANH) { const int OF = TANH; for (long i = 0; i < n; i++) does; } \
    else if (kind == SILU) { const int OF = SILU; for (long i = 0; i < n; i++) does; } \
    else { const int OF = GELU; for (long i = 0; i < n; i++) does; }

/* h = activation(z) over n numbers; z may be h. */
static void activate(int64_t kind, long n, const real *z, real *h) { EACH(kind, h[i] = activated(OF, z[i])) }

/* The gradient in z from the gradient ``above`` in h = activation(z), in place. */
static void slope_below(int64_t kind, long n, real *above, const real *z, const real *h) {
    EACH(kind, above[i] = slope_in(OF, above[i], z[i], h[i]))
}

/* Turn outputs z (rows, z_row) into the gradient of the cross-entropy in them: share (softmax(z) - onehot).

   ``present`` (classes) is 0 for a class that is absent from the fold. ``work`` has (classes + 2) x
   rows numbers. The rows are contiguous there, so every inner loop runs over rows. */
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
