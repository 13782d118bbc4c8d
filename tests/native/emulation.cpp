// Fibers for the threads of a block, one block after another. ThreadSanitizer is told of fibers and barriers: of a kernel
// that was compiled with it, it finds what no barrier orders. AddressSanitizer guards the end of shared memory.
#include "emulation.h"
#include <stdlib.h>
#include <ucontext.h>
#include <vector>

#define OPTIONAL extern "C" __attribute__((weak))
OPTIONAL void *__tsan_get_current_fiber();
OPTIONAL void *__tsan_create_fiber(unsigned);
OPTIONAL void __tsan_destroy_fiber(void *);
OPTIONAL void __tsan_switch_to_fiber(void *, unsigned);
OPTIONAL void __tsan_acquire(void *);
OPTIONAL void __tsan_release(void *);
OPTIONAL void __asan_poison_memory_region(const void *, size_t);
OPTIONAL void __asan_unpoison_memory_region(const void *, size_t);
#define TSAN(call) do { if (__tsan_create_fiber) call; } while (0)

Index threadIdx, blockIdx, blockDim, gridDim;
int left_out = -1;

namespace {
enum { UNORDERED = 1, STACK = 1 << 16, SHARED = 1 << 18 };  // a switch of fibers orders nothing

struct Barrier {
    unsigned size = 0, count = 0, times = 0;
    char order[2];  // of what came before; two in turn, as a fast thread may be at the next before a slow one leaves
};
struct Fiber {
    ucontext_t context;
    Barrier *waits = nullptr;
    unsigned until = 0;
    bool done = false;
    void *tsan = nullptr;
};

std::vector<Fiber> fibers;
std::vector<Barrier> warps;
std::vector<Lane> lanes;       // what each thread gives to its warp; two halves in turn
std::vector<unsigned> given;
Barrier block;
ucontext_t scheduler;
void *scheduler_tsan, *kernel;
int64_t arguments[16];
char edge;                     // the begin and the end of a block

void leave()
{
    Fiber &self = fibers[threadIdx.x];
    TSAN(__tsan_switch_to_fiber(scheduler_tsan, UNORDERED));
    swapcontext(&self.context, &scheduler);
}

void arrive(Barrier &barrier)
{
    Fiber &self = fibers[threadIdx.x];
    const unsigned time = barrier.times;
    const bool orders = &barrier == &block;  // what a warp does together orders no memory
    if (orders) TSAN(__tsan_release(&barrier.order[time % 2]));
    if (++barrier.count == barrier.size) barrier.count = 0, barrier.times++;
    else {
        self.waits = &barrier, self.until = time;
        leave();
        self.waits = nullptr;
    }
    if (orders) TSAN(__tsan_acquire(&barrier.order[time % 2]));
}

void run()
{
    TSAN(__tsan_acquire(&edge));
    typedef int64_t A;  // more arguments than a kernel has do not harm it
    typedef void (*Kernel)(A, A, A, A, A, A, A, A, A, A, A, A, A, A, A, A);
    const A *a = arguments;
    ((Kernel)kernel)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15]);
    fibers[threadIdx.x].done = true;
    TSAN(__tsan_release(&edge));
    leave();
}

void begin_block(char *stacks)
{
    const unsigned threads = blockDim.x;
    fibers.assign(threads, Fiber()), warps.assign((threads + 31) / 32, Barrier()), block = Barrier();
    lanes.assign(2 * threads, Lane()), given.assign(threads, 0), block.size = threads;
    for (unsigned t = 0; t < threads; t++) {
        Fiber &fiber = fibers[t];
        warps[t / 32].size++;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks + (size_t)t * STACK, fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run, 0);
        TSAN(fiber.tsan = __tsan_create_fiber(0));
    }
    TSAN(__tsan_release(&edge));
}

// In which order n of them have their turns.
struct Turns {
    unsigned n, shift = 0, stride = 1;
    Turns(unsigned n, int order) : n(n)
    {
        if (order == BACKWARDS) shift = stride = n - 1;
        // An odd stride meets every one of a power of 2, else it is 1.
        if (order == SHUFFLED) shift = rand() % n, stride = n & (n - 1) ? 1 : 2 * (rand() % n) + 1;
    }
    unsigned operator()(unsigned i) const { return (shift + i * stride) % n; }
};

// Lets a warp's threads go on; returns how often one did, and takes those that have ended from ``left``.
unsigned run_warp(unsigned warp, int order, unsigned &left)
{
    unsigned moved = 0;
    const Turns lanes(warps[warp].size, order);
    for (unsigned i = 0; i < lanes.n; i++) {
        const unsigned t = 32 * warp + lanes(i);
        Fiber &fiber = fibers[t];
        if (fiber.done || (fiber.waits && fiber.waits->times == fiber.until)) continue;
        threadIdx.x = t, moved++;
        TSAN(__tsan_switch_to_fiber(fiber.tsan, UNORDERED));
        swapcontext(&scheduler, &fiber.context);
        left -= fiber.done;
    }
    return moved;
}

bool finish_block(int order)
{
    for (unsigned left = blockDim.x; left;) {
        bool moved = false;
        const Turns turns(warps.size(), order);
        for (unsigned i = 0; i < turns.n; i++)
            while (run_warp(turns(i), order, left)) moved = true;  // as far ahead of the others as it can
        if (!moved) return false;
    }
    TSAN(__tsan_acquire(&edge));
    for (Fiber &fiber : fibers) TSAN(__tsan_destroy_fiber(fiber.tsan));
    return true;
}
}  // namespace

extern "C" char memory[SHARED] __attribute__((aligned(64)));
char memory[SHARED];

void __syncthreads() { arrive(block); }

const Lane *exchange(const Lane &mine)
{
    const unsigned t = threadIdx.x, half = given[t]++ % 2 * fibers.size();
    lanes[half + t] = mine;
    arrive(warps[t / 32]);
    return &lanes[half + t / 32 * 32];
}

extern "C" void leave_out(int barrier) { left_out = barrier; }

extern "C" int emulate(void *function, const int64_t *given_arguments, int count, int blocks, int threads, int shared_bytes, int order)
{
    kernel = function, gridDim = {(unsigned)blocks, 1, 1}, blockDim = {(unsigned)threads, 1, 1}, blockIdx = {0, 0, 0};
    memcpy(arguments, given_arguments, count * sizeof(int64_t));
    char *stacks = (char *)malloc((size_t)threads * STACK);
    TSAN(scheduler_tsan = __tsan_get_current_fiber());
    if (__asan_poison_memory_region) __asan_poison_memory_region(memory + shared_bytes, SHARED - shared_bytes);
    bool whole = true;
    for (; whole && blockIdx.x < (unsigned)blocks; blockIdx.x++) {
        memset(memory, 0xff, shared_bytes);  // NaN until it is written
        begin_block(stacks);
        whole = finish_block(order);
    }
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(memory, SHARED);
    free(stacks);
    return !whole;
}
