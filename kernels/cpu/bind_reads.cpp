// Reads and CRCs for Python. Arrays of numbers come as numpy arrays, memory as addresses that the caller keeps alive.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>

#include <memory>
#include <tuple>

#include "reads.h"

namespace nb = nanobind;

namespace ebbtide {
namespace {

using Numbers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
constexpr double SIGNALS_S = 0.05;  // how often a waiting caller looks whether it was interrupted
constexpr double CLOSE_S = 10;

// A Reads whose threads may outlive it: what they use is given up, never freed, when the disk does not answer.
class ReadsObject {
  public:
    ReadsObject(int fd, bool drops_cache, int64_t frame_bytes, uintptr_t crcs, int64_t num_tags, uintptr_t states,
                int num_threads, int64_t most_bytes, int64_t most_at_once, nb::object read_into, nb::object keep)
        : keep_(std::move(keep)), callback_(std::move(read_into)) {
        ReadFile file{fd, drops_cache, frame_bytes, reinterpret_cast<const uint32_t *>(crcs), most_at_once, {}};
        if (!callback_.is_none())
            file.read_into = [this](uint8_t *to, int64_t num_bytes, int64_t offset) {
                nb::gil_scoped_acquire held;
                try {
                    return nb::cast<bool>(callback_(reinterpret_cast<uintptr_t>(to), num_bytes, offset));
                } catch (...) {  // the callback keeps its own errors, so this one has nowhere to go
                    return false;
                }
            };
        reads_ = std::make_unique<Reads>(std::move(file), num_tags, reinterpret_cast<int8_t *>(states), num_threads,
                                         most_bytes);
    }

    ~ReadsObject() {
        if (close(CLOSE_S)) return;
        (void)reads_.release();
        (void)keep_.release();
        (void)callback_.release();
    }

    void submit(Numbers tags, Numbers frames, Numbers counts, Numbers places, int urgency) {
        if (frames.size() != tags.size() || counts.size() != tags.size() || places.size() != tags.size())
            throw std::invalid_argument("arrays of different lengths");
        if (urgency < 0 || urgency >= NUM_URGENCIES) throw std::invalid_argument("there is no such urgency");
        static_assert(sizeof(uint8_t *) == sizeof(int64_t), "addresses come as whole numbers");
        reads_->submit((int64_t)tags.size(), tags.data(), frames.data(), counts.data(),
                       reinterpret_cast<uint8_t *const *>(places.data()), urgency);
    }

    void promote(Numbers tags) { reads_->promote((int64_t)tags.size(), tags.data()); }
    void expect(Numbers tags) { reads_->expect((int64_t)tags.size(), tags.data()); }
    void cancel(Numbers tags) { reads_->cancel((int64_t)tags.size(), tags.data()); }
    uint64_t happened() { return reads_->happened(); }
    void kick() { reads_->kick(); }

    bool wait(uint64_t seen, double seconds) {
        while (true) {
            const double slice = seconds < SIGNALS_S ? seconds : SIGNALS_S;
            bool has_happened;
            {
                nb::gil_scoped_release released;
                has_happened = reads_->wait(seen, slice);
            }
            if (PyErr_CheckSignals() != 0) throw nb::python_error();
            seconds -= slice;
            if (has_happened || seconds <= 0) return has_happened;
        }
    }

    std::tuple<int, int64_t, int64_t, int64_t> failure() {
        const ReadFailure f = reads_->failure();
        return {(int)f.kind, f.frame, f.num_bytes, f.code};
    }

    std::tuple<int64_t, int64_t, double> counts() {
        const ReadCounts c = reads_->counts();
        return {c.num_reads, c.num_frames, c.seconds};
    }

    bool close(double seconds) {
        nb::gil_scoped_release released;  // a thread may be calling back
        return reads_->close(seconds);
    }

  private:
    nb::object keep_, callback_;
    std::unique_ptr<Reads> reads_;
};

// The CRC-32 of each of num_records pieces that lie side by side.
void crcs_of(uintptr_t records, int64_t num_records, int64_t record_bytes, uintptr_t out) {
    nb::gil_scoped_release released;
    for (int64_t i = 0; i < num_records; ++i)
        reinterpret_cast<uint32_t *>(out)[i] =
            crc32(reinterpret_cast<const uint8_t *>(records) + i * record_bytes, (size_t)record_bytes);
}

}  // namespace

void bind_reads(nb::module_ &m) {
    nb::set_leak_warnings(false);  // a store that nobody closed lives until the end of the process
    nb::class_<ReadsObject>(m, "Reads")
        .def(nb::init<int, bool, int64_t, uintptr_t, int64_t, uintptr_t, int, int64_t, int64_t, nb::object, nb::object>(),
             nb::arg("fd"), nb::arg("drops_cache"), nb::arg("frame_bytes"), nb::arg("crcs"), nb::arg("num_tags"),
             nb::arg("states"), nb::arg("num_threads"), nb::arg("most_bytes"), nb::arg("most_at_once") = 0,
             nb::arg("read_into").none() = nb::none(), nb::arg("keep").none() = nb::none())
        .def("submit", &ReadsObject::submit)
        .def("promote", &ReadsObject::promote)
        .def("expect", &ReadsObject::expect)
        .def("cancel", &ReadsObject::cancel)
        .def("happened", &ReadsObject::happened)
        .def("kick", &ReadsObject::kick)
        .def("wait", &ReadsObject::wait)
        .def("failure", &ReadsObject::failure)
        .def("counts", &ReadsObject::counts)
        .def("close", &ReadsObject::close);
    m.def("crcs_of", &crcs_of);
}

}  // namespace ebbtide
