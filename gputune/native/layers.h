/* What the generated code of a member's step calls beside its loops: products of matrices that lie in any way, and norms.

   ``room`` is memory to work in: TILE_COLUMNS x (inner + TILE_ROWS + 1) numbers. */

/* b (inner, wanted) as whole vectors of ``width`` columns, zeros behind its own. */
static void packed(long inner, long wanted, long width, const real *b, long b_row, long b_column, real *room) {
    if (wanted < width) memset(room, 0, inner * width * sizeof(real));
    if (b_column == 1) {
        for (long p = 0; p < inner; p++) memcpy(room + p * width, b + p * b_row, wanted * sizeof(real));
        return;
    }
    long whole = b_row == 1 ? inner / LANES * LANES : 0, across = whole ? wanted / LANES * LANES : 0;
    for (long p = 0; p < whole; p += LANES) /* block by block: whole lines of the cache are read and written */
        for (long q = 0; q < across; q += LANES)
            transpose_block(b + p + q * b_column, b_column, room + p * width + q, width);
    for (long p = 0; p < inner; p++)
        for (long q = p < whole ? across : 0; q < wanted; q++) room[p * width + q] = b[p * b_row + q * b_column];
}

static void tiles(long width, int rows, long inner, const real *a, long a_row, long a_column, const real *b, long b_row,
                  const real *bias, real *c, long c_row) {
    if (width == LANES) tiles_of_1(rows, inner, a, a_row, a_column, b, b_row, bias, c, c_row);
    if (width == 2 * LANES) tiles_of_2(rows, inner, a, a_row, a_column, b, b_row, bias, c, c_row);
#if TILE_VECTORS == 3
    if (width == 3 * LANES) tiles_of_3(rows, inner, a, a_row, a_column, b, b_row, bias, c, c_row);
#endif
}

/* c (rows, columns) = a (rows, inner) b (inner, columns) + bias (columns), or without bias where it is NULL. */
static void matrix_product(long rows, long columns, long inner, const real *a, long a_row, long a_column,
                           const real *b, long b_row, long b_column, const real *bias, real *c, long c_row,
                           real *room) {
    real *held = room + TILE_COLUMNS * inner, *shift = held + TILE_COLUMNS * TILE_ROWS;
    for (long j = 0, width; j < columns; j += width) {
        width = panel((columns - j + LANES - 1) / LANES * LANES);
        long wanted = columns - j < width ? columns - j : width, line = b_row;
        const real *lines = b + j * b_column, *add = bias ? bias + j : 0;
        if (b_column != 1 || wanted < width) {
            packed(inner, wanted, width, lines, b_row, b_column, room);
            lines = room, line = width;
            if (add && wanted < width) add = memcpy(shift, add, wanted * sizeof(real));
        }
        for (long i = 0; i < rows; i += TILE_ROWS) {
            int count = rows - i < TILE_ROWS ? (int)(rows - i) : TILE_ROWS;
            real *to = c + i * c_row + j;
            if (wanted == width) {
                tiles(width, count, inner, a + i * a_row, a_row, a_column, lines, line, add, to, c_row);
                continue;
            }
            tiles(width, count, inner, a + i * a_row, a_row, a_column, lines, line, add, held, width);
            for (long r = 0; r < count; r++) memcpy(to + r * c_row, held + r * width, wanted * sizeof(real));
        }
    }
}

/* The slope in x (rows, n) of what is normalised along n, from that in the outputs. */
static void layer_norm_slope(long rows, long n, const real *slope, const real *x, const real *mean, const real *scale,
                             real *below) {
    for (long i = 0; i < rows; i++, slope += n, x += n, below += n) {
        real total = 0, along = 0, m = mean[i], s = scale[i];
#pragma omp simd reduction(+ : total, along)
        for (long j = 0; j < n; j++) total += slope[j], along += slope[j] * (x[j] - m);
        total /= n, along *= s * s / n;
#pragma GCC ivdep
        for (long j = 0; j < n; j++) below[j] = (slope[j] - total - (x[j] - m) * along) * s;
    }
}

/* Outputs (rows, n) of a batch norm in training of x (rows, n); running statistics go on, unless they are NULL. */
static void batch_norm(long rows, long n, real momentum, real epsilon, const real *x, const real *weight,
                       const real *bias, real *running_mean, real *running_var, real *outputs, real *mean,
                       real *scale) {
    memset(mean, 0, n * sizeof(real));
    memset(scale, 0, n * sizeof(real));
    for (long i = 0; i < rows; i++)
#pragma GCC ivdep
        for (long j = 0; j < n; j++) mean[j] += x[i * n + j];
    for (long j = 0; j < n; j++) mean[j] /= rows;
    for (long i = 0; i < rows; i++)
#pragma GCC ivdep
        for (long j = 0; j < n; j++) scale[j] += (x[i * n + j] - mean[j]) * (x[i * n + j] - mean[j]);
    for (long j = 0; j < n && running_mean; j++) {
        running_mean[j] = momentum * mean[j] + (1 - momentum) * running_mean[j];
        running_var[j] = momentum * scale[j] / (rows - 1) + (1 - momentum) * running_var[j];
    }
#pragma GCC ivdep
    for (long j = 0; j < n; j++) scale[j] = 1 / sqrt(scale[j] / rows + epsilon);
    for (long i = 0; i < rows; i++)
#pragma GCC ivdep
        for (long j = 0; j < n; j++)
            outputs[i * n + j] = (x[i * n + j] - mean[j]) * scale[j] * (weight ? weight[j] : 1) + (bias ? bias[j] : 0);
}

/* The slopes in x (rows, n), weight (n) and bias (n) of a batch norm in training. */
static void batch_norm_slope(long rows, long n, const real *slope, const real *x, const real *weight, const real *mean,
                             const real *scale, real *below, real *in_weight, real *in_bias) {
    memset(in_weight, 0, n * sizeof(real));
    memset(in_bias, 0, n * sizeof(real));
    for (long i = 0; i < rows; i++)
#pragma GCC ivdep
        for (long j = 0; j < n; j++) {
            in_bias[j] += slope[i * n + j];
            in_weight[j] += slope[i * n + j] * (x[i * n + j] - mean[j]) * scale[j];
        }
    for (long i = 0; i < rows; i++)
#pragma GCC ivdep
        for (long j = 0; j < n; j++)
            below[i * n + j] = (slope[i * n + j] - in_bias[j] / rows -
                                (x[i * n + j] - mean[j]) * scale[j] * in_weight[j] / rows) *
                               scale[j] * (weight ? weight[j] : 1);
}
