/* Statistics of a tile, a few rows of at most STRIP entries: for weights of type `real`, counted in `count` and summed
   in `sum`. Included once for each choice of these. */

INLINE line NAMED(strip)(const real *restrict w, int64_t n, real near_zero, sum *restrict squares_at,
                         count *restrict nonzeros_at) {
    sum moduli = 0, squares = 0;
    real largest = 0;
    count nonzeros = 0, near = 0, finite = 0;
#pragma omp simd reduction(+ : moduli, squares, nonzeros, near, finite) reduction(max : largest)
    for (int64_t j = 0; j < n; j++) {
        const real modulus = ABS(w[j]);
        const sum square = (sum)modulus * (sum)modulus;
        const count nonzero = w[j] != 0;
        moduli += modulus;
        squares += square;
        nonzeros += nonzero;
        near += modulus <= near_zero;
        if (EXACT) finite += modulus <= LARGEST;
        largest = modulus > largest ? modulus : largest;
        squares_at[j] += square;
        nonzeros_at[j] += nonzero;
    }
    return (line){moduli, squares, largest, nonzeros, near, EXACT ? finite : n};
}

/* True, with the columns' part added, unless float32 was too narrow for the squares; then nothing is added. */
INLINE int NAMED(tile)(const tensor *t, int64_t first, int64_t rows, int64_t at, int64_t n, double near_zero,
                       line *lines, columns into) {
    sum squares_at[STRIP];
    count nonzeros_at[STRIP];
    real buffer[STRIP];
    const int64_t width = t->columns * t->inner;
    memset(squares_at, 0, (size_t)n * sizeof *squares_at);
    memset(nonzeros_at, 0, (size_t)n * sizeof *nonzeros_at);
    for (int64_t i = 0; i < rows; i++) {
        const real *w = NAMED(load)(t, (first + i) * width + at, n, buffer);
        lines[i] = NAMED(strip)(w, n, (real)near_zero, squares_at, nonzeros_at);
        /* Squares of less would fall below float32's range, and so would those of all the row. */
        if (!EXACT && (!(lines[i].squares <= FLT_MAX) || (lines[i].largest > 0 && lines[i].largest < 0x1p-50)))
            return 0;
    }
    if (t->inner == 1) {
        for (int64_t j = 0; j < n; j++) {
            into.squares[at + j] += squares_at[j];
            into.nonzeros[at + j] += nonzeros_at[j];
        }
        return 1;
    }
    for (int64_t j = 0, column = at / t->inner, left = t->inner - at % t->inner; j < n; j++) {
        into.squares[column] += squares_at[j];
        into.nonzeros[column] += nonzeros_at[j];
        if (--left == 0) column++, left = t->inner;
    }
    return 1;
}
