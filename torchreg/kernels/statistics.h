/* Statistics of a tile, a few rows of at most STRIP entries: for weights of type `real`, counted in `count` and summed
   in `sum`. Included once for each choice of these. */

typedef struct {
    double moduli[LANES];
    real largest[LANES];
    count near[LANES];
} NAMED(lanes);

/* At most LANES entries, each with a lane of its own in what it is added to. */
INLINE void NAMED(take)(const real *restrict w, const int64_t n, real near_zero, sum *restrict moduli,
                        sum *restrict squares, count *restrict nonzeros, NAMED(lanes) *restrict all,
                        sum *restrict squares_at, count *restrict nonzeros_at) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        const real modulus = ABS(w[j]);
        const sum square = (sum)modulus * (sum)modulus;
        const count nonzero = w[j] != 0;
        moduli[j] += modulus;
        squares[j] += square;
        nonzeros[j] += nonzero;
        all->near[j] += modulus <= near_zero;
        all->largest[j] = modulus > all->largest[j] ? modulus : all->largest[j];
        squares_at[j] += square;
        nonzeros_at[j] += nonzero;
    }
}

/* True, with the columns' part added, unless float32 was too narrow for the squares; then nothing is added. */
INLINE int NAMED(tile)(const tensor *t, int64_t first, int64_t rows, int64_t at, int64_t n, double near_zero,
                       line *lines, whole *tile, columns into) {
    sum squares_at[STRIP];
    count nonzeros_at[STRIP];
    real buffer[STRIP];
    const int64_t width = t->columns * t->inner;
    NAMED(lanes) all = {{0}, {0}, {0}};
    int64_t finite = rows * n;
    memset(squares_at, 0, (size_t)n * sizeof *squares_at);
    memset(nonzeros_at, 0, (size_t)n * sizeof *nonzeros_at);
    for (int64_t i = 0; i < rows; i++) {
        const real *w = NAMED(load)(t, (first + i) * width + at, n, buffer);
        sum moduli[LANES] = {0}, squares[LANES] = {0}, row_squares = 0;
        count nonzeros[LANES] = {0}, row_nonzeros = 0;
        int64_t j = 0;
#define TAKE(n) \
    NAMED(take)(w + j, n, (real)near_zero, moduli, squares, nonzeros, &all, squares_at + j, nonzeros_at + j)
        for (; j + LANES <= n; j += LANES) TAKE(LANES);
        TAKE(n - j);
#undef TAKE
#pragma omp simd reduction(+ : row_nonzeros)
        for (int64_t k = 0; k < LANES; k++) all.moduli[k] += moduli[k], row_nonzeros += nonzeros[k];
#pragma omp simd
        for (int64_t k = 0; k < LANES / 2; k++) squares[k] += squares[k + LANES / 2];
#pragma omp simd
        for (int64_t k = 0; k < LANES / 4; k++) squares[k] += squares[k + LANES / 4];
        for (int64_t k = 0; k < LANES / 4; k++) row_squares += squares[k];
        lines[i] = (line){row_squares, row_nonzeros};
        /* Of a sum of less, squares have fallen below float32's range. */
        if (!EXACT && (!(row_squares <= LARGEST) || (row_nonzeros > 0 && row_squares < 0x1p-90f))) return 0;
        /* Seldom: else every square is finite. */
        for (j = 0; EXACT && !(row_squares <= LARGEST) && j < n; j++) finite -= !(ABS(w[j]) <= LARGEST);
    }
    *tile = (whole){0, 0, 0, finite};
    for (int64_t j = 0; j < LANES; j++) {
        tile->moduli += all.moduli[j];
        if (all.largest[j] > tile->largest) tile->largest = all.largest[j];
        tile->near += all.near[j];
    }
    if (t->inner == 1) {
        for (int64_t j = 0; j < n; j++) {
            into.squares[at + j] += squares_at[j];
            into.nonzeros[at + j] += nonzeros_at[j];
        }
        return 1;
    }
    for (int64_t j = 0, column = at / t->inner, end = t->inner - at % t->inner; j < n; column++, end += t->inner) {
        double squares = into.squares[column];
        int64_t nonzeros = into.nonzeros[column];
        for (; j < n && j < end; j++) squares += squares_at[j], nonzeros += nonzeros_at[j];
        into.squares[column] = squares, into.nonzeros[column] = nonzeros;
    }
    return 1;
}
