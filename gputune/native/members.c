/* The training of whole members, one after the other, for one epoch: forward, backward and update
   of a small network. Its parameters, moments and activations stay in one core's cache from the
   first step of the epoch to the last. Members share no memory that is written. Therefore their
   numbers do not depend on the number of members or threads. */

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
#include "member.h"

/* Score the validation rows of one member: their outputs, and the mean of row_score. */
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

static int64_t nanoseconds_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Move the average after a step. After the first step, and for a member without ema, it equals the
   parameters. */
static void move_average(const Work *w, Space *s, long c, int first) {
    long n = s->end - s->average;
    real share = (real)(1 - w->ema[c]), *restrict average = s->average;
    const real *restrict theta = s->state;
    if (first || w->ema[c] == 0) memcpy(average, theta, n * sizeof(real));
    else
        for (long i = 0; i < n; i++) average[i] += share * (theta[i] - average[i]);
}

/* Train one member for one epoch, and score it. */
static void train_member(const Work *w, Space *s, long f, long c, const int32_t *stop) {
    int64_t begin = nanoseconds_now();
    long n = w->lengths[f], size = w->sizes[c] < n ? w->sizes[c] : n, steps = (n + size - 1) / size;
    int dropping = drops(w, c);
    load_member(w, s, f, c);
    for (long step = 0; step < steps && !__atomic_load_n(stop, __ATOMIC_RELAXED); step++) {
        const int64_t *which = w->order + f * w->longest + step * size;
        long rows = n - step * size < size ? n - step * size : size;
        gather(w, f, which, rows, s->h[0]);
        if (dropping) drop(w, s, c, step, rows);
        forward(w, s, rows, dropping);
        loss_slope(w, s, f, which, rows);
        int64_t done = w->epoch * steps + step;
        backward(w, s, rates(w, f, c, (double)done, (double)w->horizon * steps), rows, dropping);
        if (w->average) move_average(w, s, c, done == w->lag[f * w->trials + c]);
        /* each member has its own number, so no thread waits for another one */
        if (w->steps_done) __atomic_store_n(w->steps_done + f * w->trials + c, step + 1, __ATOMIC_RELAXED);
    }
    store_member(w, s, f, c);
    memcpy(s->state, s->average, (char *)s->end - (char *)s->average); /* the average, if there is one, is scored */
    int64_t trained = nanoseconds_now();
    if (w->scored || w->means) score(w, s, f, c);
    __atomic_fetch_add(w->nanoseconds, trained - begin, __ATOMIC_RELAXED);
    __atomic_fetch_add(w->nanoseconds + 1, nanoseconds_now() - trained, __ATOMIC_RELAXED);
}

/* Train the members that are still in the queue. Several threads may call this function with the
   same ``next``.

   Returns 0, or 1 if memory cannot be allocated. Once ``stop`` is set, it ends early and members
   are half trained. */
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

/* The x86-64 level of this processor: 4 (AVX-512), 3 (AVX2 with FMA) or 1 (all other processors). */
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

/* The numbers of torch.rand on a CPU in single precision: 24 bits of a Mersenne twister per number.
   Source: Matsumoto and Nishimura (1998), with PyTorch's seeding. */
enum { WORDS = 624, AHEAD = 397 };

/* Each word is computed from words that are far away in the state, so the compiler can vectorize
   the loops. */
static uint32_t twisted(uint32_t far, uint32_t at, uint32_t next) {
    uint32_t y = (at & 0x80000000u) | (next & 0x7fffffffu);
    return far ^ (y >> 1) ^ (-(y & 1) & 0x9908b0dfu);
}

static void renew(uint32_t *state) {
#pragma GCC ivdep
    for (int i = 0; i < WORDS - AHEAD; i++) state[i] = twisted(state[i + AHEAD], state[i], state[i + 1]);
#pragma GCC ivdep
    for (int i = WORDS - AHEAD; i < WORDS - 1; i++)
        state[i] = twisted(state[i + AHEAD - WORDS], state[i], state[i + 1]);
    state[WORDS - 1] = twisted(state[AHEAD - 1], state[WORDS - 1], state[0]);
}

/* Write the first numbers of a seed's stream into ``parts``, one part after another; ``counts`` are
   their lengths. */
void draw_uniform(int64_t seed, int64_t n, float *const *parts, const int64_t *counts) {
    uint32_t state[WORDS] = {(uint32_t)seed};
    for (uint32_t i = 1; i < WORDS; i++) state[i] = 1812433253u * (state[i - 1] ^ (state[i - 1] >> 30)) + i;
    long at = WORDS;
    for (int64_t part = 0; part < n; part++)
        for (int64_t begin = 0, count; begin < counts[part]; begin += count, at += count) {
            if (at == WORDS) renew(state), at = 0;
            count = counts[part] - begin < WORDS - at ? counts[part] - begin : WORDS - at;
            const uint32_t *words = state + at;
            float *out = parts[part] + begin;
#pragma GCC ivdep
            for (int64_t i = 0; i < count; i++) {
                uint32_t x = words[i];
                x ^= x >> 11;
                x ^= (x << 7) & 0x9d2c5680u;
                x ^= (x << 15) & 0xefc60000u;
                x ^= x >> 18;
                out[i] = (float)(int32_t)(x & 0xffffffu) * (1.0f / (1 << 24));
            }
        }
}

/* Write the first counts[i] numbers of the stream of seeds[i] to ``out``, one stream after another. */
void draw_streams(int64_t n, const int64_t *seeds, const int64_t *counts, float *out) {
    for (int64_t i = 0; i < n; out += counts[i], i++) draw_uniform(seeds[i], 1, &out, counts + i);
}
