/* The product of matrices with any strides, for the steps of modules (steps.h). */

/* Copies b (inner, wanted) to ``room`` with ``width`` columns, a whole number of vectors; the rest
   is filled with zeros. */
static void packed(long inner, long wanted, long width, const real *b, long b_row, long b_column, real *room) {
    if (wanted < width) memset(room, 0, inner * width * sizeof(real));
    if (b_column == 1) {
        for (long p = 0; p < inner; p++) memcpy(room + p * width, b + p * b_row, wanted * sizeof(real));
        return;
    }
    long whole = b_row == 1 ? inner / LANES * LANES : 0, across = whole ? wanted / LANES * LANES : 0;
    for (long p = 0; p < whole; p += LANES) /* block by block, so that whole cache lines are read and written */
        for (long q = 0; q < across; q += LANES)
            transpose_block(b + p + q * b_column, b_column, room + p * width + q, width);
    for (long p = 0; p < inner; p++)
        for (long q = p < whole ? across : 0; q < wanted; q++) room[p * width + q] = b[p * b_row + q * b_column];
}

/* A line of b in this distance is copied for many rows of a. In place, the lines of a tile would map to
   few places of the cache. For 256 x 256 x 256 numbers, a product is 8% faster with copies. */
enum { FAR_BYTES = 512, MANY_ROWS = 192 };

/* c (rows, columns) = a (rows, inner) b (inner, columns) + added (rows, columns). An ``added`` of NULL
   is left out, and may be c; ``added_row`` is 0 for a bias. ``room`` is scratch memory of
   TILE_COLUMNS x (inner + 12) numbers. */
static void matrix_product(long rows, long columns, long inner, const real *a, long a_row, long a_column,
                           const real *b, long b_row, long b_column, const real *added, long added_row, real *c,
                           long c_row, real *room) {
    real *held = room + TILE_COLUMNS * inner;
    int is_far = rows >= MANY_ROWS && b_row * (long)sizeof(real) >= FAR_BYTES;
    for (long j = 0, width; j < columns; j += width) {
        width = panel((columns - j + LANES - 1) / LANES * LANES);
        long wanted = columns - j < width ? columns - j : width, line = b_row;
        const real *lines = b + j * b_column;
        if (b_column != 1 || wanted < width || is_far) {
            packed(inner, wanted, width, lines, b_row, b_column, room);
            lines = room, line = width;
        }
        const real *add = added ? added + j : 0;
        if (wanted == width) {
            tiles(width, rows, inner, a, a_row, a_column, lines, line, add, added_row, c + j, c_row);
            continue;
        }
        /* Tiles with more columns than c are computed in scratch memory. */
        long most = MOST_ROWS(width / LANES);
        for (long i = 0; i < rows; i += most) {
            long count = rows - i < most ? rows - i : most;
            for (long r = 0; r < count && add; r++)
                memcpy(held + r * width, add + (i + r) * added_row, wanted * sizeof(real));
            tiles(width, count, inner, a + i * a_row, a_row, a_column, lines, line, add ? held : 0, width, held, width);
            for (long r = 0; r < count; r++)
                memcpy(c + (i + r) * c_row + j, held + r * width, wanted * sizeof(real));
        }
    }
}

/* The same product for a transposed a (a_row is 1), which is copied first. The numbers of a that a
   tile reads then follow each other. ``room`` has rows x inner more numbers. For 256 x 256 x 256
   numbers, this is 20% faster. */
static void turned_product(long rows, long columns, long inner, const real *a, long a_row, long a_column,
                           const real *b, long b_row, long b_column, const real *added, long added_row, real *c,
                           long c_row, real *room) {
    real *turned = room + TILE_COLUMNS * (inner + 12);
    packed(rows, inner, inner, a, a_row, a_column, turned);
    matrix_product(rows, columns, inner, turned, inner, 1, b, b_row, b_column, added, added_row, c, c_row, room);
}
