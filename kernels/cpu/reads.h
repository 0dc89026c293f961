// Many reads of one file at once: a few threads that take them in order of urgency, read neighbours in one go past the
// page cache, and check what came.
//
//     NONE --submit--> QUEUED --a thread takes it--> READING --> READY
//       ^                 |                             └------> FAILED, and with it all that is queued goes
//       └------cancel-----┘
//
// A read is known by its tag, 0 .. num_tags - 1, and fills its place with frames of the file. States lie in one array
// that the caller may look at without asking; after `wait` or `submit` what is READY there can be read. Knows frames and
// bytes: what they are, and when a tag may be used again, is the caller's. (../../offload/disk/reads.py has the reference.)
#pragma once
#if !defined(_WIN32)
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <vector>

#include "crc32.h"
#include "read_state.h"

namespace ebbtide {

constexpr int NUM_URGENCIES = 3;  // 0 goes first

struct ReadFile {
    int fd;
    bool drops_cache;  // tell the page cache to let go of what was read
    int64_t frame_bytes;
    const uint32_t *crcs;  // of every frame; null: nothing is checked
    int64_t most_at_once;  // bytes that one call may move; 0: all of them. For tests: systems may move less than asked
    // Fills a place from an offset in another way than preadv; false when it could not, and keeps the reason.
    std::function<bool(uint8_t *, int64_t, int64_t)> read_into;
};

struct ReadFailure {
    enum Kind : int { NOTHING, SYSTEM, SHORT, CRC, ELSEWHERE } kind = NOTHING;
    int64_t frame = 0, num_bytes = 0, code = 0;  // code: errno, or the CRC that was found
};

struct ReadCounts {
    int64_t num_reads = 0, num_frames = 0;
    double seconds = 0;
};

class Reads {
  public:
    // states: one byte for each tag, all NONE; they stay the caller's.
    Reads(ReadFile file, int64_t num_tags, int8_t *states, int num_threads, int64_t most_bytes)
        : file_(std::move(file)), most_frames_(std::max<int64_t>(1, most_bytes / file_.frame_bytes)),
          entries_((size_t)num_tags), states_(states) {
        while ((int)threads_.size() < num_threads) {
            try {
                threads_.emplace_back([this] { run(); });
            } catch (const std::system_error &) {
                // A limit of the process: fewer read as well. Of none there is nothing to be joined, and Python says it so.
                if (threads_.empty()) throw std::runtime_error("can't start new thread");
                break;
            }
        }
        std::lock_guard<std::mutex> held(mutex_);
        running_ = (int)threads_.size();
    }

    // Reads frames frame .. frame + count - 1 to a place. The tag must be neither QUEUED nor READING.
    void submit(int64_t num_reads, const int64_t *tags, const int64_t *frames, const int64_t *counts,
                uint8_t *const *places, int urgency) {
        std::unique_lock<std::mutex> held(mutex_);
        if (is_over()) return;
        for (int64_t i = 0; i < num_reads; ++i) {
            Entry &e = entries_[(size_t)tags[i]];
            e.frame = frames[i], e.count = counts[i], e.place = places[i];
            ++e.turn;
            enqueue(tags[i], urgency);
            set(tags[i], QUEUED);
            e.is_expected = false;
            queued_at_[e.frame] = tags[i];
        }
        num_queued_ += num_reads;
        const bool wakes_all = num_reads >= running_;
        held.unlock();  // a thread that woke now would only wait again
        if (wakes_all) return work_.notify_all();
        for (; num_reads > 0; --num_reads) work_.notify_one();
    }

    // These go first now, as far as they are QUEUED.
    void promote(int64_t num_tags, const int64_t *tags) {
        std::lock_guard<std::mutex> held(mutex_);
        for (int64_t i = 0; i < num_tags; ++i)
            if (states_[tags[i]] == QUEUED && entries_[(size_t)tags[i]].urgency > 0) enqueue(tags[i], 0);
    }

    // Somebody will wait until all of these are over.
    void expect(int64_t num_tags, const int64_t *tags) {
        std::lock_guard<std::mutex> held(mutex_);
        for (int64_t i = 0; i < num_tags; ++i) {
            Entry &e = entries_[(size_t)tags[i]];
            if (e.is_expected || (states_[tags[i]] != QUEUED && states_[tags[i]] != READING)) continue;
            e.is_expected = true;
            ++num_expected_;
        }
    }

    // Takes back what has not begun: those tags are NONE afterwards.
    void cancel(int64_t num_tags, const int64_t *tags) {
        std::lock_guard<std::mutex> held(mutex_);
        for (int64_t i = 0; i < num_tags; ++i)
            if (states_[tags[i]] == QUEUED) take_back(tags[i]);
    }

    // Waits until something has happened since `seen`, a number that `happened` gave: the last expected read is over, any
    // other is while none is expected, one failed, or `kick` was called. False when the time is over first.
    bool wait(uint64_t seen, double seconds) {
        std::unique_lock<std::mutex> held(mutex_);
        return done_.wait_for(held, std::chrono::duration<double>(seconds), [&] { return happened_ != seen; });
    }

    uint64_t happened() {
        std::lock_guard<std::mutex> held(mutex_);
        return happened_;
    }

    void kick() {
        std::lock_guard<std::mutex> held(mutex_);
        ++happened_;
        done_.notify_all();
    }

    ReadFailure failure() {
        std::lock_guard<std::mutex> held(mutex_);
        return failure_;
    }

    ReadCounts counts() {
        std::lock_guard<std::mutex> held(mutex_);
        return counts_;
    }

    // Nothing begins any more; whether all threads ended in time. If not, this object and every place must stay.
    bool close(double seconds) {
        std::unique_lock<std::mutex> held(mutex_);
        is_stopping_ = true;
        take_all_back();
        work_.notify_all();
        if (!ended_.wait_for(held, std::chrono::duration<double>(seconds), [&] { return running_ == 0; })) return false;
        held.unlock();
        for (auto &thread : threads_)
            if (thread.joinable()) thread.join();
        return true;
    }

  private:
    struct Entry {
        int64_t frame = 0, count = 0;
        uint8_t *place = nullptr;
        uint64_t turn = 0;  // how often the tag was used: what a queue holds of earlier turns is void
        int urgency = 0;
        bool is_expected = false;
    };
    struct Queued {
        int64_t tag;
        uint64_t turn;
    };

    bool is_over() const { return is_stopping_ || failure_.kind != ReadFailure::NOTHING; }

    void set(int64_t tag, ReadState state) { __atomic_store_n(&states_[tag], (int8_t)state, __ATOMIC_RELEASE); }

    void enqueue(int64_t tag, int urgency) {
        Entry &e = entries_[(size_t)tag];
        e.urgency = urgency;
        queues_[urgency].push_back({tag, e.turn});
    }

    void take_back(int64_t tag) {
        unqueue(tag);
        forget(tag);
        set(tag, READ_NONE);
    }

    // Nobody waits for it any more.
    void forget(int64_t tag) {
        num_expected_ -= entries_[(size_t)tag].is_expected;
        entries_[(size_t)tag].is_expected = false;
    }

    void take_all_back() {
        for (auto &queue : queues_) {
            for (const Queued &q : queue)
                if (is_current(q)) take_back(q.tag);
            queue.clear();
        }
    }

    bool is_current(const Queued &q) const {
        return states_[q.tag] == QUEUED && entries_[(size_t)q.tag].turn == q.turn;
    }

    void unqueue(int64_t tag) {
        const auto found = queued_at_.find(entries_[(size_t)tag].frame);
        if (found != queued_at_.end() && found->second == tag) queued_at_.erase(found);
        --num_queued_;
    }

    // The next reads, neighbours in the file, most urgent first; empty: none.
    void take(std::vector<int64_t> &run) {
        run.clear();
        for (auto &queue : queues_)
            while (!queue.empty()) {
                const Queued q = queue.front();
                queue.pop_front();
                if (!is_current(q)) continue;
                int64_t end = begin(q.tag, run), frames = entries_[(size_t)q.tag].count;
                for (auto next = queued_at_.find(end); next != queued_at_.end(); next = queued_at_.find(end)) {
                    const Entry &e = entries_[(size_t)next->second];
                    frames += e.count;
                    // A wish must not hold up what somebody waits for.
                    if (frames > most_frames_ || e.urgency > entries_[(size_t)q.tag].urgency) break;
                    end = begin(next->second, run);
                }
                return;
            }
    }

    int64_t begin(int64_t tag, std::vector<int64_t> &run) {
        unqueue(tag);
        set(tag, READING);
        run.push_back(tag);
        return entries_[(size_t)tag].frame + entries_[(size_t)tag].count;
    }

    void run() {
        std::vector<int64_t> tags;
        std::unique_lock<std::mutex> held(mutex_);
        while (!is_stopping_) {
            take(tags);
            if (tags.empty()) {
                work_.wait(held, [&] { return is_stopping_ || num_queued_ > 0; });
                continue;
            }
            held.unlock();
            const auto started = std::chrono::steady_clock::now();
            const ReadFailure failure = read(tags);
            const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
            held.lock();
            finish(tags, failure, seconds);
        }
        if (--running_ == 0) ended_.notify_all();
    }

    void finish(const std::vector<int64_t> &tags, const ReadFailure &failure, double seconds) {
        const bool is_good = failure.kind == ReadFailure::NOTHING;
        for (int64_t tag : tags) {
            if (is_good) counts_.num_frames += entries_[(size_t)tag].count;
            forget(tag);
            set(tag, is_good ? READY : FAILED);
        }
        counts_.num_reads += 1;
        counts_.seconds += seconds;
        if (!is_good && failure_.kind == ReadFailure::NOTHING) {
            failure_ = failure;
            take_all_back();
        }
        if (is_good && num_expected_ > 0) return;
        ++happened_;
        done_.notify_all();
    }

    // Reads neighbours: entries that are READING change no more, so no lock is held.
    ReadFailure read(const std::vector<int64_t> &tags) {
        const Entry &first = entries_[(size_t)tags[0]];
        int64_t num_frames = 0;
        for (int64_t tag : tags) num_frames += entries_[(size_t)tag].count;
        ReadFailure failure;
        failure.frame = first.frame, failure.num_bytes = num_frames * file_.frame_bytes;
        if (file_.read_into) {
            for (int64_t tag : tags) {
                const Entry &e = entries_[(size_t)tag];
                if (!file_.read_into(e.place, e.count * file_.frame_bytes, e.frame * file_.frame_bytes)) {
                    failure.kind = ReadFailure::ELSEWHERE;
                    return failure;
                }
            }
        } else if (!read_system(tags, failure)) {
            return failure;
        }
        return check(tags, failure);
    }

    bool read_system(const std::vector<int64_t> &tags, ReadFailure &failure) const {
#if defined(_WIN32)
        failure.kind = ReadFailure::SYSTEM, failure.code = ENOSYS;
        return false;
#else
        constexpr size_t MOST_PARTS = 1024;  // IOV_MAX
        const int64_t offset = failure.frame * file_.frame_bytes;
        std::vector<iovec> parts;
        for (int64_t done = 0; done < failure.num_bytes;) {
            lay_out(tags, done, parts);
            const int count = (int)std::min(parts.size(), MOST_PARTS);
            const ssize_t moved = preadv(file_.fd, parts.data(), count, (off_t)(offset + done));
            if (moved < 0 && errno == EINTR) continue;
            if (moved <= 0) {
                failure.kind = moved < 0 ? ReadFailure::SYSTEM : ReadFailure::SHORT;
                failure.code = moved < 0 ? errno : 0;
                return false;
            }
            const int64_t before = done;
            done += moved;
            if (done == failure.num_bytes) break;
            // The rest must start on a boundary again, so part of it may move twice; less than a block is what a file
            // that ends there gives, again and again.
            done -= done % BLOCK_BYTES;
            if (done > before) continue;
            failure.kind = ReadFailure::SHORT;
            return false;
        }
#if defined(POSIX_FADV_DONTNEED)
        if (file_.drops_cache) posix_fadvise(file_.fd, offset, failure.num_bytes, POSIX_FADV_DONTNEED);
#endif
        return true;
#endif
    }

#if !defined(_WIN32)
    // Where the bytes of a run go, from its byte `from` on.
    void lay_out(const std::vector<int64_t> &tags, int64_t from, std::vector<iovec> &parts) const {
        parts.clear();
        int64_t room = file_.most_at_once > 0 ? file_.most_at_once : INT64_MAX;
        for (int64_t tag : tags) {
            const Entry &e = entries_[(size_t)tag];
            const int64_t whole = e.count * file_.frame_bytes, skipped = std::min(from, whole);
            const int64_t num_bytes = std::min(whole - skipped, room);
            from -= skipped, room -= num_bytes;
            if (num_bytes == 0) continue;
            uint8_t *const place = e.place + skipped;
            if (!parts.empty() && (uint8_t *)parts.back().iov_base + parts.back().iov_len == place)
                parts.back().iov_len += (size_t)num_bytes;
            else
                parts.push_back({place, (size_t)num_bytes});
        }
    }
#endif

    ReadFailure check(const std::vector<int64_t> &tags, ReadFailure &failure) const {
        if (!file_.crcs) return failure;
        for (int64_t tag : tags) {
            const Entry &e = entries_[(size_t)tag];
            for (int64_t i = 0; i < e.count; ++i) {
                const uint32_t found = crc32(e.place + i * file_.frame_bytes, (size_t)file_.frame_bytes);
                if (found == file_.crcs[e.frame + i]) continue;
                failure.kind = ReadFailure::CRC, failure.frame = e.frame + i, failure.code = found;
                return failure;
            }
        }
        return failure;
    }

    static constexpr int64_t BLOCK_BYTES = 4096;  // what direct I/O asks for
    ReadFile file_;
    const int64_t most_frames_;  // that are read in one go
    std::mutex mutex_;           // guards all below, but that threads read entries that are READING
    std::condition_variable work_, done_, ended_;
    std::vector<Entry> entries_;
    int8_t *states_;
    std::deque<Queued> queues_[NUM_URGENCIES];
    std::unordered_map<int64_t, int64_t> queued_at_;  // first frame -> tag, of what is QUEUED
    int64_t num_queued_ = 0, num_expected_ = 0;
    uint64_t happened_ = 0;
    std::vector<std::thread> threads_;
    int running_ = 0;
    bool is_stopping_ = false;
    ReadFailure failure_;
    ReadCounts counts_;
};

}  // namespace ebbtide
