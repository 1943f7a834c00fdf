/* Runs every kernel on numbers made from integers alone, and prints a hash of each result: test_processors.py
   compares what one processor and compiler prints with what another does. */

#include "../../torchreg/kernels/native.c"

#include <stdio.h>

/* ------------------------------------------------------------------ numbers in, hashes out */

enum { LARGEST_SIZE = 33000 };

static uint32_t seed;

static uint32_t draw(void) { return mixed(++seed * GOLDEN); }

/* Over some powers of two; one in eight is a zero, of either sign. */
static double number(void) {
    const double fraction = 1 + draw() * 0x1p-32, sign = draw() & 1 ? -1 : 1;
    const int exponent = (int)(draw() % 12) - 10;
    return sign * (draw() % 8 ? ldexp(fraction, exponent) : 0);
}

static int bytes_of(int64_t dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2; }

static void fill_with(void *to, int64_t dtype, int64_t n, double scale) {
    for (int64_t i = 0; i < n; i++) {
        if (dtype == FLOAT64)
            ((double *)to)[i] = scale * number();
        else if (dtype == FLOAT32)
            ((float *)to)[i] = (float)(scale * number());
        else if (dtype == BFLOAT16) {
            const float x = (float)(scale * number());
            narrowed(&x, to, i, 1, NULL, OF_WEIGHT);
        } else
            ((uint16_t *)to)[i] = (uint16_t)(draw() & 0xbbffu); /* below 1, and finite */
    }
}

/* Bits of any kind, what is not finite among them. */
static void fill_with_bits(void *to, int64_t dtype, int64_t n) {
    for (int64_t i = 0; i < n * bytes_of(dtype); i++) ((uint8_t *)to)[i] = (uint8_t)draw();
}

static uint64_t hash;

/* FNV-1a; one NaN is as good as another, whose sign depends on the processor. */
static void take_bits(uint64_t bits, int is_nan) {
    for (int i = 0; i < 8; i++) hash = (hash ^ (is_nan ? 0xff : bits >> 8 * i & 0xff)) * 0x100000001b3u;
}

static void take_number(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    take_bits(bits, isnan(x));
}

static void take_numbers(const void *from, int64_t dtype, int64_t n) {
    for (int64_t i = 0; from && i < n; i++)
        if (dtype == FLOAT64)
            take_number(((const double *)from)[i]);
        else if (dtype == FLOAT32)
            take_number(((const float *)from)[i]);
        else
            take_number(from_bfloat16(((const uint16_t *)from)[i]));
}

static void take_counts(const int64_t *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) take_bits((uint64_t)from[i], 0);
}

static void begin(uint32_t of) { hash = 0xcbf29ce484222325u, seed = of * 1000003; }

/* ------------------------------------------------------------------ every kernel */

static double w[LARGEST_SIZE], g[LARGEST_SIZE], m[LARGEST_SIZE], v[LARGEST_SIZE], top[LARGEST_SIZE], from[LARGEST_SIZE];
static uint8_t support[LARGEST_SIZE];

static void every_penalty(void) {
    static const int64_t SIZES[] = {1, 7, 16, 1023, 2000, 17000};
    for (int i = 0; i < 2 * 3 * 3 * 2 * 2 * 6; i++) {
        const int64_t dtype = i % 2, task = i / 2 % 3, elastic = i / 6 % 3, anchored = i / 18 % 2, odd = i / 36 % 2;
        const int64_t size = SIZES[i / 72];
        begin((uint32_t)(i / 6 * 6 + dtype)); /* the same numbers for every task */
        fill_with(w, dtype, size, 1), fill_with(from, dtype, size, 1), fill_with(g, dtype, size, 1);
        if (odd) fill_with_bits(w, dtype, size / 8);
        if (anchored) memcpy(from, w, (size_t)(size / 2 * bytes_of(dtype)));
        const soft_tensor t = {w, g, anchored ? from : NULL, size, dtype, elastic < 2 ? 0.3 : 0, elastic ? 0.2 : 0};
        double value = 0;
        const double slope = 1.7;
        torchreg_soft(&t, 1, task, &value, task == GRADIENT ? &slope : NULL, NULL, 1);
        take_number(value);
        const uint64_t of_value = hash;
        take_numbers(g, dtype, size);
        printf("penalty dtype=%d elastic=%d anchored=%d odd=%d size=%d: %s %016llx\n", (int)dtype, (int)elastic,
               (int)anchored, (int)odd, (int)size, task == VALUE ? "value" : task == BOTH ? "both" : "gradient",
               (unsigned long long)(task == GRADIENT ? hash : of_value));
        if (task == BOTH)
            printf("added dtype=%d elastic=%d anchored=%d odd=%d size=%d %016llx\n", (int)dtype, (int)elastic,
                   (int)anchored, (int)odd, (int)size, (unsigned long long)hash);
    }
}

static void every_adam(void) {
    static const int64_t DTYPES[] = {FLOAT32, FLOAT64, BFLOAT16};
    const int64_t size = 1100;
    for (int i = 0; i < 3 * 2 * 2 * 2 * 4; i++) {
        const int64_t dtype = DTYPES[i % 3];
        const int amsgrad = i / 3 % 2, anchored = i / 6 % 2, elastic = i / 12 % 2, kind = i / 24;
        begin((uint32_t)i);
        fill_with(w, dtype, size, 1), fill_with(from, dtype, size, 1);
        memset(m, 0, sizeof m), memset(v, 0, sizeof v), memset(top, 0, sizeof top);
        if (anchored) memcpy(from, w, (size_t)(size / 2 * bytes_of(dtype)));
        double step = 0;
        const adam_tensor t = {w, g, m, v, amsgrad ? top : NULL, anchored ? from : NULL, &step, FLOAT64, size, dtype};
        adam_numbers c = {.unit = 0.9, .lr = 0.01, .sign = 1, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .key = -1,
                          .strength1 = 0.05, .strength2 = elastic ? 0.3 : 0};
        if (kind == 1) c.decay = 0.1, c.sign = -1, c.key = 12345;
        if (kind == 2) c.decay = 0.1, c.decoupled = 1, c.beta1 = 0.3;
        for (int count = 0; count < 18; count++) {
            /* Gradients over many powers of ten, and moments that fade. */
            fill_with(g, dtype, size, count == 1 ? 1e-6 : count > 2 ? 0 : 1);
            if (kind == 3 && count == 2) fill_with_bits(g, dtype, size);
            int64_t ends;
            torchreg_adam(&t, &c, 1, &ends, NULL, 1);
        }
        take_numbers(w, dtype, size), take_numbers(m, dtype, size), take_numbers(v, dtype, size);
        take_numbers(top, dtype, size), take_number(c.rate), take_number(c.correction);
        printf("adam dtype=%d amsgrad=%d anchored=%d elastic=%d kind=%d %016llx\n", (int)dtype, amsgrad, anchored,
               elastic, kind, (unsigned long long)hash);
    }
}

static void every_sgd(void) {
    static const int64_t DTYPES[] = {FLOAT32, FLOAT64, BFLOAT16};
    const int64_t size = 1100;
    for (int i = 0; i < 3 * 3 * 2 * 2 * 3; i++) {
        const int64_t dtype = DTYPES[i % 3];
        const int momentum = i / 3 % 3, anchored = i / 9 % 2, elastic = i / 18 % 2, kind = i / 36;
        begin((uint32_t)i);
        fill_with(w, dtype, size, 1), fill_with(from, dtype, size, 1);
        memset(m, 0, sizeof m);
        if (anchored) memcpy(from, w, (size_t)(size / 2 * bytes_of(dtype)));
        float step = 0;
        const sgd_tensor t = {w, g, momentum ? m : NULL, anchored ? from : NULL, &step, FLOAT32, size, dtype};
        sgd_numbers c = {.unit = 1, .lr = 0.1, .sign = 1, .momentum = 0.9, .gain = 1, .key = -1, .strength1 = 0.05,
                         .strength2 = elastic ? 0.3 : 0};
        if (momentum == 2) c.ahead = 0.9;
        if (kind == 1) c.decay = 0.1, c.sign = -1, c.key = 12345;
        for (int count = 0; count < 4; count++) {
            fill_with(g, dtype, size, 1);
            if (kind == 2 && count == 2) fill_with_bits(g, dtype, size);
            int64_t ends;
            torchreg_sgd(&t, &c, 1, &ends, NULL, 1);
        }
        take_numbers(w, dtype, size), take_numbers(m, dtype, size);
        printf("sgd dtype=%d momentum=%d anchored=%d elastic=%d kind=%d %016llx\n", (int)dtype, momentum, anchored,
               elastic, kind, (unsigned long long)hash);
    }
}

static void every_power(void) {
    static const double BETAS[] = {0, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999};
    for (int i = 0; i < 10; i++) {
        begin(0);
        for (int n = 0; n < 3000; n++) take_number(power(BETAS[i], n));
        for (double n = 3000; n < 1e20; n *= 1.25) take_number(power(BETAS[i], floor(n)));
        printf("power beta=%g %016llx\n", BETAS[i], (unsigned long long)hash);
    }
}

static void every_statistic(void) {
    static const int64_t SHAPES[][3] = {{1, 1, 1}, {1, 2500, 1}, {40, 3, 1}, {17, 16, 1}, {33, 100, 1}, {19, 1025, 1},
                                        {5, 7, 9}, {20, 10, 25}};
    static const double SCALES[] = {1, 1e-30, 1e25, 0}; /* the last for bits of any kind */
    for (int i = 0; i < 4 * 8 * 4 * 2; i++) {
        const int64_t dtype = i % 4, *shape = SHAPES[i / 4 % 8], size = shape[0] * shape[1] * shape[2];
        const int scale = i / 32 % 4, renewed = i / 128;
        begin((uint32_t)i);
        if (SCALES[scale] != 0)
            fill_with(w, dtype, size, SCALES[scale]);
        else
            fill_with_bits(w, dtype, size);
        memset(support, 0, sizeof support);
        static int64_t counts[5000];
        static double sums[5000];
        memset(counts, 0, sizeof counts), memset(sums, 0, sizeof sums);
        const tensor t = {w, dtype, shape[0], shape[1], shape[2], renewed ? support : NULL, counts, sums};
        torchreg_statistics(&t, 1, 0.125, NULL, 1);
        take_counts(counts, 4 + shape[0] + shape[1]), take_numbers(sums, FLOAT64, 3 + shape[0] + shape[1]);
        for (int64_t j = 0; j < size; j++) take_bits(support[j], 0);
        printf("statistics dtype=%d shape=%d,%d,%d scale=%g renewed=%d %016llx\n", (int)dtype, (int)shape[0],
               (int)shape[1], (int)shape[2], SCALES[scale], renewed, (unsigned long long)hash);
    }
}

int main(void) {
    every_penalty(), every_adam(), every_sgd(), every_power(), every_statistic();
    return 0;
}
