/* Takes the steps of a member (modules/member_code.py), each a list of numbers: how many follow, then runs of calls.

   A run: calls, rows, and for how many rows at a time. A call: kernel, places, sizes, its first number of the host, and
   how much of its last size is a row, 0 where it is called once for all. Then for each place the memory (-1: none), the
   byte at which it begins, and the bytes of a row; then the sizes. */

typedef void (*Kernel)(char *const *P, const double *S, const int64_t *N);

enum { MOST = 64 }; /* places or sizes of a call */

static const int64_t *take_run(const int64_t *run, const Kernel *kernels, char *const *M, const double *S) {
    const int64_t *call = run;
    for (int64_t row = 0, count; row < run[1]; row += count) {
        count = run[1] - row < run[2] ? run[1] - row : run[2];
        call = run + 3;
        for (int64_t i = 0; i < run[0]; i++) {
            char *places[MOST];
            int64_t n = call[1], sizes[MOST];
            const int64_t *place = call + 5, *size = place + 3 * n;
            for (int64_t j = 0; j < n; j++, place += 3)
                places[j] = place[0] < 0 ? 0 : M[place[0]] + place[1] + row * place[2];
            for (int64_t j = 0; j < call[2]; j++) sizes[j] = size[j];
            if (call[4]) sizes[call[2] - 1] = count * call[4];
            kernels[call[0]](places, S + call[3], sizes);
            call = size + call[2];
        }
    }
    return call;
}

/* M: the memories that the steps find, the first of them room for what they make. */
void take_steps(int64_t count, const int64_t *const *steps, const Kernel *kernels, char *const *M,
                const double *const *S) {
    for (int64_t i = 0; i < count; i++)
        for (const int64_t *run = steps[i] + 1, *end = run + *steps[i]; run < end;)
            run = take_run(run, kernels, M, S[i]);
}
