/* Find the k entries of largest magnitude of a vector by counting, without a copy or anything of its size.

   Magnitudes sort like the bits of floats without their sign. Those above a floor, suggested by a sample, are counted
   by their upper bits (all bits of bf16); in fp32, those that share the threshold's upper bits are then counted by
   their lower 16. A last pass collects entries above the threshold and the first of those equal to it. A floor that
   was too high is given up, which only costs time. NaN counts as smaller than any number.

   Compiled by compile.py, called by topk.py. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "common.h"

enum { UPPER_BINS = 1 << 15, BLOCK = 32, SAMPLE = 1 << 13 };

/* 0 for NaN, otherwise the bits of the magnitude plus 1. */
INLINE uint32_t key_of(const void *values, long n, int halves) {
    uint32_t bits, largest = halves ? 0x7f80 : 0x7f800000;
    if (halves) bits = ((const uint16_t *)values)[n] & 0x7fff;
    else bits = ((const uint32_t *)values)[n] & 0x7fffffff;
    return bits > largest ? 0 : bits + 1;
}

/* Mark which of up to BLOCK entries from `start` on reach a key: one bit each. */
INLINE uint32_t reaching(const void *values, int halves, long start, long last, uint32_t key) {
#if defined(__AVX512BW__)
    if (last - start >= BLOCK && key && halves) {
        __m512i bits = _mm512_loadu_si512((const uint16_t *)values + start);
        bits = _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff));
        return _mm512_cmpge_epu16_mask(bits, _mm512_set1_epi16(key - 1)) &
               _mm512_cmple_epu16_mask(bits, _mm512_set1_epi16(0x7f80));
    }
    if (last - start >= BLOCK && key) {
        uint32_t which = 0;
        for (int part = 0; part < BLOCK; part += 16) {
            __m512i bits = _mm512_loadu_si512((const uint32_t *)values + start + part);
            bits = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
            which |= (uint32_t)(_mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32(key - 1)) &
                                _mm512_cmple_epu32_mask(bits, _mm512_set1_epi32(0x7f800000))) << part;
        }
        return which;
    }
#endif
    uint32_t which = 0;
    for (long i = start; i < start + BLOCK && i < last; i++)
        which |= (uint32_t)(key_of(values, i, halves) >= key) << (i - start);
    return which;
}

/* Loop over each i in [first, last) whose entry reaches a key, in ascending order. */
#define EACH_REACHING(key) \
    for (long start = first, i; start < last; start += BLOCK) \
        for (uint32_t which = reaching(values, halves, start, last, key); \
             which && (i = start + __builtin_ctz(which), 1); which &= which - 1)

/* Estimate from a sample the lower end of a bin that slightly more than k of n entries reach; 0 if it cannot tell.
   The stride is odd: an even one would see few columns of a weight whose width is a power of two. */
INLINE uint32_t likely_floor(const void *values, int halves, long n, long k, uint32_t *counts, int lower_bits) {
    long stride = n / SAMPLE | 1, sample = 0, beyond;
    if (n < 4 * SAMPLE) return 0;
    memset(counts, 0, UPPER_BINS * sizeof *counts);
    for (long i = 0; i < n; i += stride, sample++) counts[key_of(values, i, halves) >> lower_bits]++;
    double expected = (double)k * sample / n;
    return bin_of(counts, 1, UPPER_BINS, (long)(1.05 * expected + 4 * sqrt(expected)) + 8, &beyond) << lower_bits;
}

INLINE void select_top(const void *values, int halves, long n, long k, int64_t *out, uint32_t *counts, long *found,
                       int threads) {
    int lower_bits = halves ? 0 : 16;
    uint32_t low = likely_floor(values, halves, n, k, counts, lower_bits), threshold = 0;
    long above = 0;
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int me = omp_get_thread_num(), all = omp_get_num_threads();
        long first = n / all * me, last = me + 1 == all ? n : n / all * (me + 1), larger = 0, equal = 0;
        uint32_t *mine = counts + (size_t)me * BINS;
        for (int enough = 0; !enough;) {
            long counted = 0;
            memset(mine, 0, UPPER_BINS * sizeof *mine);
            EACH_REACHING(low) mine[key_of(values, i, halves) >> lower_bits]++, counted++;
            found[me] = counted;
            #pragma omp barrier
            long together = 0;
            for (int thread = 0; thread < all; thread++) together += found[thread];
            enough = together >= k;
            #pragma omp barrier
            #pragma omp single
            if (enough) threshold = bin_of(counts, all, UPPER_BINS, k, &above) << lower_bits;
            else low = 0;
        }
        if (lower_bits) {
            uint32_t upper = threshold;
            memset(mine, 0, BINS * sizeof *mine);
            EACH_REACHING(upper) {
                uint32_t key = key_of(values, i, halves);
                if (key >> 16 == upper >> 16) mine[key & 0xffff]++;
            }
            #pragma omp barrier
            #pragma omp single
            {
                long beyond;
                threshold |= bin_of(counts, all, BINS, k - above, &beyond);
                above += beyond;
            }
        }
        if (all > 1)
            EACH_REACHING(threshold) key_of(values, i, halves) > threshold ? larger++ : equal++;
        found[2 * me] = larger;
        found[2 * me + 1] = equal;
        #pragma omp barrier
        long at = 0, equals_wanted = k - above;
        for (int thread = 0; thread < me; thread++) {
            long taken = found[2 * thread + 1] < equals_wanted ? found[2 * thread + 1] : equals_wanted;
            at += found[2 * thread] + taken;
            equals_wanted -= taken;
        }
        EACH_REACHING(threshold) {
            if (key_of(values, i, halves) > threshold) out[at++] = i;
            else if (equals_wanted > 0) equals_wanted--, out[at++] = i;
        }
    }
}

/* out [k]: their indices, ascending; of equals the first. 1 <= k <= n. values: fp32, or bf16 where `halves`.
   Buffers: counts [threads * BINS] words, found [2 * threads]. */
void top_k_magnitude(const void *values, int halves, long n, long k, int64_t *out, uint32_t *counts, long *found,
                     int threads) {
    if (halves) select_top(values, 1, n, k, out, counts, found, threads);
    else select_top(values, 0, n, k, out, counts, found, threads);
}

long counting_words(void) { return BINS; }
