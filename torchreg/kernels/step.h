/* The step of one block of weights of type `real`, with the prox in the same pass; included once for each type. The
   constants among the arguments leave a loop without branches; `plain` is one without decay, sign and Nesterov. Memory
   is asked for ahead of the loop: a root, a division and a prox a weight leave the processor little room to do so. */

/* soft(away, t1)/(1 + t2): +0.0 wherever |away| ≤ t1, and NaN where it is NaN. */
INLINE real NAMED(shrunk)(real away, real t1, real t2, const int elastic) {
    const real below = away > t1 ? t1 : away, within = below < -t1 ? -t1 : below;
    const real kept = away - within;
    return elastic ? kept / (1 + t2) : kept;
}

INLINE void NAMED(adam)(const adam_tensor *t, const adam_numbers *c, int64_t first, int64_t last, const int amsgrad,
                        const int elastic, const int anchored, const int plain) {
    real *restrict w = t->w, *restrict mean = t->mean, *restrict square = t->square, *restrict largest = t->largest;
    const real *restrict g = t->gradient, *restrict anchor = t->anchor;
    const real lr = (real)c->rate, keep = (real)c->keep, decay = (real)c->coupled, sign = (real)c->sign;
    const real new1 = (real)(1 - c->beta1), old1 = (real)c->beta1, new2 = (real)(1 - c->beta2), old2 = (real)c->beta2;
    const real scale = (real)(1 / c->correction), eps = (real)c->eps, t1 = (real)c->l1, t2 = (real)(2 * c->l2);
    const int slow = c->beta1 > 0.5;
    for (int64_t at = first; at < last; at += STRIDE) {
        const int64_t end = at + STRIDE < last ? at + STRIDE : last;
        for (int64_t j = at + 4 * STRIDE; j < at + 5 * STRIDE; j += 64 / (int64_t)sizeof(real)) {
            PREFETCH(w + j), PREFETCH(g + j), PREFETCH(mean + j), PREFETCH(square + j);
        }
#pragma omp simd
        for (int64_t i = at; i < end; i++) {
            const real gradient = plain ? g[i] : sign * g[i] + decay * w[i];
            const real change = gradient - mean[i];
            const real m = slow ? mean[i] + new1 * change : gradient - old1 * change; /* as torch's lerp rounds it */
            const real v = old2 * square[i] + new2 * gradient * gradient;
            const real before = amsgrad ? largest[i] : v, top = before > v ? before : v;
            const real inverse = 1 / (SQRT(top) * scale + eps);
            const real moved = keep * w[i] - lr * m * inverse;
            const real from = anchored ? anchor[i] : 0, away = anchored ? moved - from : moved;
            const real kept = NAMED(shrunk)(away, t1 * inverse, t2 * inverse, elastic);
            w[i] = !anchored ? kept : kept == 0 ? from : moved - (away - kept);
            mean[i] = m;
            square[i] = v;
            if (amsgrad) largest[i] = top;
        }
    }
    if (!c->fade) return;
#pragma omp simd
    for (int64_t i = first; i < last; i++) {
        const int dead = w[i] == (anchored ? anchor[i] : 0);
        mean[i] = (dead & (ABS(mean[i]) < TINY)) ? 0 : mean[i];
        square[i] = (dead & (square[i] < TINY)) ? 0 : square[i];
    }
}

INLINE void NAMED(sgd)(const sgd_tensor *t, const sgd_numbers *c, int64_t first, int64_t last, const int momentum,
                       const int elastic, const int anchored, const int plain) {
    real *restrict w = t->w, *restrict buffer = t->buffer;
    const real *restrict g = t->gradient, *restrict anchor = t->anchor;
    const real lr = (real)c->lr, decay = (real)c->decay, sign = (real)c->sign, old = (real)c->momentum;
    const real gain = (real)c->gain, ahead = (real)c->ahead, t1 = (real)c->l1, t2 = (real)(2 * c->l2);
    const int nesterov = !plain && c->ahead != 0;
    for (int64_t at = first; at < last; at += STRIDE) {
        const int64_t end = at + STRIDE < last ? at + STRIDE : last;
        for (int64_t j = at + 4 * STRIDE; j < at + 5 * STRIDE; j += 64 / (int64_t)sizeof(real)) {
            PREFETCH(w + j), PREFETCH(g + j);
            if (momentum) PREFETCH(buffer + j);
        }
#pragma omp simd
        for (int64_t i = at; i < end; i++) {
            const real gradient = plain ? g[i] : sign * g[i] + decay * w[i];
            const real b = momentum ? old * buffer[i] + gain * gradient : gradient;
            const real moved = w[i] - lr * (momentum && nesterov ? gradient + ahead * b : b);
            const real from = anchored ? anchor[i] : 0, away = anchored ? moved - from : moved;
            const real kept = NAMED(shrunk)(away, t1, t2, elastic);
            w[i] = !anchored ? kept : kept == 0 ? from : moved - (away - kept);
            if (momentum) buffer[i] = kept == 0 && ABS(b) < TINY ? 0 : b;
        }
    }
}

/* Each choice of the constants is a loop of its own. */
#define CHOOSE(ELASTIC, ANCHORED)                                        \
    if ((c->l2 != 0) == ELASTIC && (t->anchor != NULL) == ANCHORED) {    \
        if (flag)                                                        \
            STEP(1, ELASTIC, ANCHORED);                                  \
        else                                                             \
            STEP(0, ELASTIC, ANCHORED);                                  \
        return;                                                          \
    }

EVERY_PROCESSOR void NAMED(torchreg_adam)(const adam_tensor *t, const adam_numbers *c, int64_t first, int64_t last) {
    const int flag = t->largest != NULL;
    if (!flag && !t->anchor && c->l2 == 0 && c->sign == 1 && c->coupled == 0) {
        NAMED(adam)(t, c, first, last, 0, 0, 0, 1);
        return;
    }
#define STEP(flag, elastic, anchored) NAMED(adam)(t, c, first, last, flag, elastic, anchored, 0)
    CHOOSE(0, 0)
    CHOOSE(0, 1)
    CHOOSE(1, 0)
    CHOOSE(1, 1)
#undef STEP
}

EVERY_PROCESSOR void NAMED(torchreg_sgd)(const sgd_tensor *t, const sgd_numbers *c, int64_t first, int64_t last) {
    const int flag = t->buffer != NULL;
    if (flag && !t->anchor && c->l2 == 0 && c->sign == 1 && c->decay == 0 && c->ahead == 0) {
        NAMED(sgd)(t, c, first, last, 1, 0, 0, 1);
        return;
    }
#define STEP(flag, elastic, anchored) NAMED(sgd)(t, c, first, last, flag, elastic, anchored, 0)
    CHOOSE(0, 0)
    CHOOSE(0, 1)
    CHOOSE(1, 0)
    CHOOSE(1, 1)
#undef STEP
}
#undef CHOOSE
