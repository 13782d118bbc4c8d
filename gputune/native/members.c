/* The training of whole members, each on its own, for one epoch: forward, backward and update of a small network
   whose parameters, moments and activations stay in one core's cache from the first step of the epoch to the last.
   Members do not share anything that is written, so their numbers do not depend on how many there are, nor on the
   threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef DOUBLE
typedef double real;
#define root sqrt
#else
typedef float real;
#define root sqrtf
#endif

#include "product.h"
#include "functions.h"
#include "work.h"
#include "scores.h"
#include "update.h"
#include "member.h"
#include "step.h"
#include "uniform.h"

static void score(const Work *w, Space *s, long f, long c) {
    long count = w->valid_start[f + 1] - w->valid_start[f], row = s->layer[s->layers - 1].row;
    const int64_t *which = w->valid + w->valid_start[f];
    double total = 0;
    for (long at = 0; at < count; at += SCORED_ROWS) {
        long rows = count - at < SCORED_ROWS ? count - at : SCORED_ROWS;
        gather(w, f, which + at, rows, s->h[0]);
        forward(w, s, rows, 0);
        for (long i = 0; i < rows; i++) {
            const real *z = s->h[s->layers] + i * row;
            if (w->scored) {
                real *out = w->scored + w->outputs * (w->trials * w->valid_start[f] + c * count);
                memcpy(out + (at + i) * w->outputs, z, w->outputs * sizeof(real));
            }
            if (w->means) total += row_score(w, (int)w->classes, f, z, which[at + i]);
        }
    }
    if (w->means) w->means[f * w->trials + c] = total / count;
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Move the average after a step. After the first, and of a member without ema, it is the parameters themselves. */
static void move_average(const Work *w, Space *s, long c, int first) {
    long n = s->end - s->average;
    real share = (real)(1 - w->ema[c]), *restrict average = s->average;
    const real *restrict theta = s->state;
    if (first || w->ema[c] == 0) memcpy(average, theta, n * sizeof(real));
    else
        for (long i = 0; i < n; i++) average[i] += share * (theta[i] - average[i]);
}

static void train_member(const Work *w, Space *s, long f, long c, const int32_t *stop) {
    int64_t begin = now();
    long n = w->lengths[f], size = w->sizes[c] < n ? w->sizes[c] : n, steps = (n + size - 1) / size;
    int dropping = w->draws && w->dropout[c] > 0;
    move(w, s, f, c, 0);
    for (long step = 0; step < steps && !__atomic_load_n(stop, __ATOMIC_RELAXED); step++) {
        const int64_t *which = w->order + f * w->longest + step * size;
        long rows = n - step * size < size ? n - step * size : size;
        gather(w, f, which, rows, s->h[0]);
        if (dropping) drop(w, s, c, step, rows);
        forward(w, s, rows, dropping);
        loss_slope(w, s, f, which, rows);
        backward(w, s, rates(w, c, (double)w->epoch * steps + step + 1, (double)w->horizon * steps), rows, dropping);
        if (w->average) move_average(w, s, c, !w->epoch && !step);
    }
    move(w, s, f, c, 1);
    memcpy(s->state, s->average, (char *)s->end - (char *)s->average); /* which is scored, where there is one */
    int64_t trained = now();
    if (w->scored || w->means) score(w, s, f, c);
    __atomic_fetch_add(w->nanoseconds, trained - begin, __ATOMIC_RELAXED);
    __atomic_fetch_add(w->nanoseconds + 1, now() - trained, __ATOMIC_RELAXED);
}

/* Train the members of the queue that nobody has taken yet: several threads may call this with one ``next``.

   Returns 0, or 1 where there is no memory to work in. Ends early, with members half trained, once ``stop`` is set. */
int train_members(const Work *w, int64_t *next, const int32_t *stop) {
    Space space;
    real *end = lay_out(w, &space, 0);
    void *memory = 0;
    if (posix_memalign(&memory, 64, (size_t)end + 64)) return 1;
    memset(memory, 0, (size_t)end);
    lay_out(w, &space, memory);
    for (;;) {
        int64_t at = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (at >= w->folds * w->trials || __atomic_load_n(stop, __ATOMIC_RELAXED)) break;
        train_member(w, &space, w->queue[at] / w->trials, w->queue[at] % w->trials, stop);
    }
    free(memory);
    return 0;
}

/* The level of x86-64 whose instructions this processor has: 4 (AVX-512), 3 (AVX2 with FMA) or 1, as all others. */
int processor_level(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) return 1;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl")
               ? 4
               : 3;
#else
    return 1;
#endif
}
