/* Update the deltas in one pass over state and weight: AdamW (section 3.2), SM3 (section 3.3).

   Shapes: K active entries of one weight [R, C], sorted by row and column. Formulas and their order are those of
   spiel/optimizers.py, every operation rounded to fp32 and none fused with another (-ffp-contract=off). Then
   effective = (float(base) + delta) rounded to the weight's dtype, from the delta as stored. `halves` next to a
   pointer: it points to bf16, not to fp32. The result does not depend on the number of threads.

   Compiled by compile.py, called by updates.py. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "common.h"

enum { PIECE = 1024 };

static inline float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t rounded(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static void get(const void *from, int halves, long start, long count, float *into) {
    if (!halves) memcpy(into, (const float *)from + start, count * sizeof *into);
    else for (long k = 0; k < count; k++) into[k] = widened(((const uint16_t *)from)[start + k]);
}

/* The values then equal the stored ones. */
static void put(void *to, int halves, long start, long count, float *values) {
    if (!halves) {
        memcpy((float *)to + start, values, count * sizeof *values);
        return;
    }
    for (long k = 0; k < count; k++) {
        uint16_t half = rounded(values[k]);
        ((uint16_t *)to)[start + k] = half;
        values[k] = widened(half);
    }
}

/* The places of one weight's entries, and the part [start, start + size) of the flattened weight to write. */
struct target {
    const int32_t *row_starts; /* [R + 1] */
    const void *columns;       /* [K] uint16, or int32 */
    int wide;
    long rows, width;
    void *weight; /* [size]; NULL: nothing is written */
    const void *base; /* [E]: base values of the entries in the part, in order */
    int halves;       /* of weight and base */
    long start, size, first; /* first: number of entries before the part */
};

static inline long column_of(const struct target *to, long entry) {
    return to->wide ? ((const int32_t *)to->columns)[entry] : ((const uint16_t *)to->columns)[entry];
}

/* Write weight = base + delta for entries [from, to), all of one row. */
static void write_row(const struct target *to, long row, long from, long until, const float *deltas) {
    for (long k = from; k < until; k++) {
        long place = row * to->width + column_of(to, k) - to->start;
        if (place < 0 || place >= to->size) continue;
        long known = k - to->first;
        if (to->halves) {
            float value = widened(((const uint16_t *)to->base)[known]) + deltas[k - from];
            ((uint16_t *)to->weight)[place] = rounded(value);
        } else {
            ((float *)to->weight)[place] = ((const float *)to->base)[known] + deltas[k - from];
        }
    }
}

static long row_of(const struct target *to, long entry) {
    long low = 0, high = to->rows - 1;
    while (low < high) {
        long middle = low + (high - low + 1) / 2;
        if (to->row_starts[middle] <= entry) low = middle;
        else high = middle - 1;
    }
    return low;
}

/* cohort: uint8, or int16 where `many`: selects each delta's step size and denominator. */
void adamw_write(long entries, void *deltas, int delta_halves, const void *gradients, int gradient_halves,
                 void *exp_avg, int average_halves, float *exp_avg_sq, const void *cohort, int many,
                 const float *step_sizes, const float *denominators, float decay, float weight1, float beta2,
                 float weight2, float eps, const struct target *target, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long start = 0; start < entries; start += PIECE) {
        long count = entries - start < PIECE ? entries - start : PIECE;
        float delta[PIECE], gradient[PIECE], mean[PIECE], step[PIECE], divisor[PIECE], *square = exp_avg_sq + start;
        get(deltas, delta_halves, start, count, delta);
        get(gradients, gradient_halves, start, count, gradient);
        get(exp_avg, average_halves, start, count, mean);
        for (long k = 0; k < count; k++) {
            long member = many ? ((const int16_t *)cohort)[start + k] : ((const uint8_t *)cohort)[start + k];
            step[k] = step_sizes[member];
            divisor[k] = denominators[member];
        }
        for (long k = 0; k < count; k++) {
            float towards = gradient[k] - mean[k];
            mean[k] = weight1 < 0.5f ? mean[k] + weight1 * towards : gradient[k] - towards * (1.0f - weight1);
            square[k] = square[k] * beta2 + weight2 * gradient[k] * gradient[k];
            delta[k] = delta[k] * decay + step[k] * mean[k] / (sqrtf(square[k]) / divisor[k] + eps);
        }
        put(exp_avg, average_halves, start, count, mean);
        put(deltas, delta_halves, start, count, delta);
        if (!target->weight) continue;
        for (long row = row_of(target, start), from = start; from < start + count; row++) {
            long until = target->row_starts[row + 1] < start + count ? target->row_starts[row + 1] : start + count;
            write_row(target, row, from, until, delta + (from - start));
            from = until;
        }
    }
}

/* row [R], col [C]: the accumulators, non-negative, which grow by maxima. largest: a buffer of threads * C floats. */
void sm3_write(void *deltas, int delta_halves, const void *gradients, int gradient_halves, float *row, float *col,
               float *largest, float decay, float step_size, float eps, const struct target *target, int threads) {
    long width = target->width;
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *mine = largest + omp_get_thread_num() * width;
        memset(mine, 0, width * sizeof *mine);
        #pragma omp for schedule(dynamic, 16)
        for (long r = 0; r < target->rows; r++) {
            float before = row[r], most = before;
            long end = target->row_starts[r + 1];
            for (long start = target->row_starts[r]; start < end; start += PIECE) {
                long count = end - start < PIECE ? end - start : PIECE;
                float delta[PIECE], gradient[PIECE], nu[PIECE];
                get(deltas, delta_halves, start, count, delta);
                get(gradients, gradient_halves, start, count, gradient);
                for (long k = 0; k < count; k++) {
                    float of_column = col[column_of(target, start + k)];
                    nu[k] = (before < of_column ? before : of_column) + gradient[k] * gradient[k];
                }
                for (long k = 0; k < count; k++) {
                    long column = column_of(target, start + k);
                    most = nu[k] > most ? nu[k] : most;
                    mine[column] = nu[k] > mine[column] ? nu[k] : mine[column];
                }
                for (long k = 0; k < count; k++)
                    delta[k] = delta[k] * decay + step_size * gradient[k] / sqrtf(nu[k] + eps);
                put(deltas, delta_halves, start, count, delta);
                if (target->weight) write_row(target, r, start, start + count, delta);
            }
            row[r] = most;
        }
        int all = omp_get_num_threads();
        #pragma omp for schedule(static)
        for (long c = 0; c < width; c++)
            for (int n = 0; n < all; n++) {
                float found = largest[n * width + c];
                col[c] = found > col[c] ? found : col[c];
            }
    }
}
