/* Convolutions of images with kernels of 3 x 3 and stride 1, and their gradients, with fewer products.

   A tile of 4 x 4 outputs reads 6 x 6 inputs. Both are transformed to 36 frequencies, and at each
   frequency the convolution is a product of matrices. For each pair of channels, a tile then takes 36
   products instead of 144. Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural
   Networks" (2015), F(4x4, 3x3). */

enum {
    TILE = 4,
    FREQUENCIES = 36,
    TILES_AT_ONCE = 32, /* the cache holds their frequencies (modules/kernels/convolutions.py) */
};

/* The matrices of the transforms, for one line of a tile: 6 inputs, 4 outputs from 6 frequencies and
   their gradient, and a line of 3 weights and its gradient. */
ALWAYS_INLINE void line_of_inputs(const vector d[6], vector to[6]) {
    vector even = d[4] - 4 * d[2], odd = d[3] - 4 * d[1], next = d[4] - d[2], step = 2 * (d[3] - d[1]);
    to[0] = 4 * d[0] - 5 * d[2] + d[4];
    to[1] = even + odd, to[2] = even - odd;
    to[3] = next + step, to[4] = next - step;
    to[5] = 4 * d[1] - 5 * d[3] + d[5];
}
ALWAYS_INLINE void line_of_outputs(const vector m[6], vector to[4]) {
    vector near = m[1] + m[2], far = m[3] + m[4], nearer = m[1] - m[2], farther = m[3] - m[4];
    to[0] = m[0] + near + far, to[1] = nearer + 2 * farther;
    to[2] = near + 4 * far, to[3] = nearer + 8 * farther + m[5];
}
ALWAYS_INLINE void line_of_outputs_slope(const vector y[4], vector to[6]) {
    vector even = y[0] + y[2], odd = y[1] + y[3], far = y[0] + 4 * y[2], farther = 2 * y[1] + 8 * y[3];
    to[0] = y[0], to[1] = even + odd, to[2] = even - odd;
    to[3] = far + farther, to[4] = far - farther, to[5] = y[3];
}
ALWAYS_INLINE void line_of_weights(const vector g[3], vector to[6]) {
    const real sixth = 1 / (real)6;
    vector outer = sixth * (g[0] + g[2]), middle = sixth * g[1], far = sixth * (g[0] / 4 + g[2]);
    to[0] = g[0] / 4, to[1] = -outer - middle, to[2] = middle - outer;
    to[3] = far + middle / 2, to[4] = far - middle / 2, to[5] = g[2];
}
ALWAYS_INLINE void line_of_weights_slope(const vector s[6], vector to[3]) {
    const real sixth = 1 / (real)6;
    vector near = sixth * (s[1] + s[2]), far = sixth * (s[3] + s[4]);
    to[0] = s[0] / 4 - near + far / 4;
    to[1] = sixth * (s[2] - s[1] + (s[3] - s[4]) / 2);
    to[2] = far - near + s[5];
}

/* Applies a transform ``line`` to the columns and then to the rows of ``n`` x ``n`` vectors, which
   become ``m`` x ``m``. Vector (h, w) is at h row + w step. */
#define TRANSFORM(name, line, n, m) \
    ALWAYS_INLINE void name(const real *from, long row, long step, real *to, long to_row, long to_step) { \
        vector half[m][n]; \
        _Pragma("GCC unroll 6") for (int w = 0; w < n; w++) { \
            vector column[n], result[m]; \
            _Pragma("GCC unroll 6") for (int h = 0; h < n; h++) \
                column[h] = *(const vector *)(from + h * row + w * step); \
            line(column, result); \
            _Pragma("GCC unroll 6") for (int h = 0; h < m; h++) half[h][w] = result[h]; \
        } \
        _Pragma("GCC unroll 6") for (int h = 0; h < m; h++) { \
            vector result[m]; \
            line(half[h], result); \
            _Pragma("GCC unroll 6") for (int w = 0; w < m; w++) \
                *(vector *)(to + h * to_row + w * to_step) = result[w]; \
        } \
    }
TRANSFORM(inputs_to_frequencies, line_of_inputs, 6, 6)
TRANSFORM(outputs_from_frequencies, line_of_outputs, 6, 4)
TRANSFORM(outputs_to_frequencies, line_of_outputs_slope, 4, 6)
TRANSFORM(weights_to_frequencies, line_of_weights, 3, 6)
TRANSFORM(weights_from_frequencies, line_of_weights_slope, 6, 3)

/* The tiles of the outputs of a convolution. The frames of its inputs hold whole tiles.

   ``inputs`` and ``outputs`` are channels, padded to vectors. Tensors (frequency, tile, channel) have
   ``below`` and ``above`` numbers per frequency. These are not powers of two, because the frequencies
   of a tile would then all map to the same places of the cache. */
typedef struct {
    long across, of_image, inputs, outputs, below, above;
    Frame frame;
} Tiles;

static Tiles tiles_of(const Convolution *c) {
    long down = (c->OH + TILE - 1) / TILE, across = (c->OW + TILE - 1) / TILE;
    long height = TILE * down + 2, width = TILE * across + 2;
    long below = c->H < height - c->PH ? c->H : height - c->PH, right = c->W < width - c->PW ? c->W : width - c->PW;
    Frame frame = {width * c->C, height * width * c->C, below, right};
    long inputs = padded_columns(c->C), outputs = padded_columns(c->O), line = 64 / sizeof(real);
    return (Tiles){across, down * across, inputs, outputs, TILES_AT_ONCE * inputs + line,
                   TILES_AT_ONCE * outputs + line, frame};
}

/* The place of tile ``n`` in images. */
static long place_of_tile(Tiles t, long n, long image, long row, long step) {
    long rest = n % t.of_image;
    return n / t.of_image * image + rest / t.across * TILE * row + rest % t.across * TILE * step;
}

/* The frequencies of the inputs of tiles ``begin`` to ``begin`` + ``count``: (frequency, tile, channel). */
static void frequencies_of_inputs(Tiles t, long channels, const real *frames, long begin, long count, real *to) {
    for (long n = 0; n < count; n++, to += t.inputs) {
        const real *from = frames + place_of_tile(t, begin + n, t.frame.size, t.frame.row, channels);
        for (long k = 0; k < t.inputs; k += LANES)
            inputs_to_frequencies(from + k, t.frame.row, channels, to + k, 6 * t.below, t.below);
    }
}

/* The frequencies of all weights: (frequency, input channel, output channel). ``lines`` is scratch
   memory for the weights. */
static void frequencies_of_weights(const Convolution *c, Tiles t, const real *weight, real *lines, real *to) {
    long apart = c->C * t.outputs;
    for (long tap = 0; tap < 9; tap++) {
        const real *from = weight + tap / 3 * c->wh + tap % 3 * c->ww;
        for (long i = 0; i < c->C; i++)
            for (long o = 0; o < t.outputs; o++)
                lines[tap * apart + i * t.outputs + o] = o < c->O ? from[o * c->wo + i * c->wi] : 0;
    }
    for (long k = 0; k < apart; k += LANES)
        weights_to_frequencies(lines + k, 3 * apart, apart, to + k, 6 * apart, apart);
}

/* Writes a part of a tile's outputs (TILE, TILE, LANES), plus bias unless NULL. */
static void write_part(const real *outputs, long channels, long height, long width, const real *bias, real *y, long row,
                       long step) {
    for (long h = 0; h < height; h++)
        for (long w = 0; w < width; w++)
            for (long k = 0; k < channels; k++)
                y[h * row + w * step + k] = outputs[(TILE * h + w) * LANES + k] + (bias ? bias[k] : 0);
}

/* Outputs of tiles ``begin`` to ``begin`` + ``count`` from their frequencies, plus bias unless NULL. */
static void write_tiles(const Convolution *c, Tiles t, const real *from, long begin, long count, const real *bias,
                        real *y, long image, long row, long step) {
    for (long n = 0; n < count; n++, from += t.outputs) {
        long rest = (begin + n) % t.of_image, below = c->OH - rest / t.across * TILE, right = c->OW - rest % t.across * TILE;
        real *to = y + place_of_tile(t, begin + n, image, row, step);
        for (long o = 0; o < c->O; o += LANES) {
            long channels = c->O - o < LANES ? c->O - o : LANES;
            if (below >= TILE && right >= TILE && channels == LANES && !bias) {
                outputs_from_frequencies(from + o, 6 * t.above, t.above, to + o, row, step);
                continue;
            }
            real part[TILE * TILE * LANES];
            outputs_from_frequencies(from + o, 6 * t.above, t.above, part, TILE * LANES, LANES);
            write_part(part, channels, below < TILE ? below : TILE, right < TILE ? right : TILE, bias ? bias + o : 0,
                       to + o, row, step);
        }
    }
}

/* y = convolution of x, plus bias (O) unless NULL. */
static void winograd_of(const Convolution *c, const real *x, const real *weight, const real *bias, real *y, real *w) {
    Tiles t = tiles_of(c);
    long weights = c->C * t.outputs;
    real *lines = w, *filters = lines + 9 * weights, *below = filters + FREQUENCIES * weights;
    real *above = below + FREQUENCIES * t.below, *shift = above + FREQUENCIES * t.above, *frames = shift + t.outputs;
    real *flat = frames + c->block * t.frame.size + LANES;
    int is_last = c->yc == 1 || c->O == 1;
    long yb = is_last ? c->yb : c->OH * c->OW * c->O, yh = is_last ? c->yh : c->OW * c->O, yw = is_last ? c->yw : c->O;
    frequencies_of_weights(c, t, weight, lines, filters);
    if (bias) memcpy(shift, bias, c->O * sizeof(real));
    memset(frames, 0, (c->block * t.frame.size + LANES) * sizeof(real));
    for (long b = 0, images; b < c->B; b += images) {
        images = c->B - b < c->block ? c->B - b : c->block;
        copy_to_frames(c, t.frame, images, x + b * c->xb, frames);
        real *out = is_last ? y + b * yb : flat;
        for (long begin = 0, end = images * t.of_image, count; begin < end; begin += count) {
            count = end - begin < TILES_AT_ONCE ? end - begin : TILES_AT_ONCE;
            frequencies_of_inputs(t, c->C, frames, begin, count, below);
            for (long q = 0; q < FREQUENCIES; q++)
                matrix_product(count, t.outputs, c->C, below + q * t.below, t.inputs, 1, filters + q * weights, t.outputs,
                               1, 0, 0, above + q * t.above, t.outputs, 0);
            write_tiles(c, t, above, begin, count, bias ? shift : 0, out, yb, yh, yw);
        }
        if (!is_last)
            copy_images(images, c->O, c->OH, c->OW, flat, yb, 1, yh, yw, y + b * c->yb, c->yb, c->yc, c->yh, c->yw);
    }
}

static void winograd(const int64_t *N, const real *x, const real *weight, const real *bias, real *y, real *w) {
    winograd_of((const Convolution *)N, x, weight, bias, y, w);
}

/* The gradient in x from the gradient in y; also the transposed convolution of y to x, plus bias (C)
   unless NULL. It is the convolution of y with the reversed kernel. */
static void winograd_below(const int64_t *N, const real *y, const real *weight, const real *bias, real *x, real *w) {
    const Convolution *c = (const Convolution *)N;
    Convolution back = {
        .B = c->B, .C = c->O, .H = c->OH, .W = c->OW, .O = c->C, .OH = c->H, .OW = c->W, .PH = 2 - c->PH, .PW = 2 - c->PW,
        .xb = c->yb, .xc = c->yc, .xh = c->yh, .xw = c->yw, .yb = c->xb, .yc = c->xc, .yh = c->xh, .yw = c->xw,
        .wo = c->wi, .wi = c->wo, .wh = -c->wh, .ww = -c->ww, .block = c->block,
    };
    winograd_of(&back, y, weight + 2 * c->wh + 2 * c->ww, bias, x, w);
}

/* The gradient in the weights from x and the gradient in y. */
static void winograd_weights(const int64_t *N, const real *y, const real *x, real *weight, real *w) {
    const Convolution *c = (const Convolution *)N;
    Tiles t = tiles_of(c);
    long weights = c->C * t.outputs;
    real *lines = w, *sums = lines + 9 * weights, *below = sums + FREQUENCIES * weights;
    real *above = below + FREQUENCIES * t.below, *frames = above + FREQUENCIES * t.above;
    real *whole = frames + c->block * t.frame.size + LANES;
    /* Tiles read y itself if it has whole tiles of whole vectors. */
    int is_whole = c->yc == 1 && c->O % LANES == 0 && c->OH % TILE == 0 && c->OW % TILE == 0;
    long yw = is_whole ? c->yw : c->O, yh = is_whole ? c->yh : TILE * t.across * c->O;
    long yb = is_whole ? c->yb : t.of_image * TILE * TILE * c->O;
    memset(sums, 0, FREQUENCIES * weights * sizeof(real));
    memset(frames, 0, (c->block * t.frame.size + LANES) * sizeof(real));
    if (!is_whole) memset(whole, 0, (c->block * yb + LANES) * sizeof(real));
    for (long b = 0, images; b < c->B; b += images) {
        images = c->B - b < c->block ? c->B - b : c->block;
        copy_to_frames(c, t.frame, images, x + b * c->xb, frames);
        const real *gradient = y + b * c->yb;
        if (!is_whole) {
            copy_images(images, c->O, c->OH, c->OW, gradient, c->yb, c->yc, c->yh, c->yw, whole, yb, 1, yh, yw);
            gradient = whole;
        }
        for (long begin = 0, end = images * t.of_image, count; begin < end; begin += count) {
            count = end - begin < TILES_AT_ONCE ? end - begin : TILES_AT_ONCE;
            frequencies_of_inputs(t, c->C, frames, begin, count, below);
            for (long n = 0; n < count; n++)
                for (long o = 0; o < t.outputs; o += LANES)
                    outputs_to_frequencies(gradient + place_of_tile(t, begin + n, yb, yh, yw) + o, yh, yw,
                                           above + n * t.outputs + o, 6 * t.above, t.above);
            /* (tiles, inputs)' (tiles, outputs) */
            for (long q = 0; q < FREQUENCIES; q++)
                matrix_product(c->C, t.outputs, count, below + q * t.below, 1, t.inputs, above + q * t.above, t.outputs,
                               1, sums + q * weights, t.outputs, sums + q * weights, t.outputs, 0);
        }
    }
    for (long k = 0; k < weights; k += LANES)
        weights_from_frequencies(sums + k, 6 * weights, weights, lines + k, 3 * weights, weights);
    for (long tap = 0; tap < 9; tap++)
        for (long i = 0; i < c->C; i++)
            for (long o = 0; o < c->O; o++)
                weight[o * c->wo + i * c->wi + tap / 3 * c->wh + tap % 3 * c->ww] =
                    lines[tap * weights + i * t.outputs + o];
}
