/* Sorting for the generated kernels of a member's step (modules/kernels/axes.py). */

enum { SORTED_RUN = 16 }; /* entries that are sorted by insertion before runs are merged */

/* Whether a comes before b. NaN counts as larger than all numbers. */
ALWAYS_INLINE int comes_before(real a, real b, int descending) {
    if (descending) return a > b || (a != a && b == b);
    return a < b || (a == a && b != b);
}

/* Writes to ``index`` the order that sorts the n numbers x[0], x[step], ... Equal numbers stay in
   order. ``room`` is scratch memory of n numbers and n indices. */
static void sort_row(long n, const real *x, long step, int descending, int64_t *index, int64_t *room) {
    real *held = (real *)(room + n);
    for (long i = 0; i < n; i++) held[i] = x[i * step];
    for (long begin = 0; begin < n; begin += SORTED_RUN) {
        long end = begin + SORTED_RUN < n ? begin + SORTED_RUN : n;
        for (long i = begin; i < end; i++) {
            long j = i;
            for (; j > begin && comes_before(held[i], held[index[j - 1]], descending); j--) index[j] = index[j - 1];
            index[j] = i;
        }
    }
    for (long width = SORTED_RUN; width < n; width *= 2) {
        for (long begin = 0; begin < n; begin += 2 * width) {
            long middle = begin + width < n ? begin + width : n, end = begin + 2 * width < n ? begin + 2 * width : n;
            long a = begin, b = middle;
            for (long i = begin; i < end; i++) {
                int later = b < end && (a == middle || comes_before(held[index[b]], held[index[a]], descending));
                room[i] = later ? index[b++] : index[a++];
            }
        }
        memcpy(index, room, n * sizeof(int64_t));
    }
}
