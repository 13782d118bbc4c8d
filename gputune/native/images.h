/* Pooling of images in a member's step (modules/kernels/layers.py). Images have any strides. Loops
   over channels use vectors if the channels of a pixel lie next to each other. */

/* The sizes of a pooling of x (B, C, H, W) to y (B, C, OH, OW). A kernel of height or width 0 means
   adaptive windows. */
typedef struct {
    int64_t B, C, H, W, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW;
    int64_t xb, xc, xh, xw, yb, yc, yh, yw, ab, ac, ah, aw; /* strides of x, y and the positions */
} Pooling;

/* The first entry of window ``i`` on an axis, and the entry after its last one. Padding is left out. A
   ``whole`` window has no padding. */
ALWAYS_INLINE void window(const int is_whole, long i, long size, long outputs, long kernel, long stride, long padding,
                          long dilation, long *first, long *end) {
    if (is_whole) {
        *first = i * stride, *end = i * stride + kernel;
        return;
    }
    if (kernel == 0) {
        *first = i * size / outputs, *end = ((i + 1) * size + outputs - 1) / outputs;
        return;
    }
    long begin = i * stride - padding, last = begin + (kernel - 1) * dilation + 1;
    if (begin < 0) begin += (-begin + dilation - 1) / dilation * dilation;
    *first = begin, *end = last < size ? last : size;
}

/* Whether windows of 2 x 2 pixels halve an image. These are the most frequent windows. With constants
   in the loops, the code is 1.4x to 2.4x faster. */
static int is_halving(const Pooling *p) {
    int is_two = p->KH == 2 && p->KW == 2 && p->SH == 2 && p->SW == 2;
    return is_two && p->PH + p->PW == 0 && p->DH * p->DW == 1 && 2 * p->OH <= p->H && 2 * p->OW <= p->W;
}

/* Positions as 64-bit numbers, as torch keeps them. */
typedef int64_t long_places __attribute__((vector_size(LANES * 8), aligned(8), may_alias));

ALWAYS_INLINE void max_pool_of(const int is_whole, const long KH, const long KW, const long SH, const long SW,
                               const long DH, const long DW, const Pooling *p, const real *x, real *y, int64_t *at) {
    long in_vectors = p->xc == 1 && p->yc == 1 && p->ac == 1 ? p->C / LANES * LANES : 0;
    for (long b = 0; b < p->B; b++)
        for (long h = 0; h < p->OH; h++) {
            long top, bottom;
            window(is_whole, h, p->H, p->OH, KH, SH, p->PH, DH, &top, &bottom);
            for (long w = 0; w < p->OW; w++) {
                long left, right;
                window(is_whole, w, p->W, p->OW, KW, SW, p->PW, DW, &left, &right);
                const real *image = x + b * p->xb;
                real *out = y + b * p->yb + h * p->yh + w * p->yw;
                int64_t *to = at + b * p->ab + h * p->ah + w * p->aw;
                for (long k = 0; k < in_vectors; k += LANES) {
                    vector best = (vector){0} - (real)INFINITY;
                    places where = (places){0} + (whole)(top * p->W + left);
#pragma GCC unroll 2
                    for (long i = top; i < bottom; i += DH)
#pragma GCC unroll 2
                        for (long j = left; j < right; j += DW) {
                            vector line = *(const vector *)(image + i * p->xh + j * p->xw + k);
                            places is_better = (line > best) | (line != line);
                            best = (vector)((is_better & (places)line) | (~is_better & (places)best));
                            where = (is_better & (whole)(i * p->W + j)) | (~is_better & where);
                        }
                    *(vector *)(out + k) = best;
                    *(long_places *)(to + k) = __builtin_convertvector(where, long_places);
                }
                for (long k = in_vectors; k < p->C; k++) {
                    real best = -(real)INFINITY;
                    int64_t where = top * p->W + left;
                    for (long i = top; i < bottom; i += DH)
                        for (long j = left; j < right; j += DW) {
                            real number = image[i * p->xh + j * p->xw + k * p->xc];
                            int is_better = number > best || number != number;
                            best = is_better ? number : best;
                            where = is_better ? i * p->W + j : where;
                        }
                    out[k * p->yc] = best, to[k * p->ac] = where;
                }
            }
        }
}

/* The largest number of each window, and its position in the plane of x. As in torch, the first of
   equal numbers is taken, and NaN is larger than every number. */
static void max_pool(const int64_t *N, const real *x, real *y, int64_t *at) {
    const Pooling *p = (const Pooling *)N;
    if (is_halving(p))
        max_pool_of(1, 2, 2, 2, 2, 1, 1, p, x, y, at);
    else
        max_pool_of(0, p->KH, p->KW, p->SH, p->SW, p->DH, p->DW, p, x, y, at);
}

ALWAYS_INLINE void max_pool_below_of(const int is_whole, const long KH, const long KW, const long SH, const long SW,
                                     const long DH, const long DW, const int is_tiled, const Pooling *p, const real *y,
                                     const int64_t *at, real *x) {
    int is_last = p->xc == 1 && p->yc == 1 && p->ac == 1, is_plane = p->xh == p->W * p->xw;
    long in_vectors = is_last ? p->C / LANES * LANES : 0;
    for (long b = 0; b < p->B; b++)
        for (long h = 0; h < p->OH; h++) {
            long top, bottom;
            window(is_whole, h, p->H, p->OH, KH, SH, p->PH, DH, &top, &bottom);
            for (long w = 0; w < p->OW; w++) {
                long left, right;
                window(is_whole, w, p->W, p->OW, KW, SW, p->PW, DW, &left, &right);
                const real *from = y + b * p->yb + h * p->yh + w * p->yw;
                const int64_t *place = at + b * p->ab + h * p->ah + w * p->aw;
                real *image = x + b * p->xb;
                for (long k = 0; k < in_vectors; k += LANES) {
                    places where = __builtin_convertvector(*(const long_places *)(place + k), places);
                    places above = (places) * (const vector *)(from + k);
#pragma GCC unroll 2
                    for (long i = top; i < bottom; i += DH)
#pragma GCC unroll 2
                        for (long j = left; j < right; j += DW) {
                            vector part = (vector)((where == (whole)(i * p->W + j)) & above);
                            vector *below = (vector *)(image + i * p->xh + j * p->xw + k);
                            if (is_tiled)
                                *below = part;
                            else
                                *below += part;
                        }
                }
                for (long k = in_vectors; k < p->C; k++) {
                    int64_t i = place[k * p->ac];
                    long step = is_plane ? i * p->xw : i / p->W * p->xh + i % p->W * p->xw;
                    image[k * p->xc + step] += from[k * p->yc];
                }
            }
        }
}

/* The gradient in x of a max pooling, from the gradient in y and the positions. */
static void max_pool_below(const int64_t *N, const real *y, const int64_t *at, real *x) {
    const Pooling *p = (const Pooling *)N;
    int is_last = p->xc == 1 && p->yc == 1 && p->ac == 1, is_plane = p->xh == p->W * p->xw;
    /* windows that cover every pixel once: each number is written at once */
    int is_tiled = is_last && p->C % LANES == 0 && p->KH == p->SH && p->KW == p->SW && p->PH + p->PW == 0 &&
                   p->DH * p->DW == 1 && p->OH * p->KH == p->H && p->OW * p->KW == p->W;
    if (is_tiled && is_halving(p)) {
        max_pool_below_of(1, 2, 2, 2, 2, 1, 1, 1, p, y, at, x);
        return;
    }
    if (is_tiled) {
    } else if (p->xb == p->C * p->H * p->W && is_plane && (p->xw == 1 || p->xc == 1)) /* without gaps */
        memset(x, 0, p->B * p->xb * sizeof(real));
    else
        for (long b = 0; b < p->B; b++)
            for (long k = 0; k < p->C; k++)
                for (long h = 0; h < p->H; h++)
                    for (long w = 0; w < p->W; w++) x[b * p->xb + k * p->xc + h * p->xh + w * p->xw] = 0;
    max_pool_below_of(0, p->KH, p->KW, p->SH, p->SW, p->DH, p->DW, is_tiled, p, y, at, x);
}

/* The sizes of a linear map of x (B, C, H, W) to y (B, C, OH, OW), and their strides. ``columns`` is the
   position of the second table. */
typedef struct {
    int64_t B, C, H, W, OH, OW, xb, xc, xh, xw, yb, yc, yh, yw, columns;
} Resizing;

/* Multiplies the rows of each channel by one matrix and the columns by another. A table has for each
   row of its matrix the first entry, the number of entries, and the position of the entries. */
static void resize(const int64_t *N, const double *S, const real *x, real *y) {
    const Resizing *p = (const Resizing *)N;
    const double *rows = S, *columns = S + p->columns;
    long in_vectors = p->xc == 1 && p->yc == 1 ? p->C / LANES * LANES : 0;
    for (long b = 0; b < p->B; b++)
        for (long h = 0; h < p->OH; h++)
            for (long w = 0; w < p->OW; w++) {
                long top = (long)rows[3 * h], height = (long)rows[3 * h + 1];
                long left = (long)columns[3 * w], width = (long)columns[3 * w + 1];
                const double *down = rows + (long)rows[3 * h + 2], *across = columns + (long)columns[3 * w + 2];
                const real *from = x + b * p->xb + top * p->xh + left * p->xw;
                real *to = y + b * p->yb + h * p->yh + w * p->yw;
                for (long k = 0; k < in_vectors; k += LANES) {
                    vector sum = {0};
                    for (long i = 0; i < height; i++)
                        for (long j = 0; j < width; j++)
                            sum += (real)(down[i] * across[j]) * *(const vector *)(from + i * p->xh + j * p->xw + k);
                    *(vector *)(to + k) = sum;
                }
                for (long k = in_vectors; k < p->C; k++) {
                    real sum = 0;
                    for (long i = 0; i < height; i++)
                        for (long j = 0; j < width; j++)
                            sum += (real)(down[i] * across[j]) * from[i * p->xh + j * p->xw + k * p->xc];
                    to[k * p->yc] = sum;
                }
            }
}
