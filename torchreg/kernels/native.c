/* The kernels of one pass, with a plain C interface: pointers, sizes and numbers, in tables of eight-byte entries. */

#include "native.h"

/* Counted up with every change of a table below, so that a library of another version is not called. */
EXPORT int64_t torchreg_version(void) { return 1; }

/* ------------------------------------------------------------------ statistics */

enum { TILE = 16, STRIP = 512, CHUNKS = 32 };

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
    double moduli, squares, largest;
    int64_t nonzeros, near, finite;
} line;

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
    for (int64_t first = c->first; first < c->last; first += TILE) {
        const int64_t rows = c->last - first < TILE ? c->last - first : TILE;
        for (int64_t at = 0; at < width; at += STRIP) {
            const int64_t n = width - at < STRIP ? width - at : STRIP;
            if (t->dtype == FLOAT64)
                tile_double(t, first, rows, at, n, near_zero, lines, c->own);
            else if (!tile_quick(t, first, rows, at, n, near_zero, lines, c->own))
                tile_wide(t, first, rows, at, n, near_zero, lines, c->own);
            for (int64_t i = 0; i < rows; i++) {
                const line *l = lines + i;
                c->counts[0] += l->nonzeros, c->counts[1] += l->near, c->counts[2] += l->finite;
                c->sums[0] += l->moduli, c->sums[1] += l->squares;
                if (l->largest > c->sums[2]) c->sums[2] = l->largest;
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
