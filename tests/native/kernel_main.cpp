// Two epochs of members by the emulated kernel in the file KERNEL: reads and writes what members_main.c does.
#include "emulation.h"
#include KERNEL
#include <mutex>
#include <stdlib.h>

static int train_members(const Work *work, int64_t *next, const int32_t *)
{
    static std::mutex mutex;
    const std::lock_guard<std::mutex> alone(mutex);
    if (*next) return 0;
    *next = work->folds * work->trials;
    static real scratch[SCRATCH];
    static unsigned taken;
    left_out = atoi(getenv("LEFT_OUT"));
    void (*kernel)(const Work *, unsigned *, real *, int, int, int) = train_members;
    const int64_t arguments[] = {(int64_t)work, (int64_t)&taken, (int64_t)scratch, 0, 1 << 20, 2};
    return emulate((void *)kernel, arguments, 6, 1, THREADS, SHARED, atoi(getenv("ORDER")));
}

#define MEMBERS
#include "members_main.c"
