/* What the kernels of a member's step are made of (modules/member_kernels.py), before them: what they call beside their
   loops, products of matrices that lie in any way, and norms; and what takes the steps that call them. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>

#ifdef DOUBLE
typedef double real;
#else
typedef float real;
#endif
#define root sqrt

/* Functions that glibc has of whole vectors too, to 4 units of the last place: loops take those where this says so. */
#if defined(__GLIBC__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GLIBC_PREREQ(2, 22)
#define OF_VECTORS(name) \
    __attribute__((simd("notinbranch"), const)) double(name)(double); \
    __attribute__((simd("notinbranch"), const)) float(name##f)(float);
OF_VECTORS(sin)
OF_VECTORS(cos)
OF_VECTORS(log)
#endif
#endif

#include "product.h"
#include "functions.h"

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

/* c (rows, columns) = a (rows, inner) b (inner, columns) + bias (columns), or without bias where it is NULL. ``room`` is
   memory to work in: TILE_COLUMNS x (inner + TILE_ROWS + 1) numbers. */
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

/* What takes the steps of a member (modules/member_code.py), each a list of numbers: how many follow, then runs of calls.

   A run: calls, rows, and for how many rows at a time. A call: kernel, places, sizes, its first number of the host, and
   how much of its last size is a row, 0 where it is called once for all. Then for each place the memory (-1: none), the
   byte at which it begins, and the bytes of a row; then the sizes. */

typedef void (*Kernel)(char *const *P, const double *S, const int64_t *N);

enum { MOST = 64 }; /* places or sizes of a call */

static const int64_t *take_run(const int64_t *run, const Kernel *kernels, char *const *M, const double *S) {
    const int64_t *call = run;
    for (int64_t row = 0, count; row < run[1]; row += count) {
        count = run[1] - row < run[2] ? run[1] - row : run[2];
        call = run + 3;
        for (int64_t i = 0; i < run[0]; i++) {
            char *places[MOST];
            int64_t n = call[1], sizes[MOST];
            const int64_t *place = call + 5, *size = place + 3 * n;
            for (int64_t j = 0; j < n; j++, place += 3)
                places[j] = place[0] < 0 ? 0 : M[place[0]] + place[1] + row * place[2];
            for (int64_t j = 0; j < call[2]; j++) sizes[j] = size[j];
            if (call[4]) sizes[call[2] - 1] = count * call[4];
            kernels[call[0]](places, S + call[3], sizes);
            call = size + call[2];
        }
    }
    return call;
}

/* M: the memories that the steps find, the first of them room for what they make. */
void take_steps(int64_t count, const int64_t *const *steps, const Kernel *kernels, char *const *M,
                const double *const *S) {
    for (int64_t i = 0; i < count; i++)
        for (const int64_t *run = steps[i] + 1, *end = run + *steps[i]; run < end;)
            run = take_run(run, kernels, M, S[i]);
}
