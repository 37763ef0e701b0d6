// The few C functions that Python calls. Which path runs is decided once, from what this CPU can do.
#include "path.h"

#include "jobs.h"

#define EXPORT __attribute__((visibility("default")))

namespace {

struct Choice {
    const Path* path;
    RangeFunction adam;
};

// 0 portable, 1 avx2, 2 avx512; a path that this CPU lacks falls to the next lower one.
Choice choose(int best) {
#if defined(__x86_64__) && !defined(DS_FP8_PORTABLE_ONLY)
    __builtin_cpu_init();
    if (best >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return {&path_avx512, adam_avx512};
    if (best >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {&path_avx2, adam_avx2};
#endif
    return {&path_portable, adam_portable};
}

Choice chosen = {nullptr, nullptr};

}  // namespace

extern "C" {

// Restricts the choice; returns the name of the path that will run.
EXPORT const char* ds_fp8_choose(int best) {
    chosen = choose(best);
    return chosen.path->name;
}

EXPORT void ds_fp8_set_openmp(void (*parallel)(void (*)(void*), void*, unsigned, unsigned), int (*thread_num)(),
                       int (*num_threads)()) {
    set_openmp(parallel, thread_num, num_threads);
}

EXPORT void ds_fp8_run(int operation, const void* job, int64_t units, int64_t grain, int threads) {
    RangeFunction function = operation == ADAM ? chosen.adam : chosen.path->operations[operation];
    run_parallel(function, job, units, grain, threads);
}

// Sizes of the job structs, in the order of the operations, for the check at load.
EXPORT int64_t ds_fp8_job_bytes(int operation) {
    static const int64_t bytes[OPERATIONS] = {
        sizeof(QuantizeJob), sizeof(DequantizeJob), sizeof(FlatEncodeJob), sizeof(FlatSumJob),
        sizeof(TileJob),     sizeof(TileJob),       sizeof(AdamJob),
    };
    return operation >= 0 && operation < OPERATIONS ? bytes[operation] : -1;
}

// The hash of the sources that this library was made from.
EXPORT const char* ds_fp8_sources() { return DS_FP8_SOURCES; }
}
