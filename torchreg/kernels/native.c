/* The kernels of one pass, with a plain C interface: pointers, sizes and numbers, in tables of eight-byte entries. */

#include "native.h"

/* Counted up with every change of a table below, so that a library of another version is not called. */
EXPORT int64_t torchreg_version(void) { return 5; }

/* ------------------------------------------------------------------ statistics */

enum { TILE = 16, STRIP = 1024, CHUNKS = 32 };

/* One contiguous weight of rows × columns × inner entries. `counts` gets zeros, near zeros, nonfinite entries, changes
   of support, then the nonzeros of every row and every column; `sums` gets Σ|w|, Σw², max|w|, then Σw² of every row
   and column. All of them start at 0. */
typedef struct {
    const void *w;
    int64_t dtype, rows, columns, inner;
    uint8_t *support; /* where it was nonzero the last time, or null */
    int64_t *counts;
    double *sums;
} tensor;

typedef struct {
    double squares;
    int64_t nonzeros;
} line;

typedef struct {
    double moduli, largest;
    int64_t near, finite;
} whole;

typedef struct {
    double *squares;
    int64_t *nonzeros;
} columns;

INLINE const float *load_wide(const tensor *t, int64_t at, int64_t n, float *buffer) {
    if (t->dtype == FLOAT32) return (const float *)t->w + at;
    const uint16_t *w = (const uint16_t *)t->w + at;
    if (t->dtype == BFLOAT16)
        for (int64_t j = 0; j < n; j++) buffer[j] = from_bfloat16(w[j]);
    else
        for (int64_t j = 0; j < n; j++) buffer[j] = from_float16(w[j]);
    return buffer;
}

#define load_quick load_wide
#define load_double(t, at, n, buffer) ((void)(n), (void)(buffer), (const double *)(t)->w + (at))

/* Blocks of float32 sums are added up in double: an error of 1e-7, where one float32 sum may be off by 1e-2. */
#define NAMED(name) name##_quick
#define EXACT 0
#define real float
#define sum float
#define count int32_t
#define ABS fabsf
#define LARGEST FLT_MAX
#include "statistics.h"
#undef NAMED
#undef EXACT
#undef sum

#define NAMED(name) name##_wide
#define EXACT 1
#define sum double
#include "statistics.h"
#undef NAMED
#undef real
#undef count
#undef ABS
#undef LARGEST

#define NAMED(name) name##_double
#define real double
#define count int64_t
#define ABS fabs
#define LARGEST DBL_MAX
#include "statistics.h"
#undef NAMED
#undef EXACT
#undef real
#undef sum
#undef count
#undef ABS
#undef LARGEST

INLINE int64_t renew(const tensor *t, int64_t at, int64_t n) {
    int32_t changed = 0;
    uint8_t *support = t->support + at;
#define RENEW(type, zero)                  \
    {                                      \
        const type *w = (const type *)t->w + at; \
        for (int64_t j = 0; j < n; j++) {  \
            const uint8_t now = !(zero);   \
            changed += now != support[j];  \
            support[j] = now;              \
        }                                  \
    }
    if (t->dtype == FLOAT32)
        RENEW(float, w[j] == 0)
    else if (t->dtype == FLOAT64)
        RENEW(double, w[j] == 0)
    else
        RENEW(uint16_t, (w[j] & 0x7fff) == 0)
    return changed;
}

typedef struct {
    const tensor *t;
    int64_t first, last; /* rows */
    int64_t counts[4];
    double sums[3];
    columns own;
} chunk;

typedef struct {
    chunk *chunks;
    double near_zero;
} statistics;

EVERY_PROCESSOR void torchreg_statistics_of(void *all, int64_t index) {
    const double near_zero = ((statistics *)all)->near_zero;
    chunk *c = ((statistics *)all)->chunks + index;
    const tensor *t = c->t;
    const int64_t width = t->columns * t->inner;
    line lines[TILE];
    whole tile;
    for (int64_t first = c->first; first < c->last; first += TILE) {
        const int64_t rows = c->last - first < TILE ? c->last - first : TILE;
        for (int64_t at = 0; at < width; at += STRIP) {
            const int64_t n = width - at < STRIP ? width - at : STRIP;
            if (t->dtype == FLOAT64)
                tile_double(t, first, rows, at, n, near_zero, lines, &tile, c->own);
            else if (!tile_quick(t, first, rows, at, n, near_zero, lines, &tile, c->own))
                tile_wide(t, first, rows, at, n, near_zero, lines, &tile, c->own);
            c->counts[1] += tile.near, c->counts[2] += tile.finite;
            c->sums[0] += tile.moduli;
            if (tile.largest > c->sums[2]) c->sums[2] = tile.largest;
            for (int64_t i = 0; i < rows; i++) {
                const line *l = lines + i;
                c->counts[0] += l->nonzeros;
                c->sums[1] += l->squares;
                t->counts[4 + first + i] += l->nonzeros;
                t->sums[3 + first + i] += l->squares;
                if (t->support) c->counts[3] += renew(t, (first + i) * width + at, n);
            }
        }
    }
}

/* The same chunks for any number of threads, so that the sums are the same. */
static int64_t rows_in_a_chunk(const tensor *t) {
    static const int64_t LEAST = 32768; /* entries, for which it pays to wake a thread */
    const int64_t width = t->columns * t->inner;
    int64_t rows = (t->rows + CHUNKS - 1) / CHUNKS;
    if (rows < LEAST / width) rows = LEAST / width;
    return (rows + TILE - 1) / TILE * TILE;
}

static int is_empty(const tensor *t) { return t->rows * t->columns * t->inner == 0; }

/* 0, or 1 where memory is short: then nothing has changed. */
EXPORT int torchreg_statistics(const tensor *tensors, int64_t n, double near_zero, team parallel, int64_t threads) {
    const tensor *end = tensors + n;
    int64_t tasks = 0, scratch = 0;
    for (const tensor *t = tensors; t < end; t++) {
        if (is_empty(t)) continue;
        const int64_t rows = rows_in_a_chunk(t), chunks = (t->rows + rows - 1) / rows;
        tasks += chunks, scratch += chunks * t->columns;
    }
    if (tasks == 0) return 0;
    chunk *chunks = calloc((size_t)tasks, sizeof *chunks), *c = chunks;
    columns all = {calloc((size_t)scratch, sizeof(double)), calloc((size_t)scratch, sizeof(int64_t))}, own = all;
    const int short_of_memory = !chunks || !all.squares || !all.nonzeros;
    if (!short_of_memory) {
        for (const tensor *t = tensors; t < end; t++) {
            if (is_empty(t)) continue;
            const int64_t rows = rows_in_a_chunk(t);
            for (int64_t first = 0; first < t->rows; first += rows, c++) {
                c->t = t, c->first = first, c->last = first + rows < t->rows ? first + rows : t->rows, c->own = own;
                own.squares += t->columns, own.nonzeros += t->columns;
            }
        }
        statistics job = {chunks, near_zero};
        run(torchreg_statistics_of, &job, tasks, parallel, threads);
        for (c = chunks; c < chunks + tasks; c++) {
            const tensor *t = c->t;
            for (int i = 0; i < 4; i++) t->counts[i] += c->counts[i];
            t->sums[0] += c->sums[0], t->sums[1] += c->sums[1];
            if (c->sums[2] > t->sums[2]) t->sums[2] = c->sums[2];
            for (int64_t j = 0; j < t->columns; j++) {
                t->counts[4 + t->rows + j] += c->own.nonzeros[j];
                t->sums[3 + t->rows + j] += c->own.squares[j];
            }
        }
        for (const tensor *t = tensors; t < end; t++) {
            const int64_t size = t->rows * t->columns * t->inner;
            t->counts[0] = size - t->counts[0], t->counts[2] = size - t->counts[2];
            if (isnan(t->sums[0])) t->sums[2] = t->sums[0];
        }
    }
    free(chunks), free(all.squares), free(all.nonzeros);
    return short_of_memory;
}

/* ------------------------------------------------------------------ steps */

enum { BLOCK = 16384, STRIDE = 64 };

/* Memory of the same order for all: entry i of each belongs to weight i. */
typedef struct {
    void *w;
    const void *gradient;
    void *mean, *square;
    void *largest;      /* amsgrad's, or null */
    const void *anchor; /* where the penalty has its minimum; null for 0 */
    void *step;         /* the count of steps, a number of type step_dtype */
    int64_t step_dtype, size, dtype;
} adam_tensor;

/* `unit` is the mean of a constant gradient 1; the rest is what torch's groups say. What follows is filled in here:
   w ← prox(keep·w − rate·m/(√v/correction + eps)) with gradients of sign·g + coupled·w, where l1 and l2 are strengths
   times the numerator of the prox's step. Where `fade` is not 0, moments of dead weights (w at the penalty's minimum)
   that have faded below the normal numbers become 0: arithmetic on them is a hundred times slower, and they would never
   get there by themselves. */
typedef struct {
    double unit, lr, decay, decoupled, sign, beta1, beta2, eps, key, strength1, strength2;
    double rate, keep, coupled, correction, l1, l2, fade, word;
} adam_numbers;

typedef struct {
    void *w;
    const void *gradient;
    void *buffer; /* null without momentum */
    const void *anchor;
    void *step; /* the count of steps that chooses the random bits, or null */
    int64_t step_dtype, size, dtype;
} sgd_tensor;

/* `unit` is how far a constant gradient 1 moves a weight at lr 1. w ← prox(w − lr·b), b ← momentum·b + gain·gradient;
   or with `ahead`, Nesterov's momentum, prox(w − lr·(gradient + ahead·b)). What follows is filled in here: l1 and l2 are
   strengths times the prox's step. A dead weight's buffer fades at every step, which is bound by memory alone. */
typedef struct {
    double unit, lr, decay, sign, momentum, gain, ahead, key, strength1, strength2;
    double l1, l2, word;
} sgd_numbers;

/* Faded moments become 0 every so many steps: too rarely to cost anything, often enough that none slow down many. */
enum { FADE = 16 };

static double counted(void *step, int64_t dtype) {
    return dtype == FLOAT32 ? ++*(float *)step : ++*(double *)step;
}

#define GOLDEN 0x9e3779b9u /* 2^32 over the golden ratio */

/* Wellons' lowbias32, a bijection; `random_bits.py` says what the bits are for, and has the same numbers. */
INLINE uint32_t mixed(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

/* What the random bits of a weight in this step begin with; −1 to round to nearest. */
static double word_of(double key, double count) {
    return key < 0 ? -1.0 : (double)mixed((uint32_t)(int64_t)count * GOLDEN + (uint32_t)key);
}

/* A number in two parts, of twice the digits. */
typedef struct {
    double high, low;
} pair;

/* Veltkamp's split: the upper half of the digits, so that products of halves are exact. */
static double upper(double x) {
    const double many = 0x1.0000002p27 * x;
    return many - (many - x);
}

static pair times(pair a, pair b) {
    const double product = a.high * b.high, a1 = upper(a.high), a2 = a.high - a1, b1 = upper(b.high), b2 = b.high - b1;
    const double lost = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2;
    const double low = lost + (a.high * b.low + a.low * b.high), high = product + low;
    return (pair){high, low - (high - product)};
}

/* βⁿ, which the maths library has by another bit in one of 4,000 cases where the processor fuses products. */
static double power(double beta, double count) {
    pair found = {1, 0}, x = {beta, 0};
    for (uint64_t n = (uint64_t)fmin(fmax(count, 0), 0x1p53); n > 0; n /= 2) {
        if (n % 2) found = times(found, x);
        x = times(x, x);
    }
    return found.high;
}

/* Those of the tensor before, which most share. */
typedef struct {
    double count, beta1, beta2, power1, power2;
} powers;

static void prepare_adam(const adam_tensor *t, adam_numbers *c, powers *known) {
    const double count = counted(t->step, t->step_dtype);
    if (count != known->count || c->beta1 != known->beta1 || c->beta2 != known->beta2)
        *known = (powers){count, c->beta1, c->beta2, power(c->beta1, count), power(c->beta2, count)};
    const double bias = 1 - known->power1, response = c->lr * (c->unit / bias);
    c->rate = c->lr / bias;
    c->correction = sqrt(1 - known->power2);
    c->keep = c->decoupled != 0 ? 1 - c->lr * c->decay : 1;
    c->coupled = c->decoupled != 0 ? 0 : c->decay;
    c->l1 = response * c->strength1, c->l2 = response * c->strength2;
    c->fade = fmod(count, FADE) == 0;
    c->word = word_of(c->key, count);
}

static void prepare_sgd(const sgd_tensor *t, sgd_numbers *c, powers *known) {
    (void)known;
    c->word = word_of(c->key, t->step ? counted(t->step, t->step_dtype) : 0);
    c->l1 = c->lr * c->unit * c->strength1, c->l2 = c->lr * c->unit * c->strength2;
}

#define NAMED(name) name##_float
#define real float
#define ABS fabsf
#define SQRT sqrtf
#define COPYSIGN copysignf
#define TINY FLT_MIN
#include "step.h"
#undef NAMED
#undef real
#undef ABS
#undef SQRT
#undef COPYSIGN
#undef TINY

#define NAMED(name) name##_double
#define real double
#define ABS fabs
#define SQRT sqrt
#define COPYSIGN copysign
#define TINY DBL_MIN
#include "step.h"

/* ------------------------------------------------------------------ bfloat16: wide steps, rounded once */

enum { WIDE = 512 }; /* weights at a time, whose float32 stays in the nearest cache */

/* A word of random bits for each weight, by its place in memory. */
INLINE const uint32_t *fill(uint32_t *random, double word, int64_t first, int64_t n) {
    if (word < 0) return NULL;
    const uint32_t begin = (uint32_t)word, place = (uint32_t)first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) random[i] = mixed((place + (uint32_t)i) ^ begin);
    return random;
}

INLINE void *widened(const void *from, int64_t first, int64_t n, float *to) {
    if (!from) return NULL;
    const uint16_t *narrow = (const uint16_t *)from + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = from_bfloat16(narrow[i]);
    return to;
}

/* What is not finite stays what it is: of a NaN that arithmetic has made, half the bits are one too. */
#define ROUND(added)                                                                 \
    _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {                            \
        uint32_t x;                                                                  \
        memcpy(&x, from + i, sizeof x);                                              \
        const uint32_t finite = (int32_t)(x & 0x7fffffffu) < 0x7f800000 ? ~0u : 0u;  \
        narrow[i] = (uint16_t)((x + ((added) & finite)) >> 16);                      \
    }

/* The three draws that one word has bits for. */
enum { OF_WEIGHT, OF_MEAN, OF_SQUARE };

INLINE void narrowed(const float *from, void *to, int64_t first, int64_t n, const uint32_t *random, const int draw) {
    if (!to) return;
    uint16_t *narrow = (uint16_t *)to + first;
    if (!random)
        ROUND(0x7fffu + (x >> 16 & 1))
    else if (draw == OF_WEIGHT)
        ROUND(random[i] & 0xffffu)
    else if (draw == OF_MEAN)
        ROUND(random[i] >> 16)
    else
        ROUND(random[i] * GOLDEN >> 16)
}

EVERY_HALF void torchreg_adam_bfloat16(const adam_tensor *t, const adam_numbers *c, int64_t first, int64_t last) {
    float w[WIDE], gradient[WIDE], mean[WIDE], square[WIDE], largest[WIDE], anchor[WIDE];
    uint32_t room[WIDE];
    for (int64_t at = first; at < last; at += WIDE) {
        const int64_t n = at + WIDE < last ? WIDE : last - at;
        const uint32_t *random = fill(room, c->word, at, n);
        adam_tensor wide = *t;
        wide.w = widened(t->w, at, n, w), wide.gradient = widened(t->gradient, at, n, gradient);
        wide.mean = widened(t->mean, at, n, mean), wide.square = widened(t->square, at, n, square);
        wide.largest = widened(t->largest, at, n, largest), wide.anchor = widened(t->anchor, at, n, anchor);
        torchreg_adam_float(&wide, c, 0, n);
        narrowed(w, t->w, at, n, random, OF_WEIGHT), narrowed(mean, t->mean, at, n, random, OF_MEAN);
        narrowed(square, t->square, at, n, random, OF_SQUARE), narrowed(largest, t->largest, at, n, random, OF_SQUARE);
    }
}

EVERY_HALF void torchreg_sgd_bfloat16(const sgd_tensor *t, const sgd_numbers *c, int64_t first, int64_t last) {
    float w[WIDE], gradient[WIDE], buffer[WIDE], anchor[WIDE];
    uint32_t room[WIDE];
    for (int64_t at = first; at < last; at += WIDE) {
        const int64_t n = at + WIDE < last ? WIDE : last - at;
        const uint32_t *random = fill(room, c->word, at, n);
        sgd_tensor wide = *t;
        wide.w = widened(t->w, at, n, w), wide.gradient = widened(t->gradient, at, n, gradient);
        wide.buffer = widened(t->buffer, at, n, buffer), wide.anchor = widened(t->anchor, at, n, anchor);
        torchreg_sgd_float(&wide, c, 0, n);
        narrowed(w, t->w, at, n, random, OF_WEIGHT), narrowed(buffer, t->buffer, at, n, random, OF_MEAN);
    }
}

typedef struct {
    const void *tensors, *numbers;
    int64_t n;
    int64_t *ends; /* how many blocks the tensors up to this one have */
} job;

/* The tensor in which a block lies, and where the block begins. */
static int64_t find(const job *all, int64_t block, int64_t *first) {
    int64_t low = 0, high = all->n - 1;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (all->ends[middle] > block)
            high = middle;
        else
            low = middle + 1;
    }
    *first = (block - (low ? all->ends[low - 1] : 0)) * BLOCK;
    return low;
}

#define STEP(name)                                                                                                 \
    static void name##_block(void *data, int64_t block) {                                                          \
        const job *all = data;                                                                                     \
        int64_t first;                                                                                             \
        const int64_t at = find(all, block, &first);                                                               \
        const name##_tensor *t = (const name##_tensor *)all->tensors + at;                                         \
        const name##_numbers *c = (const name##_numbers *)all->numbers + at;                                       \
        const int64_t last = t->size < first + BLOCK ? t->size : first + BLOCK;                                    \
        if (t->dtype == FLOAT32)                                                                                   \
            torchreg_##name##_float(t, c, first, last);                                                            \
        else if (t->dtype == BFLOAT16)                                                                             \
            torchreg_##name##_bfloat16(t, c, first, last);                                                         \
        else                                                                                                       \
            torchreg_##name##_double(t, c, first, last);                                                           \
    }                                                                                                              \
                                                                                                                   \
    /* One step of all tensors; `ends` has room for a number for each. */                                          \
    EXPORT void torchreg_##name(const name##_tensor *tensors, name##_numbers *numbers, int64_t n,                  \
                                int64_t *ends, team parallel, int64_t threads) {                                   \
        job all = {tensors, numbers, n, ends};                                                                     \
        powers known = {0, 0, 0, 1, 1};                                                                            \
        int64_t blocks = 0;                                                                                        \
        for (int64_t i = 0; i < n; i++) {                                                                          \
            prepare_##name(tensors + i, numbers + i, &known);                                                      \
            ends[i] = blocks += (tensors[i].size + BLOCK - 1) / BLOCK;                                             \
        }                                                                                                          \
        run(name##_block, &all, blocks, parallel, threads);                                                        \
    }

STEP(adam)
STEP(sgd)

/* ------------------------------------------------------------------ penalties */

enum { VALUE, GRADIENT, BOTH };

/* The penalty λ₁Σ|w − w₀| + λ₂Σ(w − w₀)² of one weight, dense; gradient and w₀ have the order of its memory. */
typedef struct {
    const void *w;
    void *gradient;     /* null where none is asked for */
    const void *anchor; /* w₀; null for 0 */
    int64_t size, dtype;
    double l1, l2;
} soft_tensor;

typedef struct {
    double moduli, squares;
} soft_sums;

#undef NAMED
#undef real
#undef ABS
#define NAMED(name) name##_float
#define real float
#define ABS fabsf
#include "soft.h"
#undef NAMED
#undef real
#undef ABS

#define NAMED(name) name##_double
#define real double
#define ABS fabs
#include "soft.h"

typedef struct {
    job blocks;
    soft_sums *sums; /* of each block */
    double slope;
    int task;
} soft_job;

static void soft_block(void *data, int64_t block) {
    const soft_job *all = data;
    int64_t first;
    const soft_tensor *t = (const soft_tensor *)all->blocks.tensors + find(&all->blocks, block, &first);
    const int64_t last = t->size < first + BLOCK ? t->size : first + BLOCK;
    all->sums[block] = t->dtype == FLOAT32 ? torchreg_soft_float(t, all->slope, first, last, all->task)
                                           : torchreg_soft_double(t, all->slope, first, last, all->task);
}

/* Adds the penalties to `value` (task VALUE); writes their gradients times `slope`, or times 1 for null (GRADIENT); or
   does the first and adds the gradients to what is there (BOTH). The sum is the same for any number of threads: that of
   blocks, added in order. 0, or 1 where memory is short: then nothing has changed. */
EXPORT int torchreg_soft(const soft_tensor *tensors, int64_t n, int64_t task, double *value, const double *slope,
                         team parallel, int64_t threads) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < n; i++) blocks += (tensors[i].size + BLOCK - 1) / BLOCK;
    int64_t *ends = malloc((size_t)(n + 1) * sizeof *ends);
    soft_sums *sums = malloc((size_t)(blocks + 1) * sizeof *sums);
    const int short_of_memory = !ends || !sums;
    if (!short_of_memory) {
        soft_job all = {{tensors, NULL, n, ends}, sums, slope ? *slope : 1, (int)task};
        blocks = 0;
        for (int64_t i = 0; i < n; i++) ends[i] = blocks += (tensors[i].size + BLOCK - 1) / BLOCK;
        run(soft_block, &all, blocks, parallel, threads);
        for (int64_t i = 0, block = 0; task != GRADIENT && i < n; i++) {
            const soft_tensor *t = tensors + i;
            soft_sums total = {0, 0};
            for (; block < ends[i]; block++) total.moduli += sums[block].moduli, total.squares += sums[block].squares;
            /* A strength of 0 times an infinite sum would be NaN. */
            if (t->l1 != 0) *value += t->l1 * total.moduli;
            if (t->l2 != 0) *value += t->l2 * total.squares;
        }
    }
    free(ends), free(sums);
    return short_of_memory;
}
