// Shares a range of independent tasks out among threads that wait for work.
//
// A task belongs to whoever takes it first, so a thread that comes late, or that the system has put aside, holds
// nobody up unless it holds a task. Between two calls threads look for work for a while before they sleep: a decode
// step makes a call every few microseconds, and waking a thread takes up to fifty.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace ebbtide {

// A moment's rest for a loop that waits.
inline void rest() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
    __asm__ volatile("yield");
#endif
}

// Looks for `is_true()` for `look_us` microseconds; false when that time is over.
template <typename IsTrue>
bool look_for(int64_t look_us, const IsTrue &is_true) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::microseconds(look_us);
    do {
        for (int i = 0; i < 64; ++i) {
            if (is_true()) return true;
            rest();
        }
    } while (Clock::now() < end);
    return is_true();
}

// Threads that work on one job at a time.
class Pool {
public:
    using Task = void (*)(const void *job, int64_t number);

    // task(job, i) for i in 0 .. count, by the caller and threads - 1 others. By the caller alone where a job is
    // under way already: another thread's, or the one that this call is part of.
    void run(Task task, const void *job, int64_t count, int threads) {
        if (threads > MOST_THREADS) threads = MOST_THREADS;
        if (threads <= 1 || count <= 1 || is_busy_.exchange(true, std::memory_order_acquire)) {
            for (int64_t i = 0; i < count; ++i) task(job, i);
            return;
        }
        while ((int)workers_.size() < threads - 1) {
            const int number = (int)workers_.size();
            try {
                workers_.emplace_back([this, number] { work(number); });
            } catch (const std::system_error &) {
                threads = number + 1;  // a limit of the process: fewer compute the same
            }
        }
        task_ = task;
        job_ = job;
        count_ = count;
        next_.store(0, std::memory_order_relaxed);
        helpers_.store(threads - 1, std::memory_order_relaxed);
        ticket_.fetch_add(1, std::memory_order_seq_cst);  // even to odd: whoever reads it may take part
        if (num_asleep_.load(std::memory_order_seq_cst) > 0) {
            { std::lock_guard<std::mutex> guard(sleeping_); }
            wake_.notify_all();
        }
        take_tasks();
        // Nobody may join any more; wait for those who did.
        ticket_.fetch_add(1, std::memory_order_seq_cst);
        const auto is_left = [this] { return num_inside_.load(std::memory_order_seq_cst) == 0; };
        while (!look_for(CALLER_LOOKS_US, is_left)) std::this_thread::yield();
        is_busy_.store(false, std::memory_order_release);
    }

    // The one of this process. Never destroyed: its threads may outlive static objects. A forked child has none of
    // its parent's threads, and begins with a new one.
    static Pool &shared() {
        Pool *pool = current().load(std::memory_order_acquire);
        if (pool) return *pool;
        static std::mutex making;
        std::lock_guard<std::mutex> guard(making);
        pool = current().load(std::memory_order_acquire);
        if (!pool) {
            current().store(pool = new Pool, std::memory_order_release);
#if defined(__unix__) || defined(__APPLE__)
            static const int once = pthread_atfork(nullptr, nullptr, [] { current().store(nullptr); });
            (void)once;
#endif
        }
        return *pool;
    }

private:
    static constexpr int MOST_THREADS = 256;
    static constexpr int64_t WORKER_LOOKS_US = 100, CALLER_LOOKS_US = 20;

    static std::atomic<Pool *> &current() {
        static std::atomic<Pool *> pool{nullptr};
        return pool;
    }

    void take_tasks() {
        for (;;) {
            const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
            if (i >= count_) return;
            task_(job_, i);
        }
    }

    void work(int number) {
        uint64_t seen = 0;
        for (;;) {
            const auto is_new = [&] {
                const uint64_t ticket = ticket_.load(std::memory_order_seq_cst);
                return ticket % 2 == 1 && ticket != seen;
            };
            if (!look_for(WORKER_LOOKS_US, is_new)) {
                std::unique_lock<std::mutex> lock(sleeping_);
                num_asleep_.fetch_add(1, std::memory_order_seq_cst);
                wake_.wait(lock, is_new);
                num_asleep_.fetch_sub(1, std::memory_order_seq_cst);
            }
            // Inside first, then a second look at the ticket: a job that is still open then cannot end before this
            // thread has left, so its fields stay as they are.
            num_inside_.fetch_add(1, std::memory_order_seq_cst);
            const uint64_t ticket = ticket_.load(std::memory_order_seq_cst);
            if (ticket % 2 == 1) {
                seen = ticket;
                if (number < helpers_.load(std::memory_order_relaxed)) take_tasks();
            }
            num_inside_.fetch_sub(1, std::memory_order_seq_cst);
        }
    }

    std::vector<std::thread> workers_;  // grows only, under is_busy_
    std::atomic<bool> is_busy_{false};
    Task task_ = nullptr;
    const void *job_ = nullptr;
    int64_t count_ = 0;
    alignas(64) std::atomic<int64_t> next_{0};
    std::atomic<int> helpers_{0};
    alignas(64) std::atomic<uint64_t> ticket_{0};  // odd while a job is open
    alignas(64) std::atomic<int> num_inside_{0};
    std::atomic<int> num_asleep_{0};
    std::mutex sleeping_;
    std::condition_variable wake_;
};

// run(begin, end) for contiguous parts of 0 .. num_tasks, each a multiple of `grain` but the last. Shares out only where
// there are LEAST_BYTES to move for each thread, and in several parts for each, so that none waits long for another.
template <typename Run>
void share_out(int64_t num_tasks, int64_t grain, int64_t total_bytes, int threads, const Run &run) {
    constexpr int64_t LEAST_BYTES = 1 << 16, PARTS_EACH = 8;
    const int64_t grains = (num_tasks + grain - 1) / grain, worth = total_bytes / LEAST_BYTES;
    if (threads > worth) threads = (int)worth;
    if (threads <= 1 || grains <= 1) return run(0, num_tasks);
    int64_t parts = threads * PARTS_EACH;
    if (parts > worth) parts = worth;
    if (parts > grains) parts = grains;
    struct Job {
        const Run &run;
        int64_t num_tasks, grain, grains, parts;
    } job{run, num_tasks, grain, grains, parts};
    Pool::shared().run(
        [](const void *given, int64_t i) {
            const Job &j = *static_cast<const Job *>(given);
            const int64_t begin = j.grains * i / j.parts * j.grain, end = j.grains * (i + 1) / j.parts * j.grain;
            j.run(begin, end < j.num_tasks ? end : j.num_tasks);
        },
        &job, parts, threads);
}

}  // namespace ebbtide
