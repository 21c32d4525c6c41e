/* Dot products of sampled columns (appendix B of the paper): entries of left^T right, which is never formed.

   Shapes: T tokens; R rows, C columns of a weight; left [T, R], right [T, C], contiguous.

   Both factors are transposed a few tokens at a time, so that each column's tokens are contiguous: BLOCK words of 32
   bits, one float each or two bf16. A row's words then stay in registers while the columns of its entries stream past.
   Each entry is summed by one thread and in one order, whatever the number of threads. Vectors are the compiler's own;
   only the product of bf16 pairs is specific to a processor.

   Compiled by compile.py, called by sampled_columns.py. */

#include <stdint.h>
#include <string.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "common.h"

enum { LANES = 16, VECTORS = 8, BLOCK = LANES * VECTORS, AHEAD = 8 };

typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef float half_of_floats __attribute__((vector_size(32)));
typedef float quad __attribute__((vector_size(16)));

typedef int32_t places __attribute__((vector_size(16)));

#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#define SHUFFLED_QUADS(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})

INLINE words load(const void *from) { words v; memcpy(&v, from, sizeof v); return v; }

/* Compute sum + a * b by lanes: of floats, or of the two bf16 in each word. */
INLINE floats add_products(floats sum, words a, words b, int pairs) {
    if (!pairs) return sum + (floats)a * (floats)b;
#if defined(__AVX512BF16__)
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (floats)(a << 16) * (floats)(b << 16);
    return sum + (floats)(a & 0xffff0000u) * (floats)(b & 0xffff0000u);
#endif
}

INLINE quad by_quarters(floats v) {
    half_of_floats low, high;
    quad first, second;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, (char *)&v + sizeof low, sizeof high);
    low += high;
    memcpy(&first, &low, sizeof first);
    memcpy(&second, (char *)&low + sizeof first, sizeof second);
    return first + second;
}

/* Sum the lanes of each of four vectors. */
INLINE quad totals(const floats *v) {
    quad a = by_quarters(v[0]), b = by_quarters(v[1]), c = by_quarters(v[2]), d = by_quarters(v[3]);
    quad ab = SHUFFLED_QUADS(a, b, 0, 4, 1, 5) + SHUFFLED_QUADS(a, b, 2, 6, 3, 7);
    quad cd = SHUFFLED_QUADS(c, d, 0, 4, 1, 5) + SHUFFLED_QUADS(c, d, 2, 6, 3, 7);
    return SHUFFLED_QUADS(ab, cd, 0, 1, 4, 5) + SHUFFLED_QUADS(ab, cd, 2, 3, 6, 7);
}

/* Compute out[k] += row . right[columns[k]] for the entries of one row; `more` entries of other rows follow them. */
INLINE void dots_of_row(const uint32_t *row, const uint32_t *right, const void *columns, int wide, float *out,
                        long count, long more, int pairs) {
    const uint16_t *narrow_column = columns;
    const int32_t *wide_column = columns;
#define COLUMN(k) (right + (size_t)(wide ? wide_column[k] : narrow_column[k]) * BLOCK)
    words mine[VECTORS];
    for (int v = 0; v < VECTORS; v++) mine[v] = load(row + v * LANES);
    long k = 0;
    for (; k + 4 <= count; k += 4) {
        const uint32_t *at[4];
        floats sum[4];
        for (int e = 0; e < 4; e++) at[e] = COLUMN(k + e), sum[e] = (floats){0};
        if (k + AHEAD + 4 <= count + more)
            for (int e = 0; e < 4; e++)
                for (int v = 0; v < VECTORS; v++) __builtin_prefetch(COLUMN(k + AHEAD + e) + v * LANES);
        for (int v = 0; v < VECTORS; v++)
            for (int e = 0; e < 4; e++) sum[e] = add_products(sum[e], mine[v], load(at[e] + v * LANES), pairs);
        quad now;
        memcpy(&now, out + k, sizeof now);
        now += totals(sum);
        memcpy(out + k, &now, sizeof now);
    }
    for (; k < count; k++) {
        floats sum[4] = {{0}};
        for (int v = 0; v < VECTORS; v++) sum[0] = add_products(sum[0], mine[v], load(COLUMN(k) + v * LANES), pairs);
        out[k] += totals(sum)[0];
    }
#undef COLUMN
}

/* Transpose: rows[i][j] becomes rows[j][i]. */
INLINE void transpose(words *rows) {
    words pairs[LANES], quads[LANES];
    for (int i = 0; i < LANES; i += 2) {
        pairs[i] = SHUFFLED(rows[i], rows[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        pairs[i + 1] = SHUFFLED(rows[i], rows[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            words a = pairs[i + j], b = pairs[i + 2 + j];
            quads[i + 2 * j] = SHUFFLED(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            quads[i + 2 * j + 1] = SHUFFLED(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    for (int i = 0; i < 4; i++) { /* quads[4 q + i]: rows 4 q .. 4 q + 3 of the columns i, 4 + i, 8 + i, 12 + i */
        words a = quads[i], b = quads[4 + i], c = quads[8 + i], d = quads[12 + i];
        words even = SHUFFLED(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        words odd = SHUFFLED(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        words even_below = SHUFFLED(c, d, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        words odd_below = SHUFFLED(c, d, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        rows[i] = SHUFFLED(even, even_below, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        rows[4 + i] = SHUFFLED(odd, odd_below, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        rows[8 + i] = SHUFFLED(even, even_below, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        rows[12 + i] = SHUFFLED(odd, odd_below, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
}

/* Load sixteen (at the edge `count`) numbers of one token, or of two as pairs; zeros for missing tokens. */
INLINE words of_tokens(const char *factor, long width, long token, long tokens, long column, long count, int pairs) {
    words got = {0};
    if (!pairs) {
        if (token < tokens) memcpy(&got, factor + (token * width + column) * 4, count * 4);
        return got;
    }
    uint16_t first[LANES] = {0}, second[LANES] = {0};
    const char *at = factor + (token * width + column) * 2;
    if (token < tokens) memcpy(first, at, count * 2);
    if (token + 1 < tokens) memcpy(second, at + width * 2, count * 2);
    for (int i = 0; i < LANES; i++) got[i] = first[i] | (uint32_t)second[i] << 16;
    return got;
}

/* Set columns[c][word ..] to LANES words of columns [from, until) of a factor [tokens, width], from token `start`. */
INLINE void lay_out(const char *factor, long width, long start, long tokens, int word, long from, long until,
                    uint32_t *columns, int pairs) {
    long per_word = pairs ? 2 : 1, first = start + word * per_word;
    int all = first + LANES * per_word <= tokens;
    const char *next = factor + (first + LANES * per_word) * width * (4 / per_word); /* tokens of the next words */
    for (long column = from; column < until; column += LANES) {
        long count = until - column < LANES ? until - column : LANES;
        words rows[LANES];
        for (int line = 0; line < LANES; line++) __builtin_prefetch(next + column * LANES * 4 + line * 64, 0, 2);
        for (int i = 0; i < LANES; i++) {
            long token = first + per_word * i;
            rows[i] = all && count == LANES ? of_tokens(factor, width, token, token + 2, column, LANES, pairs)
                                            : of_tokens(factor, width, token, tokens, column, count, pairs);
        }
        transpose(rows);
        for (long c = 0; c < count; c++) memcpy(columns + (column + c) * BLOCK + word, rows + c, sizeof(words));
    }
}

/* Find the first row of a thread's share: shares are whole rows with about equally many entries. */
static long first_row(const int32_t *starts, long rows, int thread, int threads) {
    long low = 0, high = rows, bound = (long)starts[rows] * thread / threads;
    if (thread == threads) return rows;
    while (low < high) {
        long middle = (low + high) / 2;
        if (starts[middle] < bound) low = middle + 1;
        else high = middle;
    }
    return low;
}

typedef void layer(const char *, long, long, long, int, long, long, uint32_t *);
typedef void dotter(const uint32_t *, const uint32_t *, const void *, float *, long, long);

#define LAYER(name, pairs) \
    static void name(const char *factor, long width, long start, long tokens, int word, long from, long until, \
                     uint32_t *columns) { \
        lay_out(factor, width, start, tokens, word, from, until, columns, pairs); \
    }
LAYER(lay_out_floats, 0)
LAYER(lay_out_pairs, 1)

#define DOTS(name, wide, pairs) \
    static void name(const uint32_t *row, const uint32_t *right, const void *columns, float *out, long k, long more) { \
        dots_of_row(row, right, columns, wide, out, k, more, pairs); \
    }
DOTS(dots_narrow_floats, 0, 0)
DOTS(dots_narrow_pairs, 0, 1)
DOTS(dots_wide_floats, 1, 0)
DOTS(dots_wide_pairs, 1, 1)

/* Compute out[k] += sum over t of left[t, row(k)] * right[t, column(k)], for several lists of entries.

   pairs: the factors are bf16, not fp32. wide: columns are int32, not uint16.
   starts[n] [R + 1]: the first entry of each row of list n in columns[n] [K] and out[n] [K].
   buffer: (R + C) * BLOCK words. */
void column_products(const char *left, const char *right, long tokens, long rows, long width, int pairs, int lists,
                     const int32_t *const *starts, const void *const *columns, int wide, float *const *out,
                     uint32_t *buffer, int threads) {
    uint32_t *lefts = buffer, *rights = buffer + rows * BLOCK;
    layer *lay = pairs ? lay_out_pairs : lay_out_floats;
    dotter *dots = wide ? (pairs ? dots_wide_pairs : dots_wide_floats) : pairs ? dots_narrow_pairs : dots_narrow_floats;
    long column_bytes = wide ? 4 : 2;
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int me = omp_get_thread_num(), all = omp_get_num_threads();
        long first = first_row(starts[0], rows, me, all), end = first_row(starts[0], rows, me + 1, all);
        for (long token = 0; token < tokens; token += BLOCK * (pairs ? 2 : 1)) {
            for (int word = 0; word < BLOCK; word += LANES) lay(left, rows, token, tokens, word, first, end, lefts);
            #pragma omp for schedule(static)
            for (int word = 0; word < BLOCK; word += LANES) lay(right, width, token, tokens, word, 0, width, rights);
            for (long r = first; r < end; r++)
                for (int n = 0; n < lists; n++) {
                    long from = starts[n][r], to = starts[n][r + 1];
                    const char *of_row = (const char *)columns[n] + from * column_bytes;
                    dots(lefts + r * BLOCK, rights, of_row, out[n] + from, to - from, starts[n][rows] - to);
                }
            #pragma omp barrier
        }
    }
}

long words_per_column(void) { return BLOCK; }
