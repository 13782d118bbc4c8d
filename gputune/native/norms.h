/* Norms in a member's step (modules/kernels/layers.py): of a table's rows or columns, or of the channels
   of images and sequences. */

/* The sizes of a norm of x (B, C, L), where L counts the pixels of a channel. The strides are those
   of x, of the outputs y (or of the gradient in x), and of the gradient in the outputs. */
typedef struct {
    int64_t B, C, L, groups, is_training;
    int64_t xb, xc, xl, yb, yc, yl, db, dc, dl;
} Norm;

/* Columns that are processed together. Narrow rows are joined up to this width. */
enum { JOINED = 64 };

static long joined(long n) { return n < JOINED ? JOINED / n : 1; }

/* Repeats the first ``n`` numbers of a table. */
static void repeat(long n, long times, real *table) {
    for (long i = n; i < n * times; i++) table[i] = table[i - n];
}

/* Whether the channels of each pixel are next to each other, and all pixels follow each other. */
static int is_rows(const Norm *p, long b, long c, long l) {
    return (c == 1 || p->C == 1) && (l == p->C || p->L == 1) && (b == p->L * p->C || p->B == 1);
}

/* Sums of the n columns of x (rows, n). ``w`` has n ``joined(n)`` numbers. */
static void column_sums(long rows, long n, const real *x, real *sums, real *w) {
    long width = n * joined(n), all = rows * n;
    memset(w, 0, width * sizeof(real));
    for (long i = 0; i < all; i += width) {
        long count = all - i < width ? all - i : width;
#pragma GCC ivdep
        for (long j = 0; j < count; j++) w[j] += x[i + j];
    }
    for (long j = 0; j < n; j++) sums[j] = w[j];
    for (long j = n; j < width; j++) sums[j % n] += w[j];
}

/* Mean and sum of squared differences from it, for each of n columns of x (rows, n). Blocks of rows
   that fit into the fastest cache are read once from memory, and then merged (Chan, Golub and
   LeVeque 1983). ``w`` has 4 n ``joined(n)`` numbers. */
static void column_moments(long rows, long n, const real *x, real *mean, real *squares, real *w) {
    long times = joined(n), width = n * times, lines = rows / times, block = 4096 / width + 1;
    real *means = w, *sums = w + width, *here = w + 2 * width, *apart = w + 3 * width;
    memset(means, 0, 2 * width * sizeof(real));
    for (long i = 0, count; i < lines; i += count, x += count * width) {
        count = lines - i < block ? lines - i : block;
        memset(here, 0, 2 * width * sizeof(real));
        for (long r = 0; r < count; r++)
#pragma GCC ivdep
            for (long j = 0; j < width; j++) here[j] += x[r * width + j];
        for (long j = 0; j < width; j++) here[j] /= count;
        for (long r = 0; r < count; r++)
#pragma GCC ivdep
            for (long j = 0; j < width; j++) apart[j] += (x[r * width + j] - here[j]) * (x[r * width + j] - here[j]);
        real share = (real)count / (i + count);
        for (long j = 0; j < width; j++) {
            real step = here[j] - means[j];
            means[j] += step * share, sums[j] += apart[j] + step * step * share * i;
        }
    }
    for (long j = 0; j < n; j++) {
        long count = 0;
        mean[j] = squares[j] = 0;
        for (long t = 0; t < times && lines; t++, count += lines) {
            real step = means[t * n + j] - mean[j], share = (real)lines / (count + lines);
            mean[j] += step * share, squares[j] += sums[t * n + j] + step * step * share * count;
        }
        for (long r = lines * times; r < rows; r++, count++) { /* the rows that are left */
            real step = x[(r - lines * times) * n + j] - mean[j];
            mean[j] += step / (count + 1), squares[j] += step * step * count / (count + 1);
        }
    }
}

/* The same for the channels of images with any strides. */
static void channel_moments(const Norm *p, const real *x, real *mean, real *squares) {
    for (long j = 0; j < p->C; j++) {
        real total = 0, apart = 0;
        for (long b = 0; b < p->B; b++)
#pragma omp simd reduction(+ : total)
            for (long l = 0; l < p->L; l++) total += x[b * p->xb + j * p->xc + l * p->xl];
        real m = total / (p->B * p->L);
        for (long b = 0; b < p->B; b++)
#pragma omp simd reduction(+ : apart)
            for (long l = 0; l < p->L; l++) {
                real step = x[b * p->xb + j * p->xc + l * p->xl] - m;
                apart += step * step;
            }
        mean[j] = m, squares[j] = apart;
    }
}

/* Outputs y of a batch norm of x. In training, the running statistics are updated, unless NULL.
   Otherwise they normalize. */
static void batch_norm(const int64_t *N, real momentum, real epsilon, const real *x, const real *weight, const real *bias,
                       real *running_mean, real *running_var, real *y, real *mean, real *scale, real *w) {
    const Norm *p = (const Norm *)N;
    long n = p->C, rows = p->B * p->L, times = joined(n), width = n * times;
    int is_last = is_rows(p, p->xb, p->xc, p->xl);
    real *center = w, *factor = w + width, *shift = w + 2 * width;
    if (p->is_training) {
        if (is_last)
            column_moments(rows, n, x, center, factor, w + 2 * width);
        else
            channel_moments(p, x, center, factor);
        for (long j = 0; j < n && running_mean; j++) {
            running_mean[j] = momentum * center[j] + (1 - momentum) * running_mean[j];
            running_var[j] = momentum * factor[j] / (rows - 1) + (1 - momentum) * running_var[j];
        }
        for (long j = 0; j < n; j++) {
            factor[j] = 1 / sqrt(factor[j] / rows + epsilon);
            mean[j] = center[j], scale[j] = factor[j];
        }
    } else
        for (long j = 0; j < n; j++) center[j] = running_mean[j], factor[j] = 1 / sqrt(running_var[j] + epsilon);
    for (long j = 0; j < n; j++) factor[j] *= weight ? weight[j] : 1, shift[j] = bias ? bias[j] : 0;
    if (is_last && is_rows(p, p->yb, p->yc, p->yl)) {
        for (long i = 0; i < 3; i++) repeat(n, times, w + i * width);
        for (long i = 0, left = rows * n; i < left; i += width) {
            long count = left - i < width ? left - i : width;
#pragma GCC ivdep
            for (long j = 0; j < count; j++) y[i + j] = (x[i + j] - center[j]) * factor[j] + shift[j];
        }
    } else
        for (long b = 0; b < p->B; b++)
            for (long j = 0; j < n; j++)
#pragma GCC ivdep
                for (long l = 0; l < p->L; l++)
                    y[b * p->yb + j * p->yc + l * p->yl] =
                        (x[b * p->xb + j * p->xc + l * p->xl] - center[j]) * factor[j] + shift[j];
}

/* The gradients in x, weight and bias of a batch norm, from the gradient d in its outputs. The last
   two may be NULL. */
static void batch_norm_slope(const int64_t *N, real epsilon, const real *d, const real *x, const real *weight,
                             const real *mean, const real *scale, const real *running_mean, const real *running_var,
                             real *below, real *in_weight, real *in_bias, real *w) {
    const Norm *p = (const Norm *)N;
    long n = p->C, rows = p->B * p->L, times = joined(n), width = n * times, all = rows * n;
    int is_last = is_rows(p, p->xb, p->xc, p->xl) && is_rows(p, p->yb, p->yc, p->yl) && is_rows(p, p->db, p->dc, p->dl);
    real *center = w, *factor = w + width, *total = w + 2 * width, *along = w + 3 * width;
    for (long j = 0; j < n; j++)
        if (p->is_training)
            center[j] = mean[j], factor[j] = scale[j];
        else
            center[j] = running_mean[j], factor[j] = 1 / sqrt(running_var[j] + epsilon);
    memset(total, 0, 2 * width * sizeof(real));
    if (is_last) {
        repeat(n, times, center);
        for (long i = 0; i < all; i += width) {
            long count = all - i < width ? all - i : width;
#pragma GCC ivdep
            for (long j = 0; j < count; j++) total[j] += d[i + j], along[j] += d[i + j] * (x[i + j] - center[j]);
        }
        for (long j = n; j < width; j++) total[j % n] += total[j], along[j % n] += along[j];
    } else
        for (long j = 0; j < n; j++) {
            real sum = 0, product = 0;
            for (long b = 0; b < p->B; b++)
#pragma omp simd reduction(+ : sum, product)
                for (long l = 0; l < p->L; l++) {
                    real above = d[b * p->db + j * p->dc + l * p->dl];
                    sum += above, product += above * (x[b * p->xb + j * p->xc + l * p->xl] - center[j]);
                }
            total[j] = sum, along[j] = product;
        }
    for (long j = 0; j < n; j++) {
        if (in_weight) in_weight[j] = along[j] * factor[j];
        if (in_bias) in_bias[j] = total[j];
        total[j] = p->is_training ? total[j] / rows : 0;
        along[j] = p->is_training ? along[j] * factor[j] * factor[j] / rows : 0;
        factor[j] *= weight ? weight[j] : 1;
    }
    if (is_last) {
        for (long i = 1; i < 4; i++) repeat(n, times, w + i * width);
        for (long i = 0; i < all; i += width) {
            long count = all - i < width ? all - i : width;
#pragma GCC ivdep
            for (long j = 0; j < count; j++)
                below[i + j] = (d[i + j] - total[j] - (x[i + j] - center[j]) * along[j]) * factor[j];
        }
    } else
        for (long b = 0; b < p->B; b++)
            for (long j = 0; j < n; j++)
#pragma GCC ivdep
                for (long l = 0; l < p->L; l++)
                    below[b * p->yb + j * p->yc + l * p->yl] =
                        (d[b * p->db + j * p->dc + l * p->dl] - total[j] -
                         (x[b * p->xb + j * p->xc + l * p->xl] - center[j]) * along[j]) * factor[j];
}

/* Outputs y of a group norm of x, the mean (B, groups) and the scale of each group. */
static void group_norm(const int64_t *N, real epsilon, const real *x, const real *weight, const real *bias, real *y,
                       real *mean, real *scale) {
    const Norm *p = (const Norm *)N;
    long members = p->C / p->groups;
    for (long b = 0; b < p->B; b++)
        for (long g = 0; g < p->groups; g++) {
            const real *from = x + b * p->xb + g * members * p->xc;
            real *to = y + b * p->yb + g * members * p->yc, total = 0, apart = 0;
            for (long j = 0; j < members; j++)
#pragma omp simd reduction(+ : total)
                for (long l = 0; l < p->L; l++) total += from[j * p->xc + l * p->xl];
            real m = total / (members * p->L);
            for (long j = 0; j < members; j++)
#pragma omp simd reduction(+ : apart)
                for (long l = 0; l < p->L; l++)
                    apart += (from[j * p->xc + l * p->xl] - m) * (from[j * p->xc + l * p->xl] - m);
            real s = 1 / sqrt(apart / (members * p->L) + epsilon);
            for (long j = 0; j < members; j++) {
                real factor = s * (weight ? weight[g * members + j] : 1), shift = bias ? bias[g * members + j] : 0;
#pragma GCC ivdep
                for (long l = 0; l < p->L; l++) to[j * p->yc + l * p->yl] = (from[j * p->xc + l * p->xl] - m) * factor + shift;
            }
            mean[b * p->groups + g] = m, scale[b * p->groups + g] = s;
        }
}

/* The gradients in x, weight and bias of a group norm, from the gradient d in its outputs. Each may
   be NULL. */
static void group_norm_slope(const int64_t *N, const real *d, const real *x, const real *weight, const real *mean,
                             const real *scale, real *below, real *in_weight, real *in_bias) {
    const Norm *p = (const Norm *)N;
    long members = p->C / p->groups;
    if (in_weight) memset(in_weight, 0, p->C * sizeof(real));
    if (in_bias) memset(in_bias, 0, p->C * sizeof(real));
    for (long b = 0; b < p->B; b++)
        for (long g = 0; g < p->groups; g++) {
            const real *from = x + b * p->xb + g * members * p->xc, *above = d + b * p->db + g * members * p->dc;
            real m = mean[b * p->groups + g], s = scale[b * p->groups + g], total = 0, along = 0;
            for (long j = 0; j < members; j++) {
                long channel = g * members + j;
                real sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
                for (long l = 0; l < p->L; l++) {
                    real step = above[j * p->dc + l * p->dl];
                    sum += step, product += step * (from[j * p->xc + l * p->xl] - m);
                }
                if (in_weight) in_weight[channel] += product * s;
                if (in_bias) in_bias[channel] += sum;
                total += sum * (weight ? weight[channel] : 1), along += product * (weight ? weight[channel] : 1);
            }
            total /= members * p->L, along *= s * s / (members * p->L);
            for (long j = 0; j < members && below; j++) {
                real factor = weight ? weight[g * members + j] : 1;
                real *to = below + b * p->yb + (g * members + j) * p->yc;
#pragma GCC ivdep
                for (long l = 0; l < p->L; l++)
                    to[l * p->yl] = (above[j * p->dc + l * p->dl] * factor - total - (from[j * p->xc + l * p->xl] - m) * along) * s;
            }
        }
}

/* Outputs (rows, n) of a layer norm of x (rows, n) along n, with the mean and 1 / deviation of each
   row. */
static void layer_norm(long rows, long n, real epsilon, const real *x, real *outputs, real *mean, real *scale) {
    for (long i = 0; i < rows; i++, x += n, outputs += n) {
        real m = 0, v = 0;
#pragma omp simd reduction(+ : m)
        for (long j = 0; j < n; j++) m += x[j];
        m /= n;
#pragma omp simd reduction(+ : v)
        for (long j = 0; j < n; j++) v += (x[j] - m) * (x[j] - m);
        real s = 1 / sqrt(v / n + epsilon);
        mean[i] = m, scale[i] = s;
#pragma GCC ivdep
        for (long j = 0; j < n; j++) outputs[j] = (x[j] - m) * s;
    }
}

/* The gradient in x (rows, n) of a layer norm along n, from the gradient in its outputs. */
static void layer_norm_slope(long rows, long n, const real *gradient, const real *x, const real *mean, const real *scale,
                             real *below) {
    for (long i = 0; i < rows; i++, gradient += n, x += n, below += n) {
        real total = 0, along = 0, m = mean[i], s = scale[i];
#pragma omp simd reduction(+ : total, along)
        for (long j = 0; j < n; j++) total += gradient[j], along += gradient[j] * (x[j] - m);
        total /= n, along *= s * s / n;
#pragma GCC ivdep
        for (long j = 0; j < n; j++) below[j] = (gradient[j] - total - (x[j] - m) * along) * s;
    }
}
