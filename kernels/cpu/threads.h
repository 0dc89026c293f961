// Shares a range of independent tasks out among threads. With OpenMP the team is torch's own where both use the same
// runtime, so that the two do not fight for the cores; without, threads are started for each call.
#pragma once
#include <cstdint>
#if !defined(_OPENMP)
#include <thread>
#include <vector>
#endif

namespace ebbtide {

// run(begin, end) for contiguous parts of 0 .. num_tasks, each a multiple of `grain` but the last. Shares out
// only where there are `least_bytes` to move for each thread: waking a thread costs some microseconds.
template <typename Run>
void share_out(int64_t num_tasks, int64_t grain, int64_t total_bytes, int threads, const Run &run) {
    constexpr int64_t LEAST_BYTES = 1 << 16;
    const int64_t grains = (num_tasks + grain - 1) / grain;
    int64_t parts = threads < grains ? threads : grains;
    if (total_bytes / LEAST_BYTES < parts) parts = total_bytes / LEAST_BYTES;
    if (parts <= 1) return run(0, num_tasks);
    auto part = [&](int64_t i) {
        const int64_t begin = grains * i / parts * grain, end = grains * (i + 1) / parts * grain;
        run(begin, end < num_tasks ? end : num_tasks);
    };
#if defined(_OPENMP)
#pragma omp parallel for schedule(static, 1) num_threads((int)parts)
    for (int64_t i = 0; i < parts; ++i) part(i);
#else
    std::vector<std::thread> team;
    for (int64_t i = 1; i < parts; ++i) team.emplace_back(part, i);
    part(0);
    for (auto &thread : team) thread.join();
#endif
}

}  // namespace ebbtide
