/* What a validation row adds to a score, which the C code and the kernel of a GPU share; ``Work`` is there. All in double
   precision, as a tuned model predicts; NaN where an output is not finite: the mean over rows then is NaN too. */

enum { HIT, LOG_LIKELIHOOD, SQUARED_ERROR, ABSOLUTE_ERROR };

ALWAYS_INLINE double row_score(const Work *w, const int classes, int64_t f, const real *z, int64_t row) {
    if (!classes) {
        double gap = z[0] * w->target_scale[f] + w->target_center[f] - w->target[row];
        return w->row_score == ABSOLUTE_ERROR ? fabs(gap) : gap * gap;
    }
    const real *present = w->present + f * w->outputs;
    int64_t label = ((const int64_t *)w->y)[row], best = -1; /* the largest, of several the first */
    for (int64_t k = 0; k < w->outputs; k++) {
        if (present[k] == 0) continue;
        if (z[k] - z[k] != 0) return NAN;
        if (best < 0 || z[k] > z[best]) best = k;
    }
    if (w->row_score == HIT) return best == label;
    double sum = 0, top = z[best], least = -36.043653389117154, most = -2.2204460492503136e-16;
    for (int64_t k = 0; k < w->outputs; k++)
        if (present[k] != 0) sum += exp(z[k] - top);
    double log_p = present[label] != 0 ? z[label] - top - log(sum) : least;
    return log_p < least ? least : log_p > most ? most : log_p; /* p as scikit-learn holds it: 2^-52 from 0 and 1 */
}
