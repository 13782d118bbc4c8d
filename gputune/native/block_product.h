/* Products of matrices in shared memory, by a thread block. Before it come ``real``, ALWAYS_INLINE, THREADS, and TF32:
   whether factors are rounded to 10 bits of mantissa and multiplied by tensor cores. */

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
