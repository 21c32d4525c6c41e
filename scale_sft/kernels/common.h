/* What all kernels in C share: threads where the compiler has OpenMP and one where not, functions that become part of
   their callers. */

#if defined(_OPENMP)
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

#define INLINE static inline __attribute__((always_inline))
