// Work shared between threads: the ones that PyTorch has already woken.
//
// PyTorch runs its own loops on an OpenMP runtime (libgomp, libomp or libiomp5), whose idle threads spin for a while.
// A second pool would fight them for the cores, and linking one runtime by name might load a second copy. So Python
// looks which runtime is already in the process and hands over its entry points; all of them export the GNU ones.
// Without any, std::threads are made for the call.
#pragma once

#include <stdint.h>

typedef void (*RangeFunction)(const void* job, int64_t first, int64_t last);

void set_openmp(void (*parallel)(void (*)(void*), void*, unsigned, unsigned), int (*thread_num)(), int (*num_threads)());

// Runs function(job, first, last) over [0, units), in at most `threads` contiguous ranges of at least `grain` units.
void run_parallel(RangeFunction function, const void* job, int64_t units, int64_t grain, int threads);
