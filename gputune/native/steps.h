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

#include "product.h"
#include "functions.h"
#include "layers.h"

/* M: the memories that a step finds, A: room for what it makes, S: numbers of the host. */
typedef void (*Function)(char **M, char *A, const double *S);

/* A step calls a loop many times: as copies of it in one long function they would take many seconds to build. */
#define NOINLINE __attribute__((noinline))
