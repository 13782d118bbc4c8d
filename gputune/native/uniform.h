/* The numbers of torch.rand on a CPU in single precision: 24 bits each of a Mersenne twister.
   Source: Matsumoto and Nishimura (1998), as PyTorch seeds it. */

enum { WORDS = 624, AHEAD = 397 };

/* The words of a state lie so far apart from those they are made of that the loops are taken in vectors. */
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

/* Write the first numbers of a seed's stream: ``counts`` of them into each of ``parts``, one after another. */
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
