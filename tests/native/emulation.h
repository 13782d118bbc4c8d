// CUDA C++ on a CPU: included before a kernel's file, which g++ then compiles. Threads of a block are fibers of one thread.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct Index { unsigned x, y, z; };
extern Index threadIdx, blockIdx, blockDim, gridDim;
extern int left_out;  // a barrier that is left out, for a test of whether it is needed; -1: none
void __syncthreads();
struct Lane { double numbers[6]; };
const Lane *exchange(const Lane &mine);  // what the lanes of the warp gave, once all of them have come to it
#define BARRIER(name) do { if ((name) != left_out) __syncthreads(); } while (0)

template <typename T> T __shfl_xor_sync(unsigned, T value, int mask)
{
    Lane mine;
    memcpy(&mine, &value, sizeof value);
    memcpy(&value, exchange(mine) + (threadIdx.x % 32 ^ mask), sizeof value);
    return value;
}

// To TF32: to the nearest with 10 bits of mantissa, away from zero of two; NaN stays. Double precision is left as it is.
inline double rounded(double x) { return x; }
inline float rounded(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof x);
    bits = (bits + 0x1000) & ~0x1fffu;
    if (x == x) memcpy(&x, &bits, sizeof x);
    return x;
}
// c += a b of 16 x 8 x 8, by a warp: its fragments as PTX lays them out.
template <typename T> void multiply(T *c, const T (&a)[4], const T (&b)[2])
{
    const Lane *lanes = exchange({{a[0], a[1], a[2], a[3], b[0], b[1]}});
    for (int n = 0; n < 4; n++)
        for (int k = 0; k < 8; k++) {
            const unsigned row = threadIdx.x % 32 / 4 + n / 2 * 8, column = threadIdx.x % 4 * 2 + n % 2;
            const T left = lanes[row % 8 * 4 + k % 4].numbers[row / 8 + k / 4 * 2];
            c[n] += left * (T)lanes[column * 4 + k % 4].numbers[4 + k / 4];
        }
}
template <typename T> T atomicAdd(T *at, T more) { return __atomic_fetch_add(at, more, __ATOMIC_RELAXED); }

enum { FORWARDS, BACKWARDS, SHUFFLED };  // in which order the threads of a block go from one barrier to the next

// Run a kernel with ``count`` arguments of 64 bits each. Returns 0, or 1 where some threads wait for others that have ended.
extern "C" int emulate(void *kernel, const int64_t *arguments, int count, int blocks, int threads, int shared_bytes, int order);
