/* What all kernels in C share: threads where the compiler has OpenMP and one where not, functions that become part of
   their callers, thresholds by counting. */

#include <stddef.h>
#include <stdint.h>

#if defined(_OPENMP)
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

#define INLINE static inline __attribute__((always_inline))

enum { BINS = 1 << 16 };

/* The bin of the k-th largest of `bins`; *beyond becomes how many lie in larger ones. counts: [threads, BINS]. */
INLINE uint32_t bin_of(const uint32_t *counts, int threads, int bins, long k, long *beyond) {
    *beyond = 0;
    for (uint32_t bin = bins - 1;; bin--) {
        long here = 0;
        for (int thread = 0; thread < threads; thread++) here += counts[(size_t)thread * BINS + bin];
        if (*beyond + here >= k || bin == 0) return bin;
        *beyond += here;
    }
}
