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
uint64_t exchange(uint64_t bits, unsigned lane);  // what a lane of the warp gave
#define BARRIER(name) do { if ((name) != left_out) __syncthreads(); } while (0)

template <typename T> T __shfl_xor_sync(unsigned, T value, int mask)
{
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = exchange(bits, threadIdx.x % 32 ^ mask);
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <typename T> T atomicAdd(T *at, T more) { return __atomic_fetch_add(at, more, __ATOMIC_RELAXED); }

enum { FORWARDS, BACKWARDS, SHUFFLED };  // in which order the threads of a block go from one barrier to the next

// Run a kernel with ``count`` arguments of 64 bits each. Returns 0, or 1 where some threads wait for others that have ended.
extern "C" int emulate(void *kernel, const int64_t *arguments, int count, int blocks, int threads, int shared_bytes, int order);
