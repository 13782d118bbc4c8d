/* What the kernels of a member's step are made of (modules/member_kernels.py), before them. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>

#ifdef DOUBLE
typedef double real;
#else
typedef float real;
#endif

/* Functions that glibc has of whole vectors too, to 4 units of the last place: loops take those where this says so. */
#if defined(__GLIBC__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GLIBC_PREREQ(2, 22)
#define OF_VECTORS(name) \
    __attribute__((simd("notinbranch"), const)) double(name)(double); \
    __attribute__((simd("notinbranch"), const)) float(name##f)(float);
OF_VECTORS(sin)
OF_VECTORS(cos)
OF_VECTORS(log)
#endif
#endif

#include "product.h"
#include "functions.h"
#include "layers.h"
#include "calls.h"
