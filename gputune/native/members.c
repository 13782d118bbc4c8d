/* The training of whole members, each on its own, for one epoch: forward, backward and update of a small network
   whose parameters, moments and activations stay in one core's cache from the first step of the epoch to the last.

   Axes: F folds, C trials, D inputs, H width, K outputs, n rows. Members do not share anything that is written, so
   their numbers do not depend on how many there are, nor on the threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef DOUBLE
typedef double real;
#define root sqrt
#else
typedef float real;
#define root sqrtf
#endif

#include "product.h"
#include "functions.h"
#include "update.h"

#define MOST_LAYERS 64
#define PAD 16            /* columns come in whole vectors of any width */
#define SCORED_ROWS 64    /* validation rows at a time: their activations stay in the cache */
#define GRADIENT 4096     /* numbers of a gradient between its product and its use */

/* What is to be done, for all members: laid out as gputune.native.work.Work. */
typedef struct {
    int64_t folds, trials, inputs, width, outputs, layers, activation, optimizer, classes;
    int64_t rows;                 /* n of the data */
    int64_t epoch, horizon;       /* epochs done, and epochs of a schedule */
    const real *x;                /* (V, n, D) */
    const int64_t *copies;        /* (F): V of a fold */
    const void *y;                /* (n) codes, or (F, n) values */
    const double *weights;        /* (F, n) or NULL */
    const real *present;          /* (F, K) */
    const int64_t *order;         /* (F, longest fold): rows of the data as they are read in this epoch */
    const int64_t *lengths;       /* (F): rows of each fold */
    int64_t longest;
    const int64_t *widths, *sizes, *cosine;           /* (C) */
    const double *lr, *decay, *momentum, *dropout;    /* (C) */
    const float *draws;           /* of dropout, one after another; NULL: none */
    const int64_t *draw_start;    /* (steps): where those of a step begin */
    const int64_t *draw_rows;     /* (steps): how many rows they are for, in each layer */
    real *theta, *first, *second; /* flat buffers; the moments may be NULL */
    const int64_t *valid;         /* validation rows of all folds */
    const int64_t *valid_start;   /* (F + 1) */
    real *scored;                 /* outputs on them, (C, m, K) fold after fold; NULL: none */
    double *accuracy;             /* (F, C) on them, NaN where an output is not finite; NULL: none */
    int64_t *nanoseconds;         /* (2): of training and of scoring, added up over members */
    const int64_t *queue;         /* (F C): members p = f C + c in the order in which they are taken */
} Work;

typedef struct {
    long in, out, row;            /* true sizes, and the length of a row of the weight: out and its padding */
    real *weight[3], *bias[3];    /* of the parameters and of both moments; weights in panels of padded(in) rows */
} Layer;

typedef struct {
    int layers, roles;
    Layer layer[MOST_LAYERS];
    real *state, *end;                              /* of what is copied in and out */
    real *h[MOST_LAYERS + 1], *z[MOST_LAYERS + 1];  /* input of each layer, and what it was before the activation */
    real *kept[MOST_LAYERS + 1];                    /* what dropout multiplies it by */
    real *slope, *below, *turned, *packed, *gradient, *share, *work;
    int64_t *codes;
} Space;

static long padded(long n) { return (n + PAD - 1) / PAD * PAD; }
static long most(long a, long b) { return a > b ? a : b; }

/* Give every tensor of a member its place in one block of memory that begins at ``at``, and return its end. From 0 that
   is the size of the block. */
static real *lay_out(const Work *w, Space *s, real *at) {
    long rows = SCORED_ROWS, widest = padded(w->inputs), hidden = padded(w->width);
    for (long c = 0; c < w->trials; c++) rows = most(rows, w->sizes[c]);
    s->layers = (int)w->layers;
    s->roles = w->second ? 3 : w->first ? 2 : 1;
    s->state = at;
    for (int role = 0; role < s->roles; role++)
        for (int l = 0; l < s->layers; l++) {
            long row = l + 1 < s->layers ? hidden : padded(w->outputs), in = padded(l ? hidden : w->inputs);
            widest = most(widest, row);
            s->layer[l].weight[role] = at, at += in * row;
            s->layer[l].bias[role] = at, at += row;
        }
    s->end = at;
    int apart = w->activation != RELU; /* whose slope can be told from h, even where dropout has scaled it */
    for (int l = 0; l <= s->layers; l++) {
        s->h[l] = at, at += rows * widest;
        s->z[l] = s->h[l];
        s->kept[l] = 0;
        if (apart && l > 0 && l < s->layers) s->z[l] = at, at += rows * hidden;
        if (w->draws && l > 0 && l < s->layers) s->kept[l] = at, at += rows * hidden;
    }
    s->slope = at, at += rows * widest;
    s->below = at, at += rows * widest;
    s->turned = at, at += TILE_COLUMNS * most(hidden, padded(w->outputs));
    s->packed = at, at += TILE_COLUMNS * rows;
    s->gradient = at, at += most(GRADIENT, widest);
    s->share = at, at += padded(rows);
    s->work = at, at += padded((w->outputs + 2) * rows);
    s->codes = (int64_t *)at;
    return at + rows * (long)(sizeof(int64_t) / sizeof(real));
}

/* Copy row i of a layer's weight from where it lies flat, or back. */
static void move_row(const Layer *layer, int role, long i, real *flat, int back) {
    for (long j = 0; j < layer->out; j += panel(layer->row - j)) {
        long width = panel(layer->row - j), count = layer->out - j < width ? layer->out - j : width;
        real *own = layer->weight[role] + j * padded(layer->in) + i * width;
        if (back) memcpy(flat + j, own, count * sizeof(real));
        else memcpy(own, flat + j, count * sizeof(real));
    }
}

/* Copy one member from the flat buffers, or back: weight0 (F, D, C, H), bias0 (F, C, H), the others (F, C, in, out). */
static void move(const Work *w, Space *s, long f, long c, int back) {
    real *from[3] = {w->theta, w->first, w->second};
    long hidden = w->widths[c];
    if (!back) memset(s->state, 0, (char *)s->end - (char *)s->state);
    for (int role = 0; role < s->roles; role++) {
        real *block = from[role];
        for (int l = 0; l < s->layers; l++) {
            int last = l + 1 == s->layers;
            long wide = last ? w->outputs : w->width, in = l ? w->width : w->inputs;
            Layer *layer = &s->layer[l];
            layer->in = l ? hidden : w->inputs, layer->out = last ? w->outputs : hidden, layer->row = padded(layer->out);
            for (long i = 0; i < layer->in; i++) {
                long at = l ? (f * w->trials + c) * in + i : (f * in + i) * w->trials + c;
                move_row(layer, role, i, block + at * wide, back);
            }
            real *flat = block + w->folds * w->trials * in * wide + (f * w->trials + c) * wide;
            if (back) memcpy(flat, layer->bias[role], layer->out * sizeof(real));
            else memcpy(layer->bias[role], flat, layer->out * sizeof(real));
            block += w->folds * w->trials * (in + 1) * wide;
        }
    }
}

static void gather(const Work *w, long f, const int64_t *which, long rows, real *x) {
    const real *all = w->x + w->copies[f] * w->rows * w->inputs;
    for (long i = 0; i < rows; i++) memcpy(x + i * w->inputs, all + which[i] * w->inputs, w->inputs * sizeof(real));
}

/* Fill what dropout multiplies by: 1 / (1 - rate) where a unit stays, which is where its draw reaches the rate. */
static void drop(const Work *w, Space *s, long c, long step, long rows) {
    real rate = (real)w->dropout[c], kept = 1 / (1 - rate);
    for (int l = 1; l < s->layers; l++) {
        const float *draws = w->draws + w->draw_start[step] + (l - 1) * w->draw_rows[step] * w->width;
        long row = s->layer[l - 1].row, hidden = s->layer[l - 1].out;
        for (long i = 0; i < rows; i++)
            for (long j = 0; j < row; j++)
                s->kept[l][i * row + j] = j < hidden && (real)draws[i * w->width + j] >= rate ? kept : 0;
    }
}

/* h[0] (rows, D) -> outputs in h[layers]. */
static void forward(const Work *w, Space *s, long rows, int dropping) {
    for (int l = 0; l < s->layers; l++) {
        Layer *layer = &s->layer[l];
        int last = l + 1 == s->layers;
        long across = l ? s->layer[l - 1].row : w->inputs, n = rows * layer->row;
        real *z = s->z[l + 1], *h = s->h[l + 1];
        product(rows, layer->row, layer->in, s->h[l], across, 1, layer->weight[0], padded(layer->in), layer->bias[0], z,
                layer->row);
        if (!last) activate(w->activation, n, z, h);
        if (!last && dropping)
            for (long i = 0; i < n; i++) h[i] *= s->kept[l + 1][i];
    }
}

/* The slope in the outputs, which it replaces. */
static void loss_slope(const Work *w, Space *s, long f, const int64_t *which, long rows) {
    const Layer *last = &s->layer[s->layers - 1];
    double total = 0;
    for (long i = 0; i < rows; i++) total += w->weights ? w->weights[f * w->rows + which[i]] : 1;
    total = total > 2.2250738585072014e-308 ? total : 2.2250738585072014e-308;
    for (long i = 0; i < rows; i++)
        s->share[i] = (real)((w->weights ? w->weights[f * w->rows + which[i]] : 1) / total);
    real *z = s->h[s->layers];
    if (!w->classes) {
        const real *y = (const real *)w->y + f * w->rows;
        for (long i = 0; i < rows; i++) z[i * last->row] = 2 * (z[i * last->row] - y[which[i]]) * s->share[i];
        return;
    }
    for (long i = 0; i < rows; i++) s->codes[i] = ((const int64_t *)w->y)[which[i]];
    cross_entropy_slope(rows, w->outputs, z, last->row, w->present + f * w->outputs, s->codes, s->share, s->work);
}

/* Columns j and after of the slopes (rows, row), as a panel. */
static const real *pack(const Space *s, const real *slope, long rows, long row, long j, long width) {
    if (width == row) return slope;
    for (long i = 0; i < rows; i++) memcpy(s->packed + i * width, slope + i * row + j, width * sizeof(real));
    return s->packed;
}

/* Take a layer's step from the slope (rows, row) in what it gives, a part of the weight at a time. */
static void descend(Layer *layer, Space *s, Rates by, const real *h, long across, const real *slope, long rows) {
    for (long j = 0; j < layer->row; j += panel(layer->row - j)) {
        long width = panel(layer->row - j), count = GRADIENT / width / TILE_ROWS * TILE_ROWS;
        const real *own = pack(s, slope, rows, layer->row, j, width);
        for (long i = 0; i < layer->in; i += count) {
            long some = layer->in - i < count ? layer->in - i : count, at = j * padded(layer->in) + i * width;
            product(some, width, rows, h + i, 1, across, own, rows, 0, s->gradient, width);
            update(by, some * width, layer->weight[0] + at, s->roles > 1 ? layer->weight[1] + at : 0,
                   s->roles > 2 ? layer->weight[2] + at : 0, s->gradient);
        }
    }
    memset(s->gradient, 0, layer->row * sizeof(real));
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < layer->row; j++) s->gradient[j] += slope[i * layer->row + j];
    update(by, layer->row, layer->bias[0], s->roles > 1 ? layer->bias[1] : 0, s->roles > 2 ? layer->bias[2] : 0,
           s->gradient);
}

/* b (columns, rows) = a (rows, columns) transposed, block by block: whole lines of the cache are read and written. */
static void transpose(long rows, long columns, const real *restrict a, real *restrict b) {
    for (long j = 0; j < columns; j += LANES)
        for (long i = 0; i < rows; i += LANES) {
            real block[LANES][LANES];
            for (long p = 0; p < LANES; p++)
                for (long q = 0; q < LANES; q++) block[q][p] = a[(i + p) * columns + j + q];
            for (long q = 0; q < LANES; q++)
                for (long p = 0; p < LANES; p++) b[(j + q) * rows + i + p] = block[q][p];
        }
}

/* The slope in what a layer is given, (rows, row), from that in what it gives; a part of the columns at a time. */
static void slope_back(const Layer *layer, const Space *s, const real *slope, long rows, real *below, long row) {
    for (long j = 0; j < row; j += panel(row - j)) {
        long width = panel(row - j);
        for (long k = 0; k < layer->row; k += panel(layer->row - k)) {
            long across = panel(layer->row - k);
            transpose(width, across, layer->weight[0] + k * row + j * across, s->turned + k * width);
        }
        product(rows, width, layer->out, slope, layer->row, 1, s->turned, layer->row, 0, below + j, row);
    }
}

static void backward(const Work *w, Space *s, Rates by, long rows, int dropping) {
    real *slope = s->h[s->layers], *below = s->slope;
    for (int l = s->layers - 1; l >= 0; l--) {
        Layer *layer = &s->layer[l];
        if (l > 0) /* with the weights as they were before the step */
            slope_back(layer, s, slope, rows, below, s->layer[l - 1].row);
        descend(layer, s, by, s->h[l], l ? s->layer[l - 1].row : w->inputs, slope, rows);
        if (l > 0) {
            long n = rows * s->layer[l - 1].row;
            if (dropping)
                for (long i = 0; i < n; i++) below[i] *= s->kept[l][i];
            slope_below(w->activation, n, below, s->z[l], s->h[l]);
            slope = below;
            below = slope == s->slope ? s->below : s->slope;
        }
    }
}

static real held(double value) {
#ifdef DOUBLE
    const double largest = 1.7976931348623157e308;
#else
    const double largest = 3.4028234663852886e38;
#endif
    return (real)(value > largest ? largest : value < -largest ? -largest : value);
}

/* The numbers of step ``count``, from 1, of ``total`` steps of the schedule. */
static Rates rates(const Work *w, long c, double count, double total) {
    double factor = w->cosine[c] ? 0.5 * (1 + cos(3.14159265358979323846 * (count - 1) / total)) : 1;
    double lr = w->lr[c] * factor, decay = w->decay[c];
    Rates by = {w->optimizer, held(lr), 0, held(decay), held(w->momentum[c]), 0};
    if (w->optimizer == ADAMW) by.shrink = held(lr * decay), by.l2 = 0;
    if (w->optimizer >= ADAM) {
        double corrected = sqrt(1 - pow(0.999, count));
        by.rate = held(lr * corrected / (1 - pow(0.9, count)));
        by.epsilon = (real)(1e-8 * corrected);
    }
    return by;
}

/* Whether the largest output, of several the first, is that of the label; -1 where one is not finite. */
static int hits(const Work *w, long f, const real *z, int64_t label) {
    const real *present = w->present + f * w->outputs;
    long best = -1;
    for (long k = 0; k < w->outputs; k++) {
        if (present[k] == 0) continue;
        if (z[k] - z[k] != 0) return -1;
        if (best < 0 || z[k] > z[best]) best = k;
    }
    return best == label;
}

static void score(const Work *w, Space *s, long f, long c) {
    long count = w->valid_start[f + 1] - w->valid_start[f], row = s->layer[s->layers - 1].row;
    const int64_t *which = w->valid + w->valid_start[f];
    long right = 0, broken = 0;
    for (long at = 0; at < count; at += SCORED_ROWS) {
        long rows = count - at < SCORED_ROWS ? count - at : SCORED_ROWS;
        gather(w, f, which + at, rows, s->h[0]);
        forward(w, s, rows, 0);
        for (long i = 0; i < rows; i++) {
            const real *z = s->h[s->layers] + i * row;
            if (w->scored) {
                real *out = w->scored + w->outputs * (w->trials * w->valid_start[f] + c * count);
                memcpy(out + (at + i) * w->outputs, z, w->outputs * sizeof(real));
            } else {
                int hit = hits(w, f, z, ((const int64_t *)w->y)[which[at + i]]);
                right += hit > 0, broken += hit < 0;
            }
        }
    }
    if (w->accuracy) w->accuracy[f * w->trials + c] = broken ? NAN : (double)right / count;
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void train_member(const Work *w, Space *s, long f, long c, const int32_t *stop) {
    int64_t begin = now();
    long n = w->lengths[f], size = w->sizes[c] < n ? w->sizes[c] : n, steps = (n + size - 1) / size;
    int dropping = w->draws && w->dropout[c] > 0;
    move(w, s, f, c, 0);
    for (long step = 0; step < steps && !__atomic_load_n(stop, __ATOMIC_RELAXED); step++) {
        const int64_t *which = w->order + f * w->longest + step * size;
        long rows = n - step * size < size ? n - step * size : size;
        gather(w, f, which, rows, s->h[0]);
        if (dropping) drop(w, s, c, step, rows);
        forward(w, s, rows, dropping);
        loss_slope(w, s, f, which, rows);
        backward(w, s, rates(w, c, (double)w->epoch * steps + step + 1, (double)w->horizon * steps), rows, dropping);
    }
    move(w, s, f, c, 1);
    int64_t trained = now();
    if (w->scored || w->accuracy) score(w, s, f, c);
    __atomic_fetch_add(w->nanoseconds, trained - begin, __ATOMIC_RELAXED);
    __atomic_fetch_add(w->nanoseconds + 1, now() - trained, __ATOMIC_RELAXED);
}

/* Train the members of the queue that nobody has taken yet: several threads may call this with one ``next``.

   Returns 0, or 1 where there is no memory to work in. Ends early, with members half trained, once ``stop`` is set. */
int train_members(const Work *w, int64_t *next, const int32_t *stop) {
    Space space;
    real *end = lay_out(w, &space, 0);
    void *memory = 0;
    if (posix_memalign(&memory, 64, (size_t)end + 64)) return 1;
    memset(memory, 0, (size_t)end);
    lay_out(w, &space, memory);
    for (;;) {
        int64_t at = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (at >= w->folds * w->trials || __atomic_load_n(stop, __ATOMIC_RELAXED)) break;
        train_member(w, &space, w->queue[at] / w->trials, w->queue[at] % w->trials, stop);
    }
    free(memory);
    return 0;
}
