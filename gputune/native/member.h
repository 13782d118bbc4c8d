/* One member: its tensors, their places in a separate block of memory, the copies in and out, and
   its step. A step is: forward, the gradient of the loss, backward, and the update of each layer as
   soon as its gradient is computed.

   Axes: F folds, C trials, D inputs, H width, K outputs, n rows of the data or of the minibatch. */

#define MOST_LAYERS 64
#define PAD 16            /* columns are padded to whole vectors, for any vector width */
#define SCORED_ROWS 64    /* validation rows at a time, so that their activations stay in the cache */
#define GRADIENT 4096     /* numbers of a gradient that are held between its product and its use */
#define ROLES 4           /* the parameters, two moments, and the average of the parameters */

typedef struct {
    long in, out, row;            /* true sizes, and the length of a row of the weight: out and its padding */
    real *weight[ROLES], *bias[ROLES]; /* of each role; NULL: none; weights are in panels of padded(in) rows */
} Layer;

typedef struct {
    int layers;
    Layer layer[MOST_LAYERS];
    real *state, *average, *end;                    /* the memory that is copied; the average is its end */
    real *h[MOST_LAYERS + 1], *z[MOST_LAYERS + 1];  /* input of each layer, and the same before the activation */
    real *kept[MOST_LAYERS + 1];                    /* dropout's factors on h */
    real *upper, *below, *turned, *packed, *gradient, *share, *work; /* upper, below: gradients in activations */
    int64_t *codes;
} Space;

static long padded(long n) { return (n + PAD - 1) / PAD * PAD; }
static long most(long a, long b) { return a > b ? a : b; }

/* The flat buffer of a role; NULL if there is none. */
static real *flat_of(const Work *w, int role) {
    real *flat[ROLES] = {w->theta, w->first, w->second, w->average};
    return flat[role];
}

/* Give every tensor of a member its place in one block of memory that begins at ``at``, and return
   the block's end. If ``at`` is 0, the end is the size of the block. */
static real *lay_out(const Work *w, Space *s, real *at) {
    long rows = SCORED_ROWS, widest = padded(w->inputs), hidden = padded(w->width);
    for (long c = 0; c < w->trials; c++) rows = most(rows, w->sizes[c]);
    s->layers = (int)w->layers;
    s->state = at;
    for (int role = 0; role < ROLES; role++) {
        if (role == ROLES - 1) s->average = at;
        for (int l = 0; l < s->layers; l++) {
            s->layer[l].weight[role] = s->layer[l].bias[role] = 0;
            if (!flat_of(w, role)) continue;
            long row = l + 1 < s->layers ? hidden : padded(w->outputs), in = padded(l ? hidden : w->inputs);
            widest = most(widest, row);
            s->layer[l].weight[role] = at, at += in * row;
            s->layer[l].bias[role] = at, at += row;
        }
    }
    s->end = at;
    for (int l = 0; l <= s->layers; l++) {
        s->h[l] = at, at += rows * widest;
        s->z[l] = s->h[l];
        s->kept[l] = 0;
        if (l == 0 || l == s->layers) continue;
        /* relu's gradient follows from h, even after dropout; the others also need z */
        if (w->activations[l - 1] != RELU) s->z[l] = at, at += rows * hidden;
        if (w->draws) s->kept[l] = at, at += rows * hidden;
    }
    s->upper = at, at += rows * widest;
    s->below = at, at += rows * widest;
    s->turned = at, at += TILE_COLUMNS * most(hidden, padded(w->outputs));
    s->packed = at, at += TILE_COLUMNS * rows;
    s->gradient = at, at += most(GRADIENT, widest);
    s->share = at, at += padded(rows);
    s->work = at, at += padded((w->outputs + 2) * rows);
    s->codes = (int64_t *)at;
    return at + rows * (long)(sizeof(int64_t) / sizeof(real));
}

/* Copy row i of a layer's weight from the flat buffer, or to it if ``storing``. */
static void copy_row(const Layer *layer, int role, long i, real *flat, int storing) {
    for (long j = 0; j < layer->out; j += panel(layer->row - j)) {
        long width = panel(layer->row - j), count = layer->out - j < width ? layer->out - j : width;
        real *part = layer->weight[role] + j * padded(layer->in) + i * width;
        if (storing) memcpy(flat + j, part, count * sizeof(real));
        else memcpy(part, flat + j, count * sizeof(real));
    }
}

/* Copy one member from the flat buffers, or to them: weight0 (F, D, C, H), bias0 (F, C, H), the others (F, C, in, out). */
static void copy_member(const Work *w, Space *s, long f, long c, int storing) {
    const int64_t *hidden = w->widths + c * (w->layers - 1);
    for (int role = 0; role < ROLES; role++) {
        real *block = flat_of(w, role);
        for (int l = 0; block && l < s->layers; l++) {
            int last = l + 1 == s->layers;
            long wide = last ? w->outputs : w->width, in = l ? w->width : w->inputs;
            Layer *layer = &s->layer[l];
            layer->in = l ? hidden[l - 1] : w->inputs, layer->out = last ? w->outputs : hidden[l];
            layer->row = padded(layer->out);
            for (long i = 0; i < layer->in; i++) {
                long at = l ? (f * w->trials + c) * in + i : (f * in + i) * w->trials + c;
                copy_row(layer, role, i, block + at * wide, storing);
            }
            real *flat = block + w->folds * w->trials * in * wide + (f * w->trials + c) * wide;
            if (storing) memcpy(flat, layer->bias[role], layer->out * sizeof(real));
            else memcpy(layer->bias[role], flat, layer->out * sizeof(real));
            block += w->folds * w->trials * (in + 1) * wide;
        }
    }
}

static void load_member(const Work *w, Space *s, long f, long c) {
    memset(s->state, 0, (char *)s->end - (char *)s->state);
    copy_member(w, s, f, c, 0);
}

static void store_member(const Work *w, Space *s, long f, long c) { copy_member(w, s, f, c, 1); }

/* Copy the rows ``which`` of a fold's inputs to x (rows, D), scaled if the fold has a scale. */
static void gather(const Work *w, long f, const int64_t *which, long rows, real *x) {
    const real *all = w->x + w->copies[f] * w->rows * w->inputs;
    for (long i = 0; i < rows; i++, x += w->inputs) {
        const real *from = all + which[i] * w->inputs;
        if (!w->center) memcpy(x, from, w->inputs * sizeof(real));
        else
            for (long j = 0; j < w->inputs; j++)
                x[j] = scaled(from[j], w->center[f * w->inputs + j], w->scale[f * w->inputs + j]);
    }
}

/* Whether a trial has a layer with a dropout rate above 0. */
static int drops(const Work *w, long c) {
    int layers = (int)w->layers - 1;
    for (int l = 0; w->draws && l < layers; l++)
        if (w->dropout[c * layers + l] > 0) return 1;
    return 0;
}

/* Fill dropout's factors: 1 / (1 - rate) if a unit stays, else 0. A unit stays if its draw is at
   least the rate of its layer. */
static void drop(const Work *w, Space *s, long c, long step, long rows) {
    for (int l = 1; l < s->layers; l++) {
        real rate = (real)w->dropout[c * (w->layers - 1) + l - 1], kept = 1 / (1 - rate);
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
        if (!last) activate(w->activations[l], n, z, h);
        if (!last && dropping)
            for (long i = 0; i < n; i++) h[i] *= s->kept[l + 1][i];
    }
}

/* Replace the outputs by the gradient of the loss in them. */
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
        real number = (real)*w->loss_number;
        for (long i = 0; i < rows; i++)
            z[i * last->row] = number_slope(w->loss, number, z[i * last->row] - y[which[i]]) * s->share[i];
        return;
    }
    for (long i = 0; i < rows; i++) s->codes[i] = ((const int64_t *)w->y)[which[i]];
    cross_entropy_slope(rows, w->outputs, z, last->row, w->present + f * w->outputs, s->codes, s->share, s->work);
}

/* The gradients (rows, row) from column j on, ``width`` columns, as a panel. */
static const real *pack(const Space *s, const real *gradient, long rows, long row, long j, long width) {
    if (width == row) return gradient;
    for (long i = 0; i < rows; i++) memcpy(s->packed + i * width, gradient + i * row + j, width * sizeof(real));
    return s->packed;
}

/* One step of the optimizer over n parameters. */
static void update(Rates rates, long n, real *restrict w, real *restrict first, real *restrict second,
                   const real *restrict gradient) {
    if (rates.optimizer >= ADAM)
        for (long i = 0; i < n; i++) adam_step(rates, w + i, first + i, second + i, gradient[i]);
    else if (!first)
        for (long i = 0; i < n; i++) plain_step(rates, w + i, gradient[i]);
    else
        for (long i = 0; i < n; i++) momentum_step(rates, w + i, first + i, gradient[i]);
}

/* Take a layer's step from the gradient (rows, row) in its outputs, one part of the weight at a time. */
static void descend(Layer *layer, Space *s, Rates rates, const real *h, long across, const real *gradient, long rows) {
    for (long j = 0; j < layer->row; j += panel(layer->row - j)) {
        long width = panel(layer->row - j), count = GRADIENT / width / TILE_ROWS * TILE_ROWS;
        const real *packed = pack(s, gradient, rows, layer->row, j, width);
        for (long i = 0; i < layer->in; i += count) {
            long some = layer->in - i < count ? layer->in - i : count, at = j * padded(layer->in) + i * width;
            product(some, width, rows, h + i, 1, across, packed, rows, 0, s->gradient, width);
            real *first = layer->weight[1], *second = layer->weight[2];
            update(rates, some * width, layer->weight[0] + at, first ? first + at : 0,
                   second ? second + at : 0, s->gradient);
        }
    }
    memset(s->gradient, 0, layer->row * sizeof(real));
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < layer->row; j++) s->gradient[j] += gradient[i * layer->row + j];
    update(rates, layer->row, layer->bias[0], layer->bias[1], layer->bias[2], s->gradient);
}

/* b (columns, rows) = a (rows, columns) transposed, block by block. */
static void transpose(long rows, long columns, const real *restrict a, real *restrict b) {
    for (long j = 0; j < columns; j += LANES)
        for (long i = 0; i < rows; i += LANES) transpose_block(a + i * columns + j, columns, b + j * rows + i, rows);
}

/* The gradient in a layer's inputs, (rows, row), from the gradient in its outputs; one part of the
   columns at a time. */
static void slope_back(const Layer *layer, const Space *s, const real *gradient, long rows, real *below, long row) {
    for (long j = 0; j < row; j += panel(row - j)) {
        long width = panel(row - j);
        for (long k = 0; k < layer->row; k += panel(layer->row - k)) {
            long across = panel(layer->row - k);
            transpose(width, across, layer->weight[0] + k * row + j * across, s->turned + k * width);
        }
        product(rows, width, layer->out, gradient, layer->row, 1, s->turned, layer->row, 0, below + j, row);
    }
}

/* Take the step of every layer, from the last to the first, starting with the gradient in the outputs. */
static void backward(const Work *w, Space *s, Rates rates, long rows, int dropping) {
    real *gradient = s->h[s->layers], *below = s->upper;
    for (int l = s->layers - 1; l >= 0; l--) {
        Layer *layer = &s->layer[l];
        if (l > 0) /* before the step, because this gradient needs the old weights */
            slope_back(layer, s, gradient, rows, below, s->layer[l - 1].row);
        descend(layer, s, rates, s->h[l], l ? s->layer[l - 1].row : w->inputs, gradient, rows);
        if (l > 0) {
            long n = rows * s->layer[l - 1].row;
            if (dropping)
                for (long i = 0; i < n; i++) below[i] *= s->kept[l][i];
            slope_below(w->activations[l - 1], n, below, s->z[l], s->h[l]);
            gradient = below;
            below = gradient == s->upper ? s->below : s->upper;
        }
    }
}
