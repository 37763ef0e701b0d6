#include "threads.h"

#include <pthread.h>

namespace {

void (*openmp_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
int (*openmp_thread_num)() = nullptr;
int (*openmp_num_threads)() = nullptr;

struct Team {
    RangeFunction function;
    const void* job;
    int64_t units;
};

// Contiguous ranges, the same for the same sizes: on a machine with several memory nodes a thread meets again the
// pages that it touched first.
void run_share(const Team* team, int64_t index, int64_t count) {
    int64_t first = team->units * index / count, last = team->units * (index + 1) / count;
    if (first < last) team->function(team->job, first, last);
}

void openmp_share(void* data) {
    run_share(static_cast<const Team*>(data), openmp_thread_num(), openmp_num_threads());
}

struct Member {
    const Team* team;
    int64_t index, count;
    pthread_t thread;
    bool started;
};

void* member_main(void* data) {
    const Member* member = static_cast<const Member*>(data);
    run_share(member->team, member->index, member->count);
    return nullptr;
}

}  // namespace

void set_openmp(void (*parallel)(void (*)(void*), void*, unsigned, unsigned), int (*thread_num)(),
                int (*num_threads)()) {
    openmp_parallel = parallel;
    openmp_thread_num = thread_num;
    openmp_num_threads = num_threads;
}

void run_parallel(RangeFunction function, const void* job, int64_t units, int64_t grain, int threads) {
    constexpr int64_t MOST_THREADS = 512;
    int64_t count = threads < MOST_THREADS ? threads : MOST_THREADS;
    if (grain > 0 && count > units / grain) count = units / grain;
    if (count <= 1) return function(job, 0, units);
    Team team = {function, job, units};
    if (openmp_parallel) return openmp_parallel(openmp_share, &team, unsigned(count), 0);
    Member members[MOST_THREADS];
    for (int64_t i = 1; i < count; i++) {
        members[i] = {&team, i, count, {}, false};
        members[i].started = pthread_create(&members[i].thread, nullptr, member_main, &members[i]) == 0;
    }
    run_share(&team, 0, count);
    for (int64_t i = 1; i < count; i++) {
        if (members[i].started) pthread_join(members[i].thread, nullptr);
        else run_share(&team, i, count);  // the system gave no thread: do its share here
    }
}
