/* One step of an optimizer over n parameters, as gputune.optimizers.rules defines them. */

enum { SGD, NESTEROV, ADAM, ADAMW };

/* What the step of one member is: numbers for all its parameters. ``rate`` has the schedule in it, and for adam the
   bias corrections, which are moved out of the loop: lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps). */
typedef struct {
    int64_t optimizer;
    real rate, shrink, l2, momentum, epsilon;
} Rates;

static void update(Rates by, long n, real *restrict w, real *restrict first, real *restrict second,
                   const real *restrict slope) {
    if (by.optimizer >= ADAM)
        for (long i = 0; i < n; i++) {
            real g = slope[i] + by.l2 * w[i];
            real m = first[i] + (real)(1 - 0.9) * (g - first[i]);
            real v = (real)0.999 * second[i] + (real)(1 - 0.999) * g * g;
            first[i] = m, second[i] = v;
            w[i] = w[i] - by.shrink * w[i] - by.rate * (m / (root(v) + by.epsilon));
        }
    else if (!first)
        for (long i = 0; i < n; i++) w[i] -= by.rate * (slope[i] + by.l2 * w[i]);
    else
        for (long i = 0; i < n; i++) {
            real g = slope[i] + by.l2 * w[i];
            real b = by.momentum * first[i] + g;
            first[i] = b;
            w[i] -= by.rate * (by.optimizer == NESTEROV ? g + by.momentum * b : b);
        }
}
