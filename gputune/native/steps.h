/* What the generated code of a member's step is made of (modules/member_code.py), before it. */

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

/* M: the memories that a step finds, A: room for what it makes, S: numbers of the host. */
typedef void (*Function)(char **M, char *A, const double *S);

/* A step calls a loop many times: as copies of it in one long function they would take many seconds to build. */
#define NOINLINE __attribute__((noinline))
