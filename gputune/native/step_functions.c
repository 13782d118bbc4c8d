/* The functions of the library for the steps of modules (step_functions.h). */

#include <stdint.h>
#include <string.h>
#include <tgmath.h>

#ifdef DOUBLE
typedef double real;
#else
typedef float real;
#endif

#include "product.h"
#include "strided.h"
#include "exponential.h"
#include "convolution.h"
#include "winograd.h"
#include "images.h"
#include "norms.h"
#include "step_functions.h"

static const StepFunctions functions = {
    .matrix_product = matrix_product,
    .turned_product = turned_product,
    .convolution = convolution,
    .convolution_below = convolution_below,
    .convolution_weights = convolution_weights,
    .winograd = winograd,
    .winograd_below = winograd_below,
    .winograd_weights = winograd_weights,
    .max_pool = max_pool,
    .max_pool_below = max_pool_below,
    .resize = resize,
    .batch_norm = batch_norm,
    .batch_norm_slope = batch_norm_slope,
    .group_norm = group_norm,
    .group_norm_slope = group_norm_slope,
    .layer_norm = layer_norm,
    .layer_norm_slope = layer_norm_slope,
    .column_sums = column_sums,
};

/* Returns the functions that the generated kernels call. */
const StepFunctions *step_functions(void) { return &functions; }
