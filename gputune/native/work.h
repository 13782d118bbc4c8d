/* What the training of members is asked to do, by the C library and by the kernel of a GPU.

   Axes: F folds, C trials, D inputs, H width, K outputs, n rows of the data. */

/* For all members; laid out as gputune.native.library.Work. */
typedef struct {
    int64_t folds, trials, inputs, width, outputs, layers, activation, optimizer, classes;
    int64_t rows;                 /* n of the data */
    int64_t epoch, horizon;       /* epochs done, and epochs of a schedule */
    int64_t row_score;            /* what a validation row adds to ``means`` (scores.h) */
    const real *x;                /* (V, n, D) */
    const real *center, *scale;   /* (F, D): (x - center) / scale is read, 0 where x is missing; NULL: x as it is */
    const int64_t *copies;        /* (F): V of a fold */
    const void *y;                /* (n) codes, or (F, n) values */
    const double *target;         /* (n) values in their own units, of y target_scale + target_center; NULL: classes */
    const double *target_center, *target_scale; /* (F) */
    const double *weights;        /* (F, n) or NULL */
    const real *present;          /* (F, K) */
    const int64_t *order;         /* (F, longest fold): rows of the data as they are read in this epoch */
    const int64_t *lengths;       /* (F): rows of each fold */
    int64_t longest;
    const int64_t *widths;                             /* (C, hidden layers) */
    const int64_t *sizes, *schedule;                   /* (C) */
    const double *lr, *decay, *momentum, *dropout, *ema; /* (C) */
    const float *draws;           /* of dropout, one after another; NULL: none */
    const int64_t *draw_start;    /* (steps): where those of a step begin */
    const int64_t *draw_rows;     /* (steps): how many rows they are for, in each layer */
    real *theta, *first, *second; /* flat buffers; the moments may be NULL */
    real *average;                /* of the parameters, as they lie there; NULL: none, and theta is scored */
    const int64_t *valid;         /* validation rows of all folds */
    const int64_t *valid_start;   /* (F + 1) */
    real *scored;                 /* outputs on them, (C, m, K) fold after fold; NULL: none */
    double *means;                /* (F, C): the mean of row_score over them; NULL: none */
    int64_t *nanoseconds;         /* (2): of training and of scoring, added up over members */
    const int64_t *queue;         /* (F C): members p = f C + c in the order in which they are taken */
} Work;
