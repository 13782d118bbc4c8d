/* The functions of gputune's library that the generated kernels of a member's step call. A compiler
   needs longer for one of them than for dozens of kernels, so they are built when gputune is
   installed. Their headers describe them. */

typedef struct {
    /* strided.h */
    void (*matrix_product)(long rows, long columns, long inner, const real *a, long a_row, long a_column, const real *b,
                           long b_row, long b_column, const real *added, long added_row, real *c, long c_row, real *room);
    void (*turned_product)(long rows, long columns, long inner, const real *a, long a_row, long a_column, const real *b,
                           long b_row, long b_column, const real *added, long added_row, real *c, long c_row, real *room);
    /* convolution.h */
    void (*convolution)(const int64_t *N, const real *x, const real *weight, const real *bias, real *y, real *w);
    void (*convolution_below)(const int64_t *N, const real *y, const real *weight, const real *bias, real *x, real *w);
    void (*convolution_weights)(const int64_t *N, const real *y, const real *x, real *weight, real *w);
    /* winograd.h */
    void (*winograd)(const int64_t *N, const real *x, const real *weight, const real *bias, real *y, real *w);
    void (*winograd_below)(const int64_t *N, const real *y, const real *weight, const real *bias, real *x, real *w);
    void (*winograd_weights)(const int64_t *N, const real *y, const real *x, real *weight, real *w);
    /* images.h */
    void (*max_pool)(const int64_t *N, const real *x, real *y, int64_t *at);
    void (*max_pool_below)(const int64_t *N, const real *y, const int64_t *at, real *x);
    void (*resize)(const int64_t *N, const double *S, const real *x, real *y);
    /* norms.h */
    void (*batch_norm)(const int64_t *N, real momentum, real epsilon, const real *x, const real *weight,
                       const real *bias, real *running_mean, real *running_var, real *y, real *mean, real *scale,
                       real *w);
    void (*batch_norm_slope)(const int64_t *N, real epsilon, const real *d, const real *x, const real *weight,
                             const real *mean, const real *scale, const real *running_mean, const real *running_var,
                             real *below, real *in_weight, real *in_bias, real *w);
    void (*group_norm)(const int64_t *N, real epsilon, const real *x, const real *weight, const real *bias, real *y,
                       real *mean, real *scale);
    void (*group_norm_slope)(const int64_t *N, const real *d, const real *x, const real *weight, const real *mean,
                             const real *scale, real *below, real *in_weight, real *in_bias);
    void (*layer_norm)(long rows, long n, real epsilon, const real *x, real *outputs, real *mean, real *scale);
    void (*layer_norm_slope)(long rows, long n, const real *gradient, const real *x, const real *mean, const real *scale,
                             real *below);
    void (*column_sums)(long rows, long n, const real *x, real *sums, real *w);
} StepFunctions;
