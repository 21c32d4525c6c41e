/* Drop and grow for one weight (sections 3.2 and 3.3), in a few passes over sorted lists; the results are sorted too.

   Shapes: K active entries, C candidates, k up for replacement. The k of largest key are found by counting keys: scores
   and estimates are at least 0, and the bits of such floats sort like the numbers. Ties go to the smaller index.

   Compiled by compile.py, called by drop_grow.py. */

#include <stdint.h>
#include <string.h>

#include "common.h"

enum { LARGEST = 0x7fffffff };

INLINE uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, sizeof bits); return bits; }

/* The key of a product of two accumulators; 0 if that is NaN (infinity times 0). */
INLINE uint32_t product_key(float a, float b) { float product = a * b; return product >= 0 ? bits_of(product) : 0; }

/* Find the k-th largest of n keys, 1 <= k <= n; *equal becomes the number of keys equal to it among the k largest. */
static uint32_t kth_largest(const uint32_t *keys, long n, long k, long *equal) {
    uint32_t counts[BINS] = {0};
    long above, beyond;
    for (long i = 0; i < n; i++) counts[keys[i] >> 16]++;
    uint32_t upper = bin_of(counts, 1, BINS, k, &above);
    memset(counts, 0, sizeof counts);
    for (long i = 0; i < n; i++)
        if (keys[i] >> 16 == upper) counts[keys[i] & 0xffff]++;
    uint32_t lower = bin_of(counts, 1, BINS, k - above, &beyond);
    *equal = k - above - beyond;
    return upper << 16 | lower;
}

/* Set kept[i] = 0 for the k entries of smallest score. */
static void drop_smallest(const float *scores, long active, long k, uint8_t *kept, uint32_t *keys) {
    memset(kept, 1, active);
    if (k == 0) return;
    long equal;
    for (long i = 0; i < active; i++) keys[i] = LARGEST - bits_of(scores[i]);
    uint32_t last = kth_largest(keys, active, k, &equal);
    for (long i = 0; i < active; i++) kept[i] = keys[i] < last || (keys[i] == last && equal-- <= 0);
}

/* Count how many of the k entries of smallest score can be dropped. The dropped ones that are not candidates must not
   outnumber the `fresh`, inactive candidates: the only others that can grow are dropped candidates, which then stay.
   leaving: marks the entries that are not candidates. */
static long droppable(const float *scores, const uint8_t *leaving, long active, long fresh, long k, uint32_t *keys) {
    long others = 0, before = 0, equal;
    for (long i = 0; i < active; i++) {
        keys[i] = leaving[i] ? LARGEST - bits_of(scores[i]) + 1 : 0;
        others += leaving[i];
    }
    if (k <= fresh || others <= fresh) return k;
    uint32_t one_too_many = kth_largest(keys, active, fresh + 1, &equal);
    for (long i = 0; i < active; i++) {
        uint32_t key = LARGEST - bits_of(scores[i]) + 1;
        if (key == one_too_many && leaving[i]) equal--;
        before += key > one_too_many || (key == one_too_many && equal > 0);
    }
    return before < k ? before : k;
}

/* order: the source of each entry of the merged list; grown ones are numbered after the active ones. */
static void merge(const int32_t *indices, const uint8_t *kept, long active, const int32_t *grown, long count,
                  int64_t *order) {
    long at = 0, next = 0;
    for (long i = 0; i < active; i++) {
        while (next < count && grown[next] < indices[i]) order[at++] = active + next++;
        if (kept[i]) order[at++] = i;
    }
    while (next < count) order[at++] = active + next++;
}

/* Drop and grow by gradient (SFT-AG): see `exchange_by_gradient` of spiel/drop_grow.py. Returns the number grown.

   Writes kept [K], grown [k], grown_candidates [k], order [K]. Buffers: keys [max(K, C)], places [C]. */
long exchange_by_gradient(const int32_t *indices, const float *scores, long active, const int32_t *candidates,
                          const float *mean, long count, long k, uint8_t *kept, int32_t *grown,
                          int64_t *grown_candidates, int64_t *order, uint32_t *keys, int32_t *places) {
    long fresh = 0, growing = 0, equal = 0, i = 0;
    memset(kept, 1, active);
    for (long c = 0; c < count; c++) {
        while (i < active && indices[i] < candidates[c]) i++;
        places[c] = i < active && indices[i] == candidates[c] ? i : -1;
        if (places[c] < 0) fresh++;
        else kept[i] = 0; /* for now: marks entries that are not candidates */
    }
    k = droppable(scores, kept, active, fresh, k, keys);
    drop_smallest(scores, active, k, kept, keys);
    if (k > 0) {
        for (long c = 0; c < count; c++) /* none can be chosen that stays */
            keys[c] = places[c] >= 0 && kept[places[c]] ? 0 : (bits_of(mean[c]) & LARGEST) + 1;
        uint32_t last = kth_largest(keys, count, k, &equal);
        for (long c = 0; c < count; c++) {
            if (keys[c] < last || (keys[c] == last && equal-- <= 0)) continue;
            if (places[c] >= 0) kept[places[c]] = 1;
            else grown[growing] = candidates[c], grown_candidates[growing++] = c;
        }
    }
    merge(indices, kept, active, grown, growing, order);
    return growing;
}

/* Count the columns, sorted from the largest, whose product with this row reaches a key; at most `most`. */
INLINE long reached(float row, const float *columns, long most, uint32_t key) {
    long low = 0;
    while (low < most) {
        long middle = (low + most) / 2;
        if (product_key(row, columns[middle]) >= key) low = middle + 1;
        else most = middle;
    }
    return low;
}

/* Count the products of all rows, sorted from the largest, and columns that reach a key, along a staircase. */
static long reached_by_all(const float *rows, long height, const float *columns, long width, uint32_t key) {
    long total = 0, border = width;
    for (long r = 0; r < height && border > 0; r++) {
        while (border > 0 && product_key(rows[r], columns[border - 1]) < key) border--;
        total += border;
    }
    return total;
}

static long count_at_least(const uint32_t *keys, long n, uint32_t key) {
    long total = 0;
    for (long i = 0; i < n; i++) total += keys[i] >= key;
    return total;
}

/* Drop k entries and grow k by accumulators (SFT-MA): see `exchange_by_accumulators` of spiel/drop_grow.py.

   row [height], col [width]; rows, columns: the same sorted from the largest, with each column's original place.
   Writes kept [K], grown [k], order [K]. Buffers: keys [K], marks [2 ceil(width / 64)]. */
void exchange_by_accumulators(const int32_t *indices, const float *scores, long active, const float *row,
                              const float *rows, long height, const float *col, const float *columns,
                              const int64_t *column_order, long width, long k, uint8_t *kept, int32_t *grown,
                              int64_t *order, uint32_t *keys, uint64_t *marks) {
    drop_smallest(scores, active, k, kept, keys);
    if (k == 0) {
        merge(indices, kept, active, grown, 0, order);
        return;
    }
    for (long i = 0, r = 0; i < active; i++) {
        while (indices[i] >= (r + 1) * width) r++;
        keys[i] = product_key(row[r], col[indices[i] - r * width]);
    }
    uint32_t low = 0, high = product_key(rows[0], columns[0]) + 1; /* free(low) >= k > free(high) */
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        long reach = reached_by_all(rows, height, columns, width, middle);
        if (reach >= k && reach - count_at_least(keys, active, middle) >= k) low = middle;
        else high = middle;
    }
    long level = k - (reached_by_all(rows, height, columns, width, high) - count_at_least(keys, active, high));
    long words = (width + 63) / 64, growing = 0;
    uint64_t *above = marks, *equal = marks + words;
    for (long r = 0, i = 0; r < height; r++) {
        long from = i, larger = reached(row[r], columns, width, high);
        while (i < active && indices[i] < (r + 1) * width) i++;
        long reach = level > 0 ? reached(row[r], columns, width, low) : larger;
        if (reach == 0) continue;
        memset(marks, 0, 2 * words * sizeof *marks);
        for (long c = 0; c < larger; c++) above[column_order[c] >> 6] |= 1ull << (column_order[c] & 63);
        for (long c = larger; c < reach; c++) equal[column_order[c] >> 6] |= 1ull << (column_order[c] & 63);
        for (long n = from; n < i; n++) {
            long c = indices[n] - r * width;
            above[c >> 6] &= ~(1ull << (c & 63));
            equal[c >> 6] &= ~(1ull << (c & 63));
        }
        for (long w = 0; w < words; w++)
            for (uint64_t left = above[w] | equal[w]; left && growing < k; left &= left - 1) {
                int bit = __builtin_ctzll(left);
                if (!(above[w] >> bit & 1) && level-- <= 0) continue;
                grown[growing++] = r * width + w * 64 + bit;
            }
    }
    merge(indices, kept, active, grown, k, order);
}
