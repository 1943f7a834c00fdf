/* λ₁Σ|w − w₀| + λ₂Σ(w − w₀)² of one block of weights of type `real`, and its gradient; included once for each type. The
   constants leave a loop without branches: `summed` wants the two sums, `written` the gradient, and `added` has it added
   to what is there. `elastic` is for λ₂ ≠ 0, `anchored` for w₀ ≠ 0. */

INLINE soft_sums NAMED(soft)(const soft_tensor *t, double slope, int64_t first, int64_t last, const int summed,
                             const int written, const int added, const int elastic, const int anchored) {
    const real *restrict w = t->w, *restrict anchor = t->anchor;
    real *restrict gradient = t->gradient;
    /* Rounded as torch's autograd rounds them: the incoming slope times a strength, in the weights' dtype. */
    const real l1 = (real)slope * (real)t->l1, l2 = (real)slope * (real)t->l2;
    double moduli = 0, squares = 0;
#pragma omp simd reduction(+ : moduli, squares)
    for (int64_t i = first; i < last; i++) {
        const real away = anchored ? w[i] - anchor[i] : w[i];
        if (summed) moduli += ABS(away);
        if (summed && elastic) squares += (double)away * (double)away;
        if (written) {
            const real sign = (real)((away > 0) - (away < 0)), one = l1 * sign;
            const real both = elastic ? one + l2 * (2 * away) : one;
            gradient[i] = added ? gradient[i] + both : both;
        }
    }
    return (soft_sums){moduli, squares};
}

EVERY_PROCESSOR soft_sums NAMED(torchreg_soft)(const soft_tensor *t, double slope, int64_t first, int64_t last,
                                               int task) {
    const int elastic = t->l2 != 0, anchored = t->anchor != NULL;
#define CHOOSE(ELASTIC, ANCHORED)                                                                             \
    if (elastic == ELASTIC && anchored == ANCHORED) {                                                         \
        if (task == VALUE) return NAMED(soft)(t, slope, first, last, 1, 0, 0, ELASTIC, ANCHORED);             \
        if (task == GRADIENT) return NAMED(soft)(t, slope, first, last, 0, 1, 0, ELASTIC, ANCHORED);          \
        return NAMED(soft)(t, slope, first, last, 1, 1, 1, ELASTIC, ANCHORED);                                \
    }
    CHOOSE(0, 0)
    CHOOSE(0, 1)
    CHOOSE(1, 0)
    CHOOSE(1, 1)
#undef CHOOSE
    return (soft_sums){0, 0};
}
