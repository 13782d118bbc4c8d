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

/* c (rows, columns) = a (rows, inner) b (inner, columns) + bias (columns). A bias of NULL is left
   out. ``room`` is scratch memory of TILE_COLUMNS x (inner + TILE_ROWS + 1) numbers. */
static void matrix_product(long rows, long columns, long inner, const real *a, long a_row, long a_column,
                           const real *b, long b_row, long b_column, const real *bias, real *c, long c_row,
                           real *room) {
    real *held = room + TILE_COLUMNS * inner, *shift = held + TILE_COLUMNS * TILE_ROWS;
    for (long j = 0, width; j < columns; j += width) {
        width = panel((columns - j + LANES - 1) / LANES * LANES);
        long wanted = columns - j < width ? columns - j : width, line = b_row;
        const real *lines = b + j * b_column, *add = bias ? bias + j : 0;
        if (b_column != 1 || wanted < width) {
            packed(inner, wanted, width, lines, b_row, b_column, room);
            lines = room, line = width;
            if (add && wanted < width) add = memcpy(shift, add, wanted * sizeof(real));
        }
        for (long i = 0; i < rows; i += TILE_ROWS) {
            int count = rows - i < TILE_ROWS ? (int)(rows - i) : TILE_ROWS;
            real *to = c + i * c_row + j;
            if (wanted == width) {
                tiles(width, count, inner, a + i * a_row, a_row, a_column, lines, line, add, to, c_row);
                continue;
            }
            tiles(width, count, inner, a + i * a_row, a_row, a_column, lines, line, add, held, width);
            for (long r = 0; r < count; r++) memcpy(to + r * c_row, held + r * width, wanted * sizeof(real));
        }
    }
}
