/* What one member is: its tensors, where they lie in a block of memory of their own, and how they come in and out.

   Axes: F folds, C trials, D inputs, H width, K outputs, n rows of the data. */

#define MOST_LAYERS 64
#define PAD 16            /* columns come in whole vectors of any width */
#define SCORED_ROWS 64    /* validation rows at a time: their activations stay in the cache */
#define GRADIENT 4096     /* numbers of a gradient between its product and its use */
#define ROLES 4           /* the parameters, both moments, the average of the parameters */

typedef struct {
    long in, out, row;            /* true sizes, and the length of a row of the weight: out and its padding */
    real *weight[ROLES], *bias[ROLES]; /* of each role, NULL: none; weights in panels of padded(in) rows */
} Layer;

typedef struct {
    int layers;
    Layer layer[MOST_LAYERS];
    real *state, *average, *end;                    /* of what is copied in and out; the average is the last of it */
    real *h[MOST_LAYERS + 1], *z[MOST_LAYERS + 1];  /* input of each layer, and what it was before the activation */
    real *kept[MOST_LAYERS + 1];                    /* what dropout multiplies it by */
    real *slope, *below, *turned, *packed, *gradient, *share, *work;
    int64_t *codes;
} Space;

static long padded(long n) { return (n + PAD - 1) / PAD * PAD; }
static long most(long a, long b) { return a > b ? a : b; }

/* The flat buffer of a role, NULL: none. */
static real *flat_of(const Work *w, int role) {
    real *flat[ROLES] = {w->theta, w->first, w->second, w->average};
    return flat[role];
}

/* Give every tensor of a member its place in one block of memory that begins at ``at``, and return its end. From 0 that
   is the size of the block. */
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
    const int64_t *hidden = w->widths + c * (w->layers - 1);
    if (!back) memset(s->state, 0, (char *)s->end - (char *)s->state);
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
    for (long i = 0; i < rows; i++, x += w->inputs) {
        const real *from = all + which[i] * w->inputs;
        if (!w->center) memcpy(x, from, w->inputs * sizeof(real));
        else
            for (long j = 0; j < w->inputs; j++)
                x[j] = scaled(from[j], w->center[f * w->inputs + j], w->scale[f * w->inputs + j]);
    }
}
