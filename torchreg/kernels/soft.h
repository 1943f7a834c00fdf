/* λ₁Σ|w − w₀| + λ₂Σ(w − w₀)² of one block of weights of type `real`, and its gradient; included once for each type. The
   constants leave a loop without branches: `summed` wants the two sums, `written` the gradient, `added` has it added to
   what is there; `elastic` is for λ₂ ≠ 0, `anchored` for w₀ ≠ 0. */

/* At most LANES weights, each with a lane of its own in the sums. */
INLINE void NAMED(soft_lanes)(const real *restrict w, const real *restrict anchor, real *restrict gradient,
                              const int64_t n, real l1, real l2, real *restrict moduli, double *restrict squares,
                              const int summed, const int written, const int added, const int elastic,
                              const int anchored) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        const real away = anchored ? w[j] - anchor[j] : w[j];
        if (summed) moduli[j] += ABS(away);
        if (summed && elastic) squares[j] += (double)away * (double)away;
        if (written) {
            const real sign = (real)((away > 0) - (away < 0)), one = l1 * sign;
            const real both = elastic ? one + l2 * (2 * away) : one;
            gradient[j] = added ? gradient[j] + both : both;
        }
    }
}

INLINE soft_sums NAMED(soft)(const soft_tensor *t, double slope, int64_t first, int64_t last, const int summed,
                             const int written, const int added, const int elastic, const int anchored) {
    /* Rounded as torch's autograd rounds them: the incoming slope times a strength, in the weights' dtype. */
    const real l1 = (real)slope * (real)t->l1, l2 = (real)slope * (real)t->l2;
    const real *w = t->w, *anchor = t->anchor;
    real *gradient = t->gradient;
    double moduli[LANES] = {0}, squares[LANES] = {0};
    for (int64_t at = first; at < last; at += STRIP) {
        const int64_t end = at + STRIP < last ? at + STRIP : last;
        real strip[LANES] = {0}; /* its Σ|w − w₀|: off by 1e-6 at worst, where one float32 sum may be by 1e-2 */
        int64_t i = at;
#define TAKE(n)                                                                                                       \
    NAMED(soft_lanes)(w + i, anchored ? anchor + i : NULL, written ? gradient + i : NULL, n, l1, l2, strip, squares,  \
                      summed, written, added, elastic, anchored)
        for (; i + LANES <= end; i += LANES) TAKE(LANES);
        TAKE(end - i);
#undef TAKE
        for (int64_t j = 0; summed && j < LANES; j++) moduli[j] += strip[j];
    }
    soft_sums total = {0, 0};
    for (int64_t j = 0; summed && j < LANES; j++) total.moduli += moduli[j], total.squares += squares[j];
    return total;
}

EVERY_PROCESSOR soft_sums NAMED(torchreg_soft)(const soft_tensor *t, double slope, int64_t first, int64_t last,
                                               int task) {
    const int elastic = t->l2 != 0, anchored = t->anchor != NULL;
#define CHOOSE(ELASTIC, ANCHORED)                                                                    \
    if (elastic == ELASTIC && anchored == ANCHORED) {                                                \
        if (task == VALUE) return NAMED(soft)(t, slope, first, last, 1, 0, 0, ELASTIC, ANCHORED);    \
        if (task == GRADIENT) return NAMED(soft)(t, slope, first, last, 0, 1, 0, ELASTIC, ANCHORED); \
        return NAMED(soft)(t, slope, first, last, 1, 1, 1, ELASTIC, ANCHORED);                       \
    }
    CHOOSE(0, 0)
    CHOOSE(0, 1)
    CHOOSE(1, 0)
    CHOOSE(1, 1)
#undef CHOOSE
    return (soft_sums){0, 0};
}
