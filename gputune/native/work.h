/* The part that the C code and the GPU kernel share: the description of a training (Work), and
   formulas for single numbers. The including code first defines ``real``, its ``root``, the type
   ``wide`` in which gelu is computed, ``exponential`` and ALWAYS_INLINE. Axes: F folds, C trials, D
   inputs, H width, K outputs, n rows of the data.

   A number that is not finite stays so, because a member that diverges must be recognizable. */

#ifndef ALWAYS_INLINE /* on a GPU: the kernel begins with this header */
#ifdef __CUDACC_RTC__ /* NVRTC has no headers */
typedef int int32_t;
typedef long long int64_t;
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#else
#include <math.h>
#include <stdint.h>
#endif

#define ALWAYS_INLINE static __device__ __forceinline__
#define exponential exp
#define root sqrt
typedef real wide;
#endif

enum { RELU, GELU, SILU, TANH };

ALWAYS_INLINE real activated(const int kind, real z) {
    if (kind == RELU) return z < 0 ? 0 : z; /* NaN < 0 is false, so NaN stays NaN */
    if (kind == TANH) return 1 - 2 / (1 + exponential(2 * z));
    if (kind == SILU) return z / (1 + exponential(-z));
    return z * (real)0.5 * (1 + (real)erf(z * (wide)0.70710678118654752));
}

/* The gradient in z, from the gradient ``above`` in h = activated(z). relu reads h, the other activations
   read z. */
ALWAYS_INLINE real slope_in(const int kind, real above, real z, real h) {
    if (kind == RELU) return h <= 0 ? 0 : above;
    if (kind == TANH) {
        real t = 1 - 2 / (1 + exponential(2 * z));
        return above * (1 - t * t);
    }
    if (kind == SILU) {
        real s = 1 / (1 + exponential(-z));
        return above * (s * (1 + z * (1 - s)));
    }
    wide x = z, below = (wide)0.5 * (1 + erf(x * (wide)0.70710678118654752));
    return above * (real)(below + x * (wide)0.39894228040143268 * exp((wide)-0.5 * x * x));
}

/* An input as its fold reads it: scaled, and 0 if it is missing (NaN). */
ALWAYS_INLINE real scaled(real x, real center, real scale) {
    real value = (x - center) / scale;
    return value == value ? value : 0;
}

/* The training of all members; the layout is the same as in gputune.native.library.Work. */
typedef struct {
    int64_t folds, trials, inputs, width, outputs, layers, optimizer, classes;
    int64_t rows;                 /* n, the rows of the data */
    int64_t epoch, horizon;       /* finished epochs, and epochs of a schedule */
    int64_t row_score;            /* the score of a validation row, whose mean goes to ``means`` */
    int64_t loss;                 /* of a regression: see number_slope */
    const real *x;                /* (V, n, D) */
    const real *center, *scale;   /* (F, D): (x - center) / scale is read, 0 if x is missing; NULL: x is not scaled */
    const int64_t *copies;        /* (F): the index in V that a fold reads */
    const void *y;                /* (n) codes, or (F, n) values */
    const double *target;         /* (n) y target_scale + target_center, in the original units; NULL: classes */
    const double *target_center, *target_scale; /* (F) */
    const double *weights;        /* (F, n) or NULL */
    const real *present;          /* (F, K) */
    const int64_t *order;         /* (F, longest fold): rows of the data in the order in which this epoch reads them */
    const int64_t *lengths;       /* (F): rows of each fold */
    int64_t longest;
    const int64_t *widths;                             /* (C, hidden layers) */
    const int64_t *activations;                        /* (hidden layers) */
    const int64_t *sizes, *schedule;                   /* (C) */
    const double *lr, *decay, *momentum; /* (C) */
    const double *dropout;        /* (C, hidden layers) */
    const double *ema;            /* (C) */
    const double *loss_number;    /* (1): delta of the Huber loss, or the level of the quantile loss */
    const float *draws;           /* random draws of dropout, one after another; NULL: none */
    const int64_t *draw_start;    /* (steps): index of a step's first draw */
    const int64_t *draw_rows;     /* (steps): number of rows that have draws, in each layer */
    real *theta, *first, *second; /* flat buffers; the moments may be NULL */
    real *average;                /* of the parameters, in the layout of theta; NULL: none, and theta is scored */
    const int64_t *valid;         /* validation rows of all folds */
    const int64_t *valid_start;   /* (F + 1) */
    real *scored;                 /* outputs on the validation rows, (C, m, K) fold after fold; NULL: none */
    double *means;                /* (F, C): the mean of row_score over the validation rows; NULL: none */
    int64_t *nanoseconds;         /* (2): time of training and of scoring, summed over members */
    const int64_t *lag;           /* (F, C): steps that a member would have taken more at its present batch size */
    const int64_t *queue;         /* (F C): members p = f C + c in the order of training */
    int64_t *steps_done;          /* (F, C): steps that a member has taken in this epoch; NULL: not counted */
} Work;

/* The gradient of a regression loss in the output, which is ``gap`` above the target. */
enum { SQUARED, ABSOLUTE, HUBER, QUANTILE };

ALWAYS_INLINE real number_slope(int64_t loss, real number, real gap) {
    if (loss == SQUARED) return 2 * gap;
    if (loss == HUBER) return gap > number ? number : gap < -number ? -number : gap;
    real sign = gap > 0 ? 1 : gap < 0 ? -1 : 0;
    return loss == ABSOLUTE ? sign : (sign + 1) * (real)0.5 - number;
}

/* The score of a validation row, in double precision, because a tuned model predicts in double
   precision. It is NaN if an output is not finite; the mean over rows is then NaN too. */
enum { HIT, LOG_LIKELIHOOD, SQUARED_ERROR, ABSOLUTE_ERROR };

ALWAYS_INLINE double row_score(const Work *w, const int classes, int64_t f, const real *z, int64_t row) {
    if (!classes) {
        double gap = z[0] * w->target_scale[f] + w->target_center[f] - w->target[row];
        return w->row_score == ABSOLUTE_ERROR ? fabs(gap) : gap * gap;
    }
    const real *present = w->present + f * w->outputs;
    int64_t label = ((const int64_t *)w->y)[row], best = -1; /* the largest output; in a tie, the first one */
    for (int64_t k = 0; k < w->outputs; k++) {
        if (present[k] == 0) continue;
        if (z[k] - z[k] != 0) return NAN;
        if (best < 0 || z[k] > z[best]) best = k;
    }
    if (w->row_score == HIT) return best == label;
    double sum = 0, top = z[best], least = -36.043653389117154, most = -2.2204460492503136e-16;
    for (int64_t k = 0; k < w->outputs; k++)
        if (present[k] != 0) sum += exp(z[k] - top);
    double log_p = present[label] != 0 ? z[label] - top - log(sum) : least;
    return log_p < least ? least : log_p > most ? most : log_p; /* p stays 2^-52 away from 0 and 1, as in scikit-learn */
}

/* One step of an optimizer over one parameter, as gputune.optimizers.rules defines it, and the rates of a member's step. */
enum { SGD, NESTEROV, ADAM, ADAMW };

/* The step of one member: numbers that all its parameters share. ``rate`` includes the schedule.
   For adam it also includes the bias corrections, which are moved out of the loop:
   lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps). */
typedef struct {
    int64_t optimizer;
    real rate, shrink, l2, momentum, epsilon;
} Rates;

ALWAYS_INLINE void adam_step(Rates rates, real *w, real *first, real *second, real gradient) {
    real g = gradient + rates.l2 * *w;
    real m = *first + (real)(1 - 0.9) * (g - *first);
    real v = (real)0.999 * *second + (real)(1 - 0.999) * g * g;
    *first = m, *second = v;
    *w = *w - rates.shrink * *w - rates.rate * (m / (root(v) + rates.epsilon));
}

ALWAYS_INLINE void momentum_step(Rates rates, real *w, real *first, real gradient) {
    real g = gradient + rates.l2 * *w;
    real b = rates.momentum * *first + g;
    *first = b;
    *w -= rates.rate * (rates.optimizer == NESTEROV ? g + rates.momentum * b : b);
}

ALWAYS_INLINE void plain_step(Rates rates, real *w, real gradient) {
    *w -= rates.rate * (gradient + rates.l2 * *w);
}

/* A number limited to the range of ``real``, so that it does not become infinite. */
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

/* The factor on the rate after ``done`` of ``total`` steps, as gputune.optimizers.rules defines it. */
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

/* The rates of a member's step after ``done`` of the ``total`` steps of its schedule, at its present
   batch size. ``count`` is the index of the step (the first is 1). */
ALWAYS_INLINE Rates rates(const Work *w, long f, long c, double done, double total) {
    double lr = w->lr[c] * factor(w->schedule[c], done, total), decay = w->decay[c];
    double count = done + 1 - w->lag[f * w->trials + c];
    Rates rates = {w->optimizer, held(lr), 0, held(decay), held(w->momentum[c]), 0};
    if (w->optimizer == ADAMW) rates.shrink = held(lr * decay), rates.l2 = 0;
    if (w->optimizer >= ADAM) {
        double corrected = sqrt(1 - pow(0.999, count));
        rates.rate = held(lr * corrected / (1 - pow(0.9, count)));
        rates.epsilon = (real)(1e-8 * corrected);
    }
    return rates;
}
