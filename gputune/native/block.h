/* A thread block: the products of matrices in its shared memory, and the places of its member.
   Weights and activations are in shared memory. The moments of a weight are in registers of the
   thread that computes its gradient, or in global memory if there are too many. Between two
   launches all of them are in the flat buffers of Work.

   ``real``, the other headers and the constants of one shape of members come before this header:
   INPUTS, WIDTH (of the tensors), DEPTH (hidden layers), OUTPUTS, ROWS (of a tile, the part of a
   minibatch whose activations are in shared memory at once), THREADS, MOMENTS (buffers of the
   optimizer), ACTIVATION(L) of a hidden layer, CLASSES (0: a regression), DROPOUT, TF32 (1: products round their factors
   to 10 bits of mantissa, for tensor cores), SHARED (bytes), SCRATCH (numbers of a block), HELD
   (numbers of moments that a thread may keep in registers). */

#define UNROLL _Pragma("unroll")
#define INLINE __device__ __forceinline__

/* Matrices are padded with zeros to multiples of these: their columns, and the rows of a minibatch. */
enum { FULL = TF32 ? 16 : 4, FULL_ROWS = TF32 ? 8 : 4 };
__host__ __device__ constexpr int filled(int n, int by) { return (n + by - 1) / by * by; }
/* The length of a row. Rows that are read at the same time begin at different banks of the shared
   memory. */
__host__ __device__ constexpr int row_of(int n) { return n % 8 ? n : n + 4; }
/* The largest of 4, 2 and 1 that divides ``of`` and leaves at least ``least`` parts; each part
   occurs ``others`` times. */
__host__ __device__ constexpr int times(int of, int others, int least)
{
    return of % 4 == 0 && of / 4 * others >= least ? 4 : of % 2 == 0 && of / 2 * others >= least ? 2 : 1;
}

template <int N> struct alignas(N * sizeof(real) < 16 ? N * sizeof(real) : 16) Numbers { real at[N]; };
template <int N> INLINE Numbers<N> load(const real *from) { return *(const Numbers<N> *)from; }
template <int N> INLINE void store(real *to, const Numbers<N> &numbers) { *(Numbers<N> *)to = numbers; }

#ifdef __CUDACC__ /* the CPU emulation of the tests defines its registers versions */
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
/* A factor of a product that sums numbers (i, k) over k. k runs along its rows, or across them. A
   row has ROW numbers. */
template <bool IS_ALONG, int ROW> struct Factor {
    enum { ALONG = IS_ALONG };
    const real *from;

    INLINE real at(int i, int k) const { return from[ALONG ? i * ROW + k : k * ROW + i]; }
    /* Reads the numbers i, i + step, ... (along) or i, i + 1, ... (across), each for k to k + 3. */
    template <int N> INLINE void read(real (&to)[N][4], int i, int step, int k) const
    {
        UNROLL for (int n = 0; n < (ALONG ? N : 4); n++) {
            const int begin = ALONG ? (i + n * step) * ROW + k : (k + n) * ROW + i;
            const auto side_by_side = load<ALONG ? 4 : N>(from + begin);
            UNROLL for (int j = 0; j < (ALONG ? 4 : N); j++) (ALONG ? to[n][j] : to[j][n]) = side_by_side.at[j];
        }
    }
};

/* The product of a (M, inner) and b (inner, N). A worker is a thread, or a warp with its tensor
   core. It has MINE tiles of TALL x SPAN numbers. A thread has NUMBERS numbers of a tile, of which
   RUN are contiguous. */
template <int M, int N, class A, class B> struct Product {
#if TF32
    enum { WORKERS = THREADS / 32, TALL = 16, SPAN = 8 * times(N / 8, M / 16, WORKERS), NUMBERS = SPAN / 2, RUN = 2 };
#else
    enum { WORKERS = THREADS, TALL = times(M, N / 4, THREADS / 2), SPAN = 4, NUMBERS = TALL * 4, RUN = B::ALONG ? 1 : 4 };
#endif
    enum { LINES = M / TALL, COLUMNS = N / SPAN, MINE = (LINES * COLUMNS + WORKERS - 1) / WORKERS };
    int line, column; /* of a tile */

    /* Row and column of a thread's number n. If a factor lies along k, a thread's numbers are
       spread over it. */
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

    /* Calls ``each`` with every tile of this thread and the index of its first entry. */
    template <int UNROLLED, class Each> static INLINE void tiles(Each each)
    {
#pragma unroll (UNROLLED)
        for (int n = 0; n < MINE; n++) {
            const int tile = threadIdx.x / (THREADS / WORKERS) + n * WORKERS;
            if (tile < LINES * COLUMNS) each(n * NUMBERS, Product{tile / COLUMNS, tile % COLUMNS});
        }
    }
    /* Calls ``each`` with every run of this thread: the index of its first entry, its row, its
       column, and the run. */
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
        /* A lane may have any two of the eight inner numbers. These two are read from different
           banks. */
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
        // Positions of the parameters in shared memory.
        WEIGHT = Layer<L - 1>::END, BIAS = WEIGHT + IN * ROW, END = BIAS + OUT
    };
    using Gradient = Product<IN, OUT, Factor<ACROSS, INPUT_ROW>, Factor<ACROSS, ROW>>;
    enum {
        MINE = Gradient::MINE * Gradient::NUMBERS,
        // Slots of a thread's gradients; the last one is for a bias.
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
    Rates rates[STEPS];                      // of the next steps
    double total[2], weight[ROWS];           // weight of the minibatch, or scores of two warps; weights of its rows
    unsigned place[2];                       // position in the queue, of this member and of the next, in turn
    real target[ROWS], present[Layer<DEPTH>::OUT];
    alignas(16) real parameters[Layer<DEPTH>::END], x[ROWS * Layer<0>::INPUT_ROW];
    real z[HIDDEN][ROWS * WIDE];             // values before the activation; later the gradient in them
    real h[HIDDEN][ROWS * WIDE], outputs[ROWS * LAST_ROW];  // outputs later hold the gradient in them
};
static_assert(sizeof(Shared) == SHARED && Layer<DEPTH>::SLOTS * THREADS == SCRATCH, "as the host allots them");
static_assert(Layer<DEPTH>::OUT <= THREADS && WIDTH <= THREADS, "a thread has one bias of a layer at most");
static_assert(ROWS <= 64 && ROWS <= THREADS, "a thread of the first two warps scores a row");

// The moments that a thread keeps: those of its tiles and of its bias.
template <int L> struct Own : Own<L - 1> {
    real first[Layer<L>::ROOM], second[Layer<L>::ROOM], bias_first, bias_second;
};
template <> struct Own<-1> {};

// The content of the tile: the rows ``which`` of the data.
struct Part {
    const int64_t *which;
    int rows;
    bool begun, whole;         // true if the minibatch has rows before the tile, and if it has none after it
    const float *draws;        // draws of dropout for the first layer; NULL: none
    int64_t layer;             // number of draws per layer
    const double *rates;       // dropout's rate of each hidden layer
    real share;                // of a row in the loss; 0: it follows from the row's weight
    real *scratch;             // gradients of the earlier tiles
};

// The bias of a layer that belongs to this thread; below 0: none. The last threads have the biases,
// because the first threads have more tiles.
template <int L> ALWAYS_INLINE int bias() { return (int)threadIdx.x - (THREADS - Layer<L>::OUT); }

// The place of a member's weight and bias in the flat buffers:
// weight0 (F, D, C, H), bias0 (F, C, H), others (F, C, in, out).
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

template <bool BACK> ALWAYS_INLINE void copy(real *flat, real &value, bool inside)
{
    if (!BACK) value = inside ? *flat : 0;
    else if (inside) *flat = value;
}
// Copies the parameters, and the moments that registers hold, from the flat buffers or back.
template <int L, bool BACK> ALWAYS_INLINE void move(Shared &s, const Work &w, Own<L> &registers, int64_t f, int64_t c)
{
    using Z = Layer<L>;
    if constexpr (L > 0) move<L - 1, BACK>(s, w, registers, f, c);
    using Gradient = typename Z::Gradient;
    const Flat at = flat<L>(w, f, c);
    Gradient::template tiles<Z::UNROLLED>([&](int number, const Gradient &tile) {
        UNROLL for (int m = 0; m < Gradient::NUMBERS; m++) {
            const int row = tile.row(m), column = tile.place(m), mine = number + m;
            const bool inside = row < Z::BELOW && column < Z::ABOVE;
            const int64_t place = at.weight + row * at.row + column;
            copy<BACK>(w.theta + place, s.parameters[Z::WEIGHT + row * Z::ROW + column], inside);
            if (Z::IS_HELD && MOMENTS > 0) copy<BACK>(w.first + place, registers.first[mine], inside);
            if (Z::IS_HELD && MOMENTS > 1) copy<BACK>(w.second + place, registers.second[mine], inside);
        }
    });
    const int j = bias<L>();
    if (j < 0) return;
    copy<BACK>(w.theta + at.bias + j, s.parameters[Z::BIAS + j], j < Z::ABOVE);
    if (MOMENTS > 0) copy<BACK>(w.first + at.bias + j, registers.bias_first, j < Z::ABOVE);
    if (MOMENTS > 1) copy<BACK>(w.second + at.bias + j, registers.bias_second, j < Z::ABOVE);
}
