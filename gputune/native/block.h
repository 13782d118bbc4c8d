/* A thread block: the products of matrices in its shared memory, and where its member lies: weights and activations in the
   shared memory, the moments of a weight in registers of the thread that computes its gradient, or in global memory where
   they are too many; between two launches all of them in the flat buffers of Work.

   Before it come ``real`` and the other headers, and what is fixed for one shape of members: INPUTS, WIDTH (of the
   tensors), DEPTH (hidden layers), OUTPUTS, ROWS (of a tile, the part of a minibatch whose activations are there at once),
   THREADS, MOMENTS (buffers of the optimizer), ACTIVATION, CLASSES (0: a regression), DROPOUT, TF32 (whether products
   round their factors to 10 bits of mantissa, for tensor cores), SHARED (bytes), SCRATCH (numbers of a block), HELD
   (numbers of moments that a thread may keep in registers). */

#define UNROLL _Pragma("unroll")
#define INLINE __device__ __forceinline__

/* What matrices are filled up to with zeros: their columns, and the rows of a minibatch. */
enum { FULL = TF32 ? 16 : 4, FULL_ROWS = TF32 ? 8 : 4 };
__host__ __device__ constexpr int filled(int n, int by) { return (n + by - 1) / by * by; }
/* The length of a row: those that are read side by side begin at different banks. */
__host__ __device__ constexpr int row_of(int n) { return n % 8 ? n : n + 4; }
/* Of 4, 2 and 1 the most that divides ``of`` and leaves ``least`` parts; there are ``others`` of each. */
__host__ __device__ constexpr int times(int of, int others, int least)
{
    return of % 4 == 0 && of / 4 * others >= least ? 4 : of % 2 == 0 && of / 2 * others >= least ? 2 : 1;
}

template <int N> struct alignas(N * sizeof(real) < 16 ? N * sizeof(real) : 16) Numbers { real at[N]; };
template <int N> INLINE Numbers<N> load(const real *from) { return *(const Numbers<N> *)from; }
template <int N> INLINE void store(real *to, const Numbers<N> &numbers) { *(Numbers<N> *)to = numbers; }

#ifdef __CUDACC__ /* the emulation has its own */
INLINE float rounded(float x)
{
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}
/* c (16, 8) += a (16, 8) b (8, 8), by a warp. Lane 4 g + t has a (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);
   b (t, g), (t + 4, g); c (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
   Source: https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-1688 */
INLINE void multiply(float *c, const float (&a)[4], const float (&b)[2])
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
#endif

enum { ACROSS, ALONG };
/* A factor, whose numbers (i, k) are summed over k: k goes along its rows, or across them; a row has ROW numbers. */
template <bool IS_ALONG, int ROW> struct Factor {
    enum { ALONG = IS_ALONG };
    const real *from;

    INLINE real at(int i, int k) const { return from[ALONG ? i * ROW + k : k * ROW + i]; }
    /* Numbers i, i + step, ... along, or i, i + 1, ... across, each for k to k + 3. */
    template <int N> INLINE void read(real (&to)[N][4], int i, int step, int k) const
    {
        UNROLL for (int n = 0; n < (ALONG ? N : 4); n++) {
            const int begin = ALONG ? (i + n * step) * ROW + k : (k + n) * ROW + i;
            const auto side_by_side = load<ALONG ? 4 : N>(from + begin);
            UNROLL for (int j = 0; j < (ALONG ? 4 : N); j++) (ALONG ? to[n][j] : to[j][n]) = side_by_side.at[j];
        }
    }
};

/* The product of a (M, inner) and b (inner, N). A worker, which is a thread, or a warp with its tensor core, has MINE
   tiles of TALL x SPAN numbers. A thread has NUMBERS of a tile, RUN of them side by side. */
template <int M, int N, class A, class B> struct Product {
#if TF32
    enum { WORKERS = THREADS / 32, TALL = 16, SPAN = 8 * times(N / 8, M / 16, WORKERS), NUMBERS = SPAN / 2, RUN = 2 };
#else
    enum { WORKERS = THREADS, TALL = times(M, N / 4, THREADS / 2), SPAN = 4, NUMBERS = TALL * 4, RUN = B::ALONG ? 1 : 4 };
#endif
    enum { LINES = M / TALL, COLUMNS = N / SPAN, MINE = (LINES * COLUMNS + WORKERS - 1) / WORKERS };
    int line, column; /* of a tile */

    /* Where number n of a thread's lies; a thread's are spread over a factor that lies along. */
    INLINE int row(int n) const
    {
        if (TF32) return line * TALL + threadIdx.x % 32 / 4 + n / 2 % 2 * 8;
        return A::ALONG ? line + n / 4 * LINES : line * TALL + n / 4;
    }
    INLINE int place(int n) const
    {
        if (TF32) return column * SPAN + n / 4 * 8 + threadIdx.x % 4 * 2 + n % 2;
        return B::ALONG ? column + n % 4 * COLUMNS : column * 4 + n % 4;
    }

    /* Calls ``each`` with every tile of this thread's, and the number of its first entry. */
    template <int UNROLLED, class Each> static INLINE void tiles(Each each)
    {
#pragma unroll (UNROLLED)
        for (int n = 0; n < MINE; n++) {
            const int tile = threadIdx.x / (THREADS / WORKERS) + n * WORKERS;
            if (tile < LINES * COLUMNS) each(n * NUMBERS, Product{tile / COLUMNS, tile % COLUMNS});
        }
    }
    /* Calls ``each`` with every run of this thread's: the number of its first entry, its row, its column, and the run. */
    template <int UNROLLED, int LOOPS, class Each> static INLINE void runs(A a, B b, int inner, Each each)
    {
        tiles<UNROLLED>([&](int number, const Product &tile) {
            real c[NUMBERS] = {};
            tile.sum<LOOPS>(c, a, b, inner);
            UNROLL for (int m = 0; m < NUMBERS; m += RUN) {
                Numbers<RUN> run;
                UNROLL for (int j = 0; j < RUN; j++) run.at[j] = c[m + j];
                each(number + m, tile.row(m), tile.place(m), run);
            }
        });
    }

    template <int LOOPS> INLINE void sum(real (&c)[NUMBERS], A a, B b, int inner) const
    {
#if TF32
        const int lane = threadIdx.x % 32, row = line * TALL + lane / 4, place = column * SPAN + lane / 4;
        /* The two of eight inner numbers that a lane has may be any: these are read from different banks. */
        const int first = lane % 4 * (B::ALONG ? 1 : 2), second = first + (B::ALONG ? 4 : 1);
#pragma unroll (LOOPS)
        for (int k = 0; k < inner; k += 8) {
            real p[4], q[2];
            UNROLL for (int i = 0; i < 4; i++) p[i] = rounded(a.at(row + i % 2 * 8, k + (i / 2 ? second : first)));
            UNROLL for (int n = 0; n < NUMBERS; n += 4) {
                UNROLL for (int i = 0; i < 2; i++) q[i] = rounded(b.at(place + 2 * n, k + (i ? second : first)));
                multiply(c + n, p, q);
            }
        }
#else
#pragma unroll (LOOPS)
        for (int k = 0; k < inner; k += 4) {
            real p[TALL][4], q[4][4];
            a.read(p, row(0), LINES, k), b.read(q, place(0), COLUMNS, k);
            UNROLL for (int d = 0; d < 4; d++)
                UNROLL for (int n = 0; n < NUMBERS; n++) c[n] += p[n / 4][d] * q[n % 4][d];
        }
#endif
    }
};

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
