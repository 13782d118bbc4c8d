/* Where one member lies: its weights and activations in the shared memory of a thread block, the moments of a weight in
   registers of the thread that computes its gradient, or in global memory where they are too many; between two launches
   all of them in the flat buffers of Work.

   Before it come ``real`` and the other headers, and what is fixed for one shape of members: INPUTS, WIDTH (of the
   tensors), DEPTH (hidden layers), OUTPUTS, ROWS (of a tile, the part of a minibatch whose activations are there at once),
   THREADS, MOMENTS (buffers of the optimizer), ACTIVATION, CLASSES (0: a regression), DROPOUT, TF32 (whether products
   round their factors to 10 bits of mantissa, for tensor cores), SHARED (bytes), SCRATCH (numbers of a block), HELD
   (numbers of moments that a thread may keep in registers). */

template <int L> struct Layer {
    enum {
        BELOW = L ? WIDTH : INPUTS, ABOVE = L < DEPTH ? WIDTH : OUTPUTS,
        IN = filled(BELOW, FULL), OUT = filled(ABOVE, FULL), INPUT_ROW = row_of(IN), ROW = row_of(OUT),
        // Places of the parameters.
        WEIGHT = Layer<L - 1>::END, BIAS = WEIGHT + IN * ROW, END = BIAS + OUT
    };
    using Gradient = Product<IN, OUT, Factor<ACROSS, INPUT_ROW>, Factor<ACROSS, ROW>>;
    enum {
        MINE = Gradient::MINE * Gradient::NUMBERS,
        // Of a thread's gradients; the last is a bias's.
        SLOT = Layer<L - 1>::SLOTS, SLOTS = SLOT + MINE + 1,
        MORE = Layer<L - 1>::NUMBERS + MINE * MOMENTS, IS_HELD = MORE <= HELD,
        NUMBERS = IS_HELD ? MORE : Layer<L - 1>::NUMBERS, ROOM = IS_HELD ? MINE : 1,
        UNROLLED = IS_HELD ? Gradient::MINE : 1
    };
};
template <> struct Layer<-1> {
    enum { END = 0, SLOTS = 0, NUMBERS = 0 };
};

enum { LAST_ROW = Layer<DEPTH>::ROW, WIDE = row_of(WIDTH), HIDDEN = DEPTH ? DEPTH : 1, STEPS = 32 };

struct Shared {
    Rates rates[STEPS];                      // of the steps to come
    double total[2], weight[ROWS];           // of the minibatch, or of what two warps score; and of its rows
    unsigned place[2];                       // in the queue, of this member and of the next in turn
    real target[ROWS], present[Layer<DEPTH>::OUT];
    alignas(16) real parameters[Layer<DEPTH>::END], x[ROWS * Layer<0>::INPUT_ROW];
    real z[HIDDEN][ROWS * WIDE];             // before the activation; then the slope in it
    real h[HIDDEN][ROWS * WIDE], outputs[ROWS * LAST_ROW];  // then the slope in them
};
static_assert(sizeof(Shared) == SHARED && Layer<DEPTH>::SLOTS * THREADS == SCRATCH, "as the host allots them");
static_assert(Layer<DEPTH>::OUT <= THREADS && WIDTH <= THREADS, "a thread has one bias of a layer at most");
static_assert(ROWS <= 64 && ROWS <= THREADS, "a thread of the first two warps scores a row");

// The moments that a thread keeps: of its tiles, and of its bias.
template <int L> struct Own : Own<L - 1> {
    real first[Layer<L>::ROOM], second[Layer<L>::ROOM], bias_first, bias_second;
};
template <> struct Own<-1> {};

// What is in the tile: rows ``which`` of the data.
struct Part {
    const int64_t *which;
    int rows;
    bool begun, whole;         // whether the minibatch has rows before, and none after
    const float *draws;        // of dropout in its first layer, NULL: none
    int64_t layer;             // numbers of them in a layer
    real rate, scale, share;   // share: of a row in the loss; 0: of its weight
    real *scratch;             // gradients of the tiles before
};

// The bias of a layer that is this thread's, below 0: none. The last threads have them, as the first have more tiles.
template <int L> ALWAYS_INLINE int bias() { return (int)threadIdx.x - (THREADS - Layer<L>::OUT); }

// Where a member's weight and bias lie in the flat buffers: weight0 (F, D, C, H), bias0 (F, C, H), others (F, C, in, out).
template <int L> ALWAYS_INLINE int64_t block(const Work &w)
{
    if constexpr (L > 0) return block<L - 1>(w) + w.folds * w.trials * (Layer<L - 1>::BELOW + 1) * Layer<L - 1>::ABOVE;
    return 0;
}
struct Flat {
    int64_t weight, row, bias;
};
template <int L> ALWAYS_INLINE Flat flat(const Work &w, int64_t f, int64_t c)
{
    using Z = Layer<L>;
    const int64_t member = f * w.trials + c, begin = block<L>(w);
    const int64_t bias = begin + w.folds * w.trials * Z::BELOW * Z::ABOVE + member * Z::ABOVE;
    if (L == 0) return {(f * Z::BELOW * w.trials + c) * Z::ABOVE, w.trials * Z::ABOVE, bias};
    return {begin + member * Z::BELOW * Z::ABOVE, Z::ABOVE, bias};
}

template <bool BACK> ALWAYS_INLINE void copy(real *flat, real &own, bool inside)
{
    if (!BACK) own = inside ? *flat : 0;
    else if (inside) *flat = own;
}
// Copies parameters and the moments that are kept from the flat buffers, or back.
template <int L, bool BACK> ALWAYS_INLINE void move(Shared &s, const Work &w, Own<L> &own, int64_t f, int64_t c)
{
    using Z = Layer<L>;
    if constexpr (L > 0) move<L - 1, BACK>(s, w, own, f, c);
    using Gradient = typename Z::Gradient;
    const Flat at = flat<L>(w, f, c);
    Gradient::template tiles<Z::UNROLLED>([&](int number, const Gradient &tile) {
        UNROLL for (int m = 0; m < Gradient::NUMBERS; m++) {
            const int row = tile.row(m), column = tile.place(m), mine = number + m;
            const bool inside = row < Z::BELOW && column < Z::ABOVE;
            const int64_t place = at.weight + row * at.row + column;
            copy<BACK>(w.theta + place, s.parameters[Z::WEIGHT + row * Z::ROW + column], inside);
            if (Z::IS_HELD && MOMENTS > 0) copy<BACK>(w.first + place, own.first[mine], inside);
            if (Z::IS_HELD && MOMENTS > 1) copy<BACK>(w.second + place, own.second[mine], inside);
        }
    });
    const int j = bias<L>();
    if (j < 0) return;
    copy<BACK>(w.theta + at.bias + j, s.parameters[Z::BIAS + j], j < Z::ABOVE);
    if (MOMENTS > 0) copy<BACK>(w.first + at.bias + j, own.bias_first, j < Z::ABOVE);
    if (MOMENTS > 1) copy<BACK>(w.second + at.bias + j, own.bias_second, j < Z::ABOVE);
}
