/* Formulas of single numbers, which the C code and the kernel of a GPU share. Before it each says what ``real`` is, the
   type ``wide`` in which gelu is computed, ``exponential`` and ALWAYS_INLINE.

   A number that is not finite stays so: a member that diverges must be seen to have diverged. */

enum { RELU, GELU, SILU, TANH };

ALWAYS_INLINE real activated(const int kind, real z) {
    if (kind == RELU) return z < 0 ? 0 : z; /* NaN is not below 0, and stays */
    if (kind == TANH) return 1 - 2 / (1 + exponential(2 * z));
    if (kind == SILU) return z / (1 + exponential(-z));
    return z * (real)0.5 * (1 + (real)erf(z * (wide)0.70710678118654752));
}

/* The slope in z of what has the slope ``above`` in h = activated(z). relu reads h, the others z. */
ALWAYS_INLINE real slope_in(const int kind, real above, real z, real h) {
    if (kind == RELU) return h <= 0 ? 0 : above;
    if (kind == TANH) {
        real t = 1 - 2 / (1 + exponential(2 * z));
        return above * (1 - t * t);
    }
    if (kind == SILU) {
        real s = 1 / (1 + exponential(-z));
        return above * (s * (1 + z * (1 - s)));
    }
    wide x = z, below = (wide)0.5 * (1 + erf(x * (wide)0.70710678118654752));
    return above * (real)(below + x * (wide)0.39894228040143268 * exp((wide)-0.5 * x * x));
}

/* An input as its fold reads it: scaled, 0 where it is missing. */
ALWAYS_INLINE real scaled(real x, real center, real scale) {
    real value = (x - center) / scale;
    return value == value ? value : 0;
}
