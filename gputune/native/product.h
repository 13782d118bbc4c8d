/* The matrix product of small row-major matrices that fit into a core's cache.

   A tile of the result stays in registers during the loop over the inner dimension. One line of b
   is read once for all rows of the tile, and each number of a is broadcast to a register. The
   compiler's vector types become the processor's vector instructions, for any width. */

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#define TILE_VECTORS 3
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define TILE_ROWS 4
#define TILE_VECTORS 3
#else
#define VECTOR_BYTES 16
#define TILE_ROWS 8
#define TILE_VECTORS 2
#endif

#define LANES ((int)(VECTOR_BYTES / sizeof(real)))
#define TILE_COLUMNS (TILE_VECTORS * LANES)
#define ALWAYS_INLINE static inline __attribute__((always_inline))

typedef real vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

/* Keeps a vector in a register. Without this, gcc reads the vector from memory again for each row of
   a tile, and the tile is limited by its reads. */
#if defined(__x86_64__)
#define IN_REGISTER(line) __asm__("" : "+v"(line))
#elif defined(__aarch64__)
#define IN_REGISTER(line) __asm__("" : "+w"(line))
#else
#define IN_REGISTER(line)
#endif

/* Two vectors in which the numbers of a and b alternate: FIRST takes their first halves, SECOND
   their second halves. With AVX2, these are the halves of each lane of 16 bytes, because an
   instruction that moves numbers from one lane to the other takes longer. LOWER then takes the
   lower lanes of a and b, and UPPER their upper lanes. */
#ifdef DOUBLE
#define NUMBERS (VECTOR_BYTES / 8)
typedef int64_t places __attribute__((vector_size(VECTOR_BYTES)));
#else
#define NUMBERS (VECTOR_BYTES / 4)
typedef int32_t places __attribute__((vector_size(VECTOR_BYTES)));
#endif
#if NUMBERS == 16
#define FIRST 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SECOND 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif NUMBERS == 8 && VECTOR_BYTES == 32
#define FIRST 0, 8, 1, 9, 4, 12, 5, 13
#define SECOND 2, 10, 3, 11, 6, 14, 7, 15
#define LOWER 0, 1, 2, 3, 8, 9, 10, 11
#define UPPER 4, 5, 6, 7, 12, 13, 14, 15
#elif NUMBERS == 8
#define FIRST 0, 8, 1, 9, 2, 10, 3, 11
#define SECOND 4, 12, 5, 13, 6, 14, 7, 15
#elif NUMBERS == 4 && VECTOR_BYTES == 32
#define FIRST 0, 4, 2, 6
#define SECOND 1, 5, 3, 7
#define LOWER 0, 1, 4, 5
#define UPPER 2, 3, 6, 7
#elif NUMBERS == 4
#define FIRST 0, 4, 1, 5
#define SECOND 2, 6, 3, 7
#else
#define FIRST 0, 2
#define SECOND 1, 3
#endif
#ifdef LOWER
#define LANE_COUNT 2
#else
#define LANE_COUNT 1
#endif
#ifdef __clang__
#define IN_TURN(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define IN_TURN(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

/* A block of LANES x LANES numbers of a, transposed into b. Each pass interleaves the first half of
   the lines with the second half. After log2(LANES) passes the lines are the columns. With AVX2, all
   passes except the last stay within the lanes, and the last pass exchanges the lanes of two lines.
   The order of the first lines makes up for the difference. */
ALWAYS_INLINE void transpose_block(const real *a, long a_row, real *b, long b_row) {
    vector line[LANES], next[LANES];
    for (int p = 0; p < LANES; p++)
#ifdef LOWER
        line[p] = *(const vector *)(a + (p % 2 * (LANES / 2) + p / 2) * a_row);
#else
        line[p] = *(const vector *)(a + p * a_row);
#endif
#pragma GCC unroll 4
    for (int left = LANES; left > LANE_COUNT; left /= 2) {
#pragma GCC unroll 8
        for (int p = 0; p < LANES / 2; p++) {
            next[2 * p] = IN_TURN(line[p], line[p + LANES / 2], FIRST);
            next[2 * p + 1] = IN_TURN(line[p], line[p + LANES / 2], SECOND);
        }
#pragma GCC unroll 16
        for (int p = 0; p < LANES; p++) line[p] = next[p];
    }
#ifdef LOWER
#pragma GCC unroll 8
    for (int p = 0; p < LANES / 2; p++) {
        next[p] = IN_TURN(line[p], line[p + LANES / 2], LOWER);
        next[p + LANES / 2] = IN_TURN(line[p], line[p + LANES / 2], UPPER);
    }
#pragma GCC unroll 16
    for (int p = 0; p < LANES; p++) line[p] = next[p];
#endif
    for (int p = 0; p < LANES; p++) *(vector *)(b + p * b_row) = line[p];
}

/* Most rows of a tile of ``vectors`` vectors per row. The sums, a line and a number of a fit into the
   registers, and the sums are enough to hide the latency of additions. */
#if VECTOR_BYTES == 64
#define MOST_ROWS(vectors) ((vectors) == 3 ? 8 : 12)
#else
#define MOST_ROWS(vectors) ((vectors) == 3 ? 4 : (vectors) == 2 ? 6 : 8)
#endif

/* c (rows, vectors) = a (rows, inner) b (inner, vectors) + added (rows, vectors). ``added_row`` is 0
   for a bias, and ``added`` may be c. */
ALWAYS_INLINE void tile(const int rows, const int vectors, long inner, const real *a, long a_row, long a_column,
                        const real *b, long b_row, const real *added, long added_row, real *c, long c_row) {
    vector sum[12][TILE_VECTORS];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            sum[i][j] = added ? *(const vector *)(added + i * added_row + j * LANES) : (vector){0};
    for (long p = 0; p < inner; p++) {
        vector line[TILE_VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
            line[j] = *(const vector *)(b + p * b_row + j * LANES);
            IN_REGISTER(line[j]);
        }
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            real x = a[i * a_row + p * a_column];
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) sum[i][j] += x * line[j];
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) *(vector *)(c + i * c_row + j * LANES) = sum[i][j];
}

/* One function for each width of a tile. The number of rows is a constant in each case, so the sums
   stay in registers. */
#define FOUR(CASE) CASE(1) CASE(2) CASE(3) CASE(4)
#define SIX(CASE) FOUR(CASE) CASE(5) CASE(6)
#define EIGHT(CASE) SIX(CASE) CASE(7) CASE(8)
#define TWELVE(CASE) EIGHT(CASE) CASE(9) CASE(10) CASE(11) CASE(12)
#define TILE_CASE(n) \
    case n: tile(n, WIDTH, inner, a, a_row, a_column, b, b_row, added, added_row, c, c_row); break;
#define TILES(name, width, EACH_ROWS) \
    static void name(int rows, long inner, const real *a, long a_row, long a_column, const real *b, long b_row, \
                     const real *added, long added_row, real *c, long c_row) { \
        enum { WIDTH = width }; \
        switch (rows) { EACH_ROWS(TILE_CASE) } \
    }
#if VECTOR_BYTES == 64
TILES(tiles_of_1, 1, TWELVE)
TILES(tiles_of_2, 2, TWELVE)
TILES(tiles_of_3, 3, EIGHT)
#else
TILES(tiles_of_1, 1, EIGHT)
TILES(tiles_of_2, 2, SIX)
#if TILE_VECTORS == 3
TILES(tiles_of_3, 3, FOUR)
#endif
#endif

/* Computes ``width`` columns of ``rows`` rows of c, in tiles of nearly equal numbers of rows. */
ALWAYS_INLINE void tiles(long width, long rows, long inner, const real *a, long a_row, long a_column, const real *b,
                         long b_row, const real *added, long added_row, real *c, long c_row) {
    long most = MOST_ROWS(width / LANES), left = (rows + most - 1) / most;
    for (long count; rows > 0; rows -= count, left--) {
        count = (rows + left - 1) / left;
        int n = (int)count;
        if (width == LANES) tiles_of_1(n, inner, a, a_row, a_column, b, b_row, added, added_row, c, c_row);
        if (width == 2 * LANES) tiles_of_2(n, inner, a, a_row, a_column, b, b_row, added, added_row, c, c_row);
#if TILE_VECTORS == 3
        if (width == 3 * LANES) tiles_of_3(n, inner, a, a_row, a_column, b, b_row, added, added_row, c, c_row);
#endif
        a += count * a_row, c += count * c_row;
        if (added) added += count * added_row;
    }
}

/* The number of columns of the next tile, if ``left`` columns are left. Four vectors are split into
   two and two, because with three and one the second tile would leave most registers empty. */
static long panel(long left) {
    long vectors = left / LANES;
    return LANES * (vectors == 4 ? 2 : vectors < TILE_VECTORS ? vectors : TILE_VECTORS);
}

/* c (rows, columns) = a (rows, inner) b (inner, columns) + bias (columns). A bias of NULL is left
   out.

   ``columns`` is a multiple of LANES. Element (i, p) of a is a[i a_row + p a_column], so a may be
   transposed. b is stored in panels. A panel has all rows of the columns of one tile. The panel
   that begins with column j begins at j b_rows, where b_rows is the number of allocated rows. So
   the lines of a tile are contiguous. In rows of 4 KiB they would all map to the same few places of
   the cache, each in a different page. The order of the sums depends only on the column, so a row's
   result does not depend on the other rows. */
static void product(long rows, long columns, long inner, const real *a, long a_row, long a_column, const real *b,
                    long b_rows, const real *bias, real *c, long c_row) {
    for (long j = 0; j < columns; j += panel(columns - j)) {
        long width = panel(columns - j);
        tiles(width, rows, inner, a, a_row, a_column, b + j * b_rows, width, bias ? bias + j : 0, 0, c + j, c_row);
    }
}
