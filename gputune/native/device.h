/* Before the headers that the C code and the kernel of a GPU share: what they find on a GPU. ``real`` is there. */

#ifdef __CUDACC_RTC__ /* NVRTC has no headers */
typedef int int32_t;
typedef long long int64_t;
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#else
#include <math.h>
#include <stdint.h>
#endif

#define ALWAYS_INLINE static __device__ __forceinline__
#define exponential exp
#define root sqrt
typedef real wide;
