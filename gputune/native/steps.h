/* The functions that the generated kernels of a member's step call (modules/kernels/writer.py), and
   the function that runs the steps. The kernels follow after this header. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>

#ifdef DOUBLE
typedef double real;
#else
typedef float real;
#endif
#define root sqrt

/* glibc also has vector versions of these functions, exact to 4 units in the last place. These
   declarations let loops use them. */
#if defined(__GLIBC__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GLIBC_PREREQ(2, 22)
#define OF_VECTORS(name) \
    __attribute__((simd("notinbranch"), const)) double(name)(double); \
    __attribute__((simd("notinbranch"), const)) float(name##f)(float);
OF_VECTORS(sin)
OF_VECTORS(cos)
OF_VECTORS(log)
#endif
#if __GLIBC_PREREQ(2, 35)
OF_VECTORS(erf)
OF_VECTORS(erfc)
OF_VECTORS(log1p)
OF_VECTORS(log2)
OF_VECTORS(log10)
OF_VECTORS(exp2)
OF_VECTORS(expm1)
OF_VECTORS(tan)
OF_VECTORS(atan)
OF_VECTORS(sinh)
OF_VECTORS(cosh)
#endif
#endif

#include "product.h"
#include "functions.h"
#include "selection.h"
#include "step_functions.h"

/* The functions of gputune's library. They must be set before the first step. */
static const StepFunctions *library;

void use_library(const StepFunctions *functions) { library = functions; }

/* The interpreter of a member's steps (modules/member_code.py). A step is a list of numbers: the
   number of entries that follow, then calls. A call has: kernel, number of places, number of sizes,
   and index of its first number from the host. Then, for each place: memory (-1: none) and first
   byte. Then the sizes. */

typedef void (*Kernel)(char *const *P, const double *S, const int64_t *N);

enum { MOST = 64 }; /* most places of a call */

static const int64_t *take_call(const int64_t *call, const Kernel *kernels, char *const *M, const double *S) {
    char *places[MOST];
    const int64_t *place = call + 4, *sizes = place + 2 * call[1];
    for (int64_t j = 0; j < call[1]; j++, place += 2) places[j] = place[0] < 0 ? 0 : M[place[0]] + place[1];
    kernels[call[0]](places, S + call[3], sizes);
    return sizes + call[2];
}

/* Runs ``count`` steps. M: the memories of the steps; the first one is scratch memory for their
   results. */
void take_steps(int64_t count, const int64_t *const *steps, const Kernel *kernels, char *const *M,
                const double *const *S) {
    for (int64_t i = 0; i < count; i++)
        for (const int64_t *call = steps[i] + 1, *end = call + *steps[i]; call < end;)
            call = take_call(call, kernels, M, S[i]);
}
