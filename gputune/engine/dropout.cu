// The numbers of torch.rand on a CPU, in single precision: 24 bits each of a Mersenne twister of its own for each stream.
// Source: Matsumoto and Nishimura (1998), as PyTorch seeds it; a thread a stream.
//   sizes    streams, numbers that a row of ``out`` has room for
//   streams  the seeds of all, then how many numbers each draws

enum { WORDS = 624, AHEAD = 397 };

extern "C" __global__ void uniform(const long long* sizes, const long long* streams, real* out)
{
    const long long n = sizes[0], step = (long long)blockDim.x * gridDim.x;
    for (long long s = blockIdx.x * (long long)blockDim.x + threadIdx.x; s < n; s += step) {
        unsigned state[WORDS];
        state[0] = (unsigned)streams[s];
        for (int i = 1; i < WORDS; i++) state[i] = 1812433253u * (state[i - 1] ^ (state[i - 1] >> 30)) + i;
        int at = 0;
        for (long long i = 0; i < streams[n + s]; i++) {
            const int next = at + 1 < WORDS ? at + 1 : 0, far = at + AHEAD < WORDS ? at + AHEAD : at + AHEAD - WORDS;
            const unsigned y = (state[at] & 0x80000000u) | (state[next] & 0x7fffffffu);
            unsigned x = state[at] = state[far] ^ (y >> 1) ^ (y & 1 ? 0x9908b0dfu : 0u);
            at = next;
            x ^= x >> 11;
            x ^= (x << 7) & 0x9d2c5680u;
            x ^= (x << 15) & 0xefc60000u;
            x ^= x >> 18;
            out[s * sizes[1] + i] = (real)(x & 0xffffffu) * (real)(1.0 / (1 << 24));
        }
    }
}
