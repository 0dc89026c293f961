// Where a read stands: see reads.h. What else reads the states' array includes this alone.
#pragma once
#include <cstdint>

namespace ebbtide {

enum ReadState : int8_t { READ_NONE, QUEUED, READING, READY, FAILED };

}  // namespace ebbtide
