/* Convolutions of images in a member's step (modules/member_convolutions.py), and their gradients.

   In memory the channels of a pixel lie next to each other (channels last); images in another layout
   are copied. An image is copied into a frame of zeros, so that every tap of the kernel reads inside
   of the frame. A tile of outputs stays in registers while the taps and channels are added up. The
   products of one pixel need no copy of its neighbors. */

/* The sizes of a convolution of x (B, C, H, W) to y (B, O, OH, OW). A 1d convolution has a height
   of 1. ``block`` is the number of images in frames at once. */
typedef struct {
    int64_t B, C, H, W, O, OH, OW, groups, KH, KW, SH, SW, PH, PW, DH, DW;
    int64_t xb, xc, xh, xw, wo, wi, wh, ww, yb, yc, yh, yw; /* strides */
    int64_t block;
} Convolution;

/* Outputs of some pixels: row i is the sum over k of in[i step + at[k]] lines[k], plus the bias. */
ALWAYS_INLINE void taps_tile(const int rows, const int vectors, long inner, const real *in, long step, const long *at,
                             const real *lines, const real *bias, real *out, long out_step) {
    vector sum[12][3];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int j = 0; j < vectors; j++) sum[i][j] = bias ? *(const vector *)(bias + j * LANES) : (vector){0};
    for (long k = 0; k < inner; k++, lines += vectors * LANES) {
        const real *from = in + at[k];
        vector line[3];
#pragma GCC unroll 3
        for (int j = 0; j < vectors; j++) {
            line[j] = *(const vector *)(lines + j * LANES);
            IN_REGISTER(line[j]);
        }
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            real x = from[i * step];
#pragma GCC unroll 3
            for (int j = 0; j < vectors; j++) sum[i][j] += x * line[j];
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int j = 0; j < vectors; j++) *(vector *)(out + i * out_step + j * LANES) = sum[i][j];
}

/* Gradients of some rows of weights: row i is the sum over all pixels of dy[i] times the numbers of
   x that follow each other at this pixel. */
ALWAYS_INLINE void weights_tile(const int rows, const int vectors, const Convolution *c, long images, const real *x,
                                long x_image, long x_row, long x_step, const real *dy, long y_image, long y_row,
                                long y_step, real *to, long to_row) {
    vector sum[12][3];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int j = 0; j < vectors; j++) sum[i][j] = *(const vector *)(to + i * to_row + j * LANES);
    for (long b = 0; b < images; b++)
        for (long h = 0; h < c->OH; h++) {
            const real *from = x + b * x_image + h * x_row, *above = dy + b * y_image + h * y_row;
            for (long pixel = 0; pixel < c->OW; pixel++, from += x_step, above += y_step) {
                vector line[3];
#pragma GCC unroll 3
                for (int j = 0; j < vectors; j++) {
                    line[j] = *(const vector *)(from + j * LANES);
                    IN_REGISTER(line[j]);
                }
#pragma GCC unroll 12
                for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
                    for (int j = 0; j < vectors; j++) sum[i][j] += above[i] * line[j];
            }
        }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int j = 0; j < vectors; j++) *(vector *)(to + i * to_row + j * LANES) = sum[i][j];
}

/* The same gradients with the channels of y in the vectors: row i is the sum over all pixels of
   x[at[i]] times the numbers of dy that follow each other. */
ALWAYS_INLINE void tap_weights_tile(const int rows, const Convolution *c, long images, const real *x, long x_image,
                                    long x_row, long x_step, const long *at, const real *dy, long y_image, long y_row,
                                    long y_step, real *to) {
    vector sum[12];
    long place[12];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) sum[i] = *(const vector *)(to + i * LANES), place[i] = at[i];
    for (long b = 0; b < images; b++)
        for (long h = 0; h < c->OH; h++) {
            const real *from = x + b * x_image + h * x_row, *above = dy + b * y_image + h * y_row;
            for (long pixel = 0; pixel < c->OW; pixel++, from += x_step, above += y_step) {
                vector line = *(const vector *)above;
#pragma GCC unroll 12
                for (int i = 0; i < rows; i++) sum[i] += from[place[i]] * line;
            }
        }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) *(vector *)(to + i * LANES) = sum[i];
}

/* A function for each width of a tile, in which the number of rows is a constant in each case. */
#define TAP_WEIGHTS_CASE(n) \
    case n: tap_weights_tile(n, c, images, x, x_image, x_row, x_step, at, dy, y_image, y_row, y_step, to); break;
#define TAPS_CASE(n) \
    case n: taps_tile(n, VECTORS, inner, in, step, at, lines, bias, out, out_step); break;
#define WEIGHTS_CASE(n) \
    case n: \
        weights_tile(n, VECTORS, c, images, x, x_image, x_row, x_step, dy, y_image, y_row, y_step, to, to_row); \
        break;
#define CONVOLUTION_TILES(n, EACH_ROWS) \
    static void taps_of_##n(int rows, long inner, const real *in, long step, const long *at, const real *lines, \
                            const real *bias, real *out, long out_step) { \
        enum { VECTORS = n }; \
        switch (rows) { EACH_ROWS(TAPS_CASE) } \
    } \
    static void weights_of_##n(int rows, const Convolution *c, long images, const real *x, long x_image, long x_row, \
                               long x_step, const real *dy, long y_image, long y_row, long y_step, real *to, \
                               long to_row) { \
        enum { VECTORS = n }; \
        switch (rows) { EACH_ROWS(WEIGHTS_CASE) } \
    }
static void tap_weights(int rows, const Convolution *c, long images, const real *x, long x_image, long x_row,
                        long x_step, const long *at, const real *dy, long y_image, long y_row, long y_step, real *to) {
    switch (rows) { TWELVE(TAP_WEIGHTS_CASE) }
}
#if VECTOR_BYTES == 64
CONVOLUTION_TILES(1, TWELVE)
CONVOLUTION_TILES(2, TWELVE)
CONVOLUTION_TILES(3, EIGHT)
#else
CONVOLUTION_TILES(1, EIGHT)
CONVOLUTION_TILES(2, SIX)
#if TILE_VECTORS == 3
CONVOLUTION_TILES(3, FOUR)
#endif
#endif

/* Computes the first ``wanted`` columns of ``rows`` outputs. They are split into tiles of nearly
   equal numbers of rows. ``held`` is scratch memory for one tile. */
static void taps(long wanted, long vectors, long rows, long inner, const real *in, long step, const long *at,
                 const real *lines, const real *bias, real *out, long out_step, real *held) {
    long width = vectors * LANES, most = MOST_ROWS(vectors), left = (rows + most - 1) / most;
    for (long i = 0, count; i < rows; i += count, left--) {
        count = (rows - i + left - 1) / left;
        real *to = wanted < width ? held : out + i * out_step;
        long to_step = wanted < width ? width : out_step;
        const real *from = in + i * step;
        if (vectors == 1) taps_of_1((int)count, inner, from, step, at, lines, bias, to, to_step);
        if (vectors == 2) taps_of_2((int)count, inner, from, step, at, lines, bias, to, to_step);
#if TILE_VECTORS == 3
        if (vectors == 3) taps_of_3((int)count, inner, from, step, at, lines, bias, to, to_step);
#endif
        for (long r = 0; r < count && wanted < width; r++)
            memcpy(out + (i + r) * out_step, held + r * width, wanted * sizeof(real));
    }
}

/* Copies images (images, channels, height, width) with any strides; the copy's channels lie next to
   each other. */
static void copy_images(long images, long channels, long height, long width, const real *from, long fb, long fc, long fh,
                        long fw, real *to, long tb, long tc, long th, long tw) {
    for (long b = 0; b < images; b++)
        for (long h = 0; h < height; h++) {
            const real *row = from + b * fb + h * fh;
            real *out = to + b * tb + h * th;
            if ((fc == 1 || channels == 1) && (tc == 1 || channels == 1) && fw == channels && tw == channels)
                memcpy(out, row, width * channels * sizeof(real));
            else if (fc == 1 && tc == 1)
                for (long w = 0; w < width; w++)
                    for (long k = 0; k < channels; k++) out[w * tw + k] = row[w * fw + k];
            else
                for (long k = 0; k < channels; k++)
                    for (long w = 0; w < width; w++) out[w * tw + k * tc] = row[w * fw + k * fc];
        }
}

/* The frames of zeros into which images of x are copied: numbers of a row and of a frame, and the
   rows and columns of an image that the convolution reads. */
typedef struct {
    long row, size, below, right;
} Frame;

static Frame frame_of_x(const Convolution *c) {
    long height = (c->OH - 1) * c->SH + (c->KH - 1) * c->DH + 1, width = (c->OW - 1) * c->SW + (c->KW - 1) * c->DW + 1;
    long below = c->H < height - c->PH ? c->H : height - c->PH, right = c->W < width - c->PW ? c->W : width - c->PW;
    return (Frame){width * c->C, height * width * c->C, below, right};
}

static void copy_to_frames(const Convolution *c, Frame f, long images, const real *x, real *frames) {
    copy_images(images, c->C, f.below, f.right, x, c->xb, c->xc, c->xh, c->xw, frames + c->PH * f.row + c->PW * c->C,
                f.size, 1, f.row, c->C);
}

/* Images whose channels lie next to each other. */
typedef struct {
    const real *from;
    long image, row, step;
} Pixels;

/* Images of y, which are copied to ``flat`` if their channels are elsewhere. */
static Pixels pixels_of_y(const Convolution *c, long images, const real *y, real *flat) {
    if (c->yc == 1 || c->O == 1) return (Pixels){y, c->yb, c->yh, c->yw};
    Pixels p = {flat, c->OH * c->OW * c->O, c->OW * c->O, c->O};
    copy_images(images, c->O, c->OH, c->OW, y, c->yb, c->yc, c->yh, c->yw, flat, p.image, 1, p.row, p.step);
    return p;
}

/* The number of vectors of the next tile, if ``columns`` columns are left. */
static long vectors_of(long columns) { return panel((columns + LANES - 1) / LANES * LANES) / LANES; }

static long padded_columns(long columns) { return (columns + LANES - 1) / LANES * LANES; }

/* The parts of the scratch memory of a convolution. */
typedef struct {
    long *at;
    real *lines, *bias, *held, *frames, *flat;
} Scratch;

/* ``inner`` products of each output, ``columns`` columns in tiles for all groups, and the numbers of all frames. */
static Scratch scratch_of(real *w, long inner, long groups, long columns, long frames) {
    Scratch s;
    s.at = (long *)w;
    s.lines = w + 2 * inner;
    s.bias = s.lines + groups * inner * padded_columns(columns);
    s.held = s.bias + groups * padded_columns(columns);
    s.frames = s.held + 12 * TILE_COLUMNS;
    s.flat = s.frames + frames + TILE_COLUMNS;
    return s;
}

/* y = convolution of x, plus bias (O) unless NULL. */
static void convolution(const int64_t *N, const real *x, const real *weight, const real *bias, real *y, real *w) {
    const Convolution *c = (const Convolution *)N;
    long inputs = c->C / c->groups, outputs = c->O / c->groups, inner = c->KH * c->KW * inputs;
    Frame f = frame_of_x(c);
    long row = f.row, frame = f.size, columns = padded_columns(outputs);
    Scratch s = scratch_of(w, inner, c->groups, outputs, c->block * frame);
    int is_last = c->yc == 1 || c->O == 1;
    /* outputs in another layout are first computed with channels last */
    long yb = is_last ? c->yb : c->OH * c->OW * c->O, yh = is_last ? c->yh : c->OW * c->O, yw = is_last ? c->yw : c->O;
    for (long a = 0; a < c->KH; a++)
        for (long b = 0; b < c->KW; b++)
            for (long i = 0; i < inputs; i++)
                s.at[(a * c->KW + b) * inputs + i] = a * c->DH * row + b * c->DW * c->C + i;
    memset(s.lines, 0, (c->groups * (inner + 1)) * columns * sizeof(real));
    for (long g = 0; g < c->groups; g++)
        for (long j = 0, vectors; j < outputs; j += vectors * LANES) {
            vectors = vectors_of(outputs - j);
            long wanted = outputs - j < vectors * LANES ? outputs - j : vectors * LANES;
            real *lines = s.lines + (g * columns + j) * inner;
            for (long o = 0; o < wanted; o++)
                for (long a = 0; a < c->KH; a++)
                    for (long b = 0; b < c->KW; b++)
                        for (long i = 0; i < inputs; i++)
                            lines[((a * c->KW + b) * inputs + i) * vectors * LANES + o] =
                                weight[(g * outputs + j + o) * c->wo + i * c->wi + a * c->wh + b * c->ww];
        }
    for (long o = 0; o < c->O && bias; o++) s.bias[o / outputs * columns + o % outputs] = bias[o];
    memset(s.frames, 0, (c->block * frame + TILE_COLUMNS) * sizeof(real));
    for (long b = 0, count; b < c->B; b += count) {
        count = c->B - b < c->block ? c->B - b : c->block;
        copy_to_frames(c, f, count, x + b * c->xb, s.frames);
        real *out = is_last ? y + b * yb : s.flat;
        for (long g = 0; g < c->groups; g++)
            for (long j = 0, vectors; j < outputs; j += vectors * LANES) {
                vectors = vectors_of(outputs - j);
                long wanted = outputs - j < vectors * LANES ? outputs - j : vectors * LANES;
                const real *lines = s.lines + (g * columns + j) * inner, *add = s.bias + g * columns + j;
                const real *from = s.frames + g * inputs;
                real *to = out + g * outputs + j;
                for (long h = 0; h < c->OH; h++)
                    if (c->block > 1) /* small images: a tile has the same pixel of several images */
                        for (long p = 0; p < c->OW; p++)
                            taps(wanted, vectors, count, inner, from + h * c->SH * row + p * c->SW * c->C, frame, s.at,
                                 lines, bias ? add : 0, to + h * yh + p * yw, yb, s.held);
                    else
                        taps(wanted, vectors, c->OW, inner, from + h * c->SH * row, c->SW * c->C, s.at, lines,
                             bias ? add : 0, to + h * yh, yw, s.held);
            }
        if (!is_last)
            copy_images(count, c->O, c->OH, c->OW, s.flat, yb, 1, yh, yw, y + b * c->yb, c->yb, c->yc, c->yh, c->yw);
    }
}

/* The gradient in x from the gradient in y; also the transposed convolution of y to x, plus bias (C)
   unless NULL.

   With a stride, the pixels of x form SH SW phases. All pixels of a phase use the same taps, and read
   neighboring pixels of y. */
static void convolution_below(const int64_t *N, const real *y, const real *weight, const real *bias, real *x, real *w) {
    const Convolution *c = (const Convolution *)N;
    long inputs = c->C / c->groups, outputs = c->O / c->groups, most = c->KH * c->KW * outputs;
    long before_h = (c->KH - 1) * c->DH / c->SH, before_w = (c->KW - 1) * c->DW / c->SW;
    long last_h = (c->H - 1 + c->PH) / c->SH, last_w = (c->W - 1 + c->PW) / c->SW;
    long row = (before_w + last_w + 1) * c->O, frame = (before_h + last_h + 1) * row, columns = padded_columns(inputs);
    long used_h = c->OH < last_h + 1 ? c->OH : last_h + 1, used_w = c->OW < last_w + 1 ? c->OW : last_w + 1;
    Scratch s = scratch_of(w, most, c->groups, inputs, c->block * frame);
    int is_last = c->xc == 1 || c->C == 1;
    long xb = is_last ? c->xb : c->H * c->W * c->C, xh = is_last ? c->xh : c->W * c->C, xw = is_last ? c->xw : c->C;
    for (long i = 0; i < c->C && bias; i++) s.bias[i / inputs * columns + i % inputs] = bias[i];
    memset(s.frames, 0, (c->block * frame + TILE_COLUMNS) * sizeof(real));
    for (long b = 0, count; b < c->B; b += count) {
        count = c->B - b < c->block ? c->B - b : c->block;
        copy_images(count, c->O, used_h, used_w, y + b * c->yb, c->yb, c->yc, c->yh, c->yw,
                    s.frames + before_h * row + before_w * c->O, frame, 1, row, c->O);
        real *out = is_last ? x + b * xb : s.flat, *lines = s.lines;
        for (long phase_h = 0; phase_h < c->SH; phase_h++)
            for (long phase_w = 0; phase_w < c->SW; phase_w++) {
                long inner = 0, first_h = c->PH > phase_h ? (c->PH - phase_h + c->SH - 1) / c->SH : 0;
                long first_w = c->PW > phase_w ? (c->PW - phase_w + c->SW - 1) / c->SW : 0;
                long end_h = (c->H - 1 + c->PH - phase_h + c->SH) / c->SH;
                long end_w = (c->W - 1 + c->PW - phase_w + c->SW) / c->SW;
                for (long a = 0; a < c->KH; a++)
                    for (long e = 0; e < c->KW; e++)
                        if ((a * c->DH - phase_h) % c->SH == 0 && (e * c->DW - phase_w) % c->SW == 0)
                            for (long o = 0; o < outputs; o++, inner++)
                                s.at[inner] = (phase_h - a * c->DH) / c->SH * row + (phase_w - e * c->DW) / c->SW * c->O + o;
                for (long g = 0; g < c->groups; g++)
                    for (long j = 0, vectors; j < inputs; j += vectors * LANES, lines += inner * vectors * LANES) {
                        vectors = vectors_of(inputs - j);
                        long wanted = inputs - j < vectors * LANES ? inputs - j : vectors * LANES, k = 0;
                        for (long a = 0; a < c->KH && b == 0; a++) /* once for all images */
                            for (long e = 0; e < c->KW; e++)
                                if ((a * c->DH - phase_h) % c->SH == 0 && (e * c->DW - phase_w) % c->SW == 0)
                                    for (long o = 0; o < outputs; o++, k += vectors * LANES)
                                        for (long i = 0; i < vectors * LANES; i++)
                                            lines[k + i] = i < wanted ? weight[(g * outputs + o) * c->wo + (j + i) * c->wi +
                                                                               a * c->wh + e * c->ww]
                                                                      : 0;
                        const real *add = bias ? s.bias + g * columns + j : 0;
                        for (long t = first_h; t < end_h; t++) {
                            const real *from = s.frames + (before_h + t) * row + (before_w + first_w) * c->O + g * outputs;
                            real *to = out + (t * c->SH + phase_h - c->PH) * xh + (first_w * c->SW + phase_w - c->PW) * xw +
                                       g * inputs + j;
                            if (c->block > 1)
                                for (long p = 0; p < end_w - first_w; p++)
                                    taps(wanted, vectors, count, inner, from + p * c->O, frame, s.at, lines, add,
                                         to + p * c->SW * xw, xb, s.held);
                            else
                                taps(wanted, vectors, end_w - first_w, inner, from, c->O, s.at, lines, add, to, c->SW * xw,
                                     s.held);
                        }
                    }
            }
        if (!is_last)
            copy_images(count, c->C, c->H, c->W, s.flat, xb, 1, xh, xw, x + b * c->xb, c->xb, c->xc, c->xh, c->xw);
    }
}

/* The gradient in the weights of a convolution with few input channels. The number of channels of y
   in a group is a multiple of LANES. */
static void few_weights(const Convolution *c, const real *y, const real *x, real *weight, real *w) {
    long inputs = c->C / c->groups, outputs = c->O / c->groups, all = c->KH * c->KW * inputs;
    Frame f = frame_of_x(c);
    long row = f.row, frame = f.size, total = c->O * all;
    long *at = (long *)w;
    real *sums = w + 2 * all, *frames = sums + total, *flat = frames + c->block * frame + TILE_COLUMNS;
    for (long a = 0; a < c->KH; a++)
        for (long e = 0; e < c->KW; e++)
            for (long i = 0; i < inputs; i++)
                at[(a * c->KW + e) * inputs + i] = a * c->DH * row + e * c->DW * c->C + i;
    memset(sums, 0, (total + c->block * frame + TILE_COLUMNS) * sizeof(real));
    for (long b = 0, count; b < c->B; b += count) {
        count = c->B - b < c->block ? c->B - b : c->block;
        copy_to_frames(c, f, count, x + b * c->xb, frames);
        Pixels above = pixels_of_y(c, count, y + b * c->yb, flat);
        for (long o = 0; o < c->O; o += LANES) {
            const real *from = frames + o / outputs * inputs;
            for (long i = 0, rows, left = (all + 11) / 12; i < all; i += rows, left--) {
                rows = (all - i + left - 1) / left;
                tap_weights((int)rows, c, count, from, frame, c->SH * row, c->SW * c->C, at + i, above.from + o,
                            above.image, above.row, above.step, sums + o * all + i * LANES);
            }
        }
    }
    for (long o = 0; o < c->O; o++)
        for (long a = 0; a < c->KH; a++)
            for (long e = 0; e < c->KW; e++)
                for (long i = 0; i < inputs; i++)
                    weight[o * c->wo + i * c->wi + a * c->wh + e * c->ww] =
                        sums[o / LANES * LANES * all + ((a * c->KW + e) * inputs + i) * LANES + o % LANES];
}

/* The gradient in the weights from x and the gradient in y. */
static void convolution_weights(const int64_t *N, const real *y, const real *x, real *weight, real *w) {
    const Convolution *c = (const Convolution *)N;
    long inputs = c->C / c->groups, outputs = c->O / c->groups;
    Frame f = frame_of_x(c);
    long row = f.row, frame = f.size;
    /* numbers of x that follow each other: those of a row of the kernel, if possible */
    int is_row = c->groups == 1 && c->DW == 1;
    long length = is_row ? c->KW * inputs : inputs, taps_w = is_row ? 1 : c->KW, runs = c->KH * taps_w;
    /* With few numbers in a row, most lanes would be empty: then the vectors have channels of y. */
    long all = c->KH * c->KW * inputs;
    if (outputs % LANES == 0 && 2 * all <= runs * padded_columns(length)) {
        few_weights(c, y, x, weight, w);
        return;
    }
    long columns = padded_columns(length), total = c->groups * runs * outputs * columns;
    real *sums = w, *frames = w + total, *flat = frames + c->block * frame + TILE_COLUMNS;
    memset(sums, 0, (total + c->block * frame + TILE_COLUMNS) * sizeof(real));
    for (long b = 0, count; b < c->B; b += count) {
        count = c->B - b < c->block ? c->B - b : c->block;
        copy_to_frames(c, f, count, x + b * c->xb, frames);
        Pixels above = pixels_of_y(c, count, y + b * c->yb, flat);
        for (long g = 0; g < c->groups; g++)
            for (long r = 0; r < runs; r++) {
                const real *from = frames + r / taps_w * c->DH * row + r % taps_w * c->DW * c->C + g * inputs;
                for (long j = 0, vectors; j < length; j += vectors * LANES) {
                    vectors = vectors_of(length - j);
                    long most = MOST_ROWS(vectors), left = (outputs + most - 1) / most;
                    for (long o = 0, rows; o < outputs; o += rows, left--) {
                        rows = (outputs - o + left - 1) / left;
                        const real *up = above.from + g * outputs + o, *line = from + j;
                        real *to = sums + ((g * runs + r) * outputs + o) * columns + j;
                        long x_row = c->SH * row, x_step = c->SW * c->C;
                        if (vectors == 1)
                            weights_of_1((int)rows, c, count, line, frame, x_row, x_step, up, above.image, above.row,
                                         above.step, to, columns);
                        if (vectors == 2)
                            weights_of_2((int)rows, c, count, line, frame, x_row, x_step, up, above.image, above.row,
                                         above.step, to, columns);
#if TILE_VECTORS == 3
                        if (vectors == 3)
                            weights_of_3((int)rows, c, count, line, frame, x_row, x_step, up, above.image, above.row,
                                         above.step, to, columns);
#endif
                    }
                }
            }
    }
    for (long g = 0; g < c->groups; g++)
        for (long o = 0; o < outputs; o++)
            for (long i = 0; i < inputs; i++)
                for (long a = 0; a < c->KH; a++)
                    for (long e = 0; e < c->KW; e++) {
                        long r = a * taps_w + (is_row ? 0 : e), column = is_row ? e * inputs + i : i;
                        weight[(g * outputs + o) * c->wo + i * c->wi + a * c->wh + e * c->ww] =
                            sums[((g * runs + r) * outputs + o) * columns + column];
                    }
}
