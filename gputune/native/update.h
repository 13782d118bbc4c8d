/* One step of an optimizer over one parameter, as gputune.optimizers.rules defines it, and the rates of a member's step. */

enum { SGD, NESTEROV, ADAM, ADAMW };

/* What the step of one member is: numbers for all its parameters. ``rate`` has the schedule in it, and for adam the
   bias corrections, which are moved out of the loop: lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps). */
typedef struct {
    int64_t optimizer;
    real rate, shrink, l2, momentum, epsilon;
} Rates;

ALWAYS_INLINE void adam_step(Rates by, real *w, real *first, real *second, real slope) {
    real g = slope + by.l2 * *w;
    real m = *first + (real)(1 - 0.9) * (g - *first);
    real v = (real)0.999 * *second + (real)(1 - 0.999) * g * g;
    *first = m, *second = v;
    *w = *w - by.shrink * *w - by.rate * (m / (root(v) + by.epsilon));
}

ALWAYS_INLINE void momentum_step(Rates by, real *w, real *first, real slope) {
    real g = slope + by.l2 * *w;
    real b = by.momentum * *first + g;
    *first = b;
    *w -= by.rate * (by.optimizer == NESTEROV ? g + by.momentum * b : b);
}

ALWAYS_INLINE void plain_step(Rates by, real *w, real slope) {
    *w -= by.rate * (slope + by.l2 * *w);
}

ALWAYS_INLINE real held(double value) {
#ifdef DOUBLE
    const double largest = 1.7976931348623157e308;
#else
    const double largest = 3.4028234663852886e38;
#endif
    return (real)(value > largest ? largest : value < -largest ? -largest : value);
}

enum { CONSTANT, COSINE, LINEAR, WARMUP_COSINE, ONE_CYCLE, COSLOG4, FLAT_COS };

ALWAYS_INLINE double half_cosine(double done, double total) {
    return 0.5 * (1 + cos(3.14159265358979323846 * done / total));
}

/* The factor on the rate after ``done`` of ``total`` steps, as gputune.optimizers.schedules defines it. */
ALWAYS_INLINE double factor(int64_t schedule, double done, double total) {
    double warmup = floor(total / 10), top = 0.3 * total - 1;
    switch (schedule) {
    case COSINE: return half_cosine(done, total);
    case LINEAR: return 1 - done / total;
    case WARMUP_COSINE:
        return done < warmup ? (done + 1) / (warmup + 1) : half_cosine(done - warmup, total - warmup);
    case ONE_CYCLE:
        if (done <= top) return 1 - 24.0 / 25 * half_cosine(done, top);
        return 1e-4 / 25 + (1 - 1e-4 / 25) * half_cosine(done - top, total - 1 - top);
    case COSLOG4: return 0.5 - cos(log2(1 + 15 * done / total) * (2 * 3.14159265358979323846)) / 2;
    case FLAT_COS: return 2 * done < total ? 1 : half_cosine(2 * done - total, total);
    default: return 1;
    }
}

/* The numbers of step ``count``, from 1, of ``total`` steps of the schedule. */
ALWAYS_INLINE Rates rates(const Work *w, long c, double count, double total) {
    double lr = w->lr[c] * factor(w->schedule[c], count - 1, total), decay = w->decay[c];
    Rates by = {w->optimizer, held(lr), 0, held(decay), held(w->momentum[c]), 0};
    if (w->optimizer == ADAMW) by.shrink = held(lr * decay), by.l2 = 0;
    if (w->optimizer >= ADAM) {
        double corrected = sqrt(1 - pow(0.999, count));
        by.rate = held(lr * corrected / (1 - pow(0.9, count)));
        by.epsilon = (real)(1e-8 * corrected);
    }
    return by;
}
