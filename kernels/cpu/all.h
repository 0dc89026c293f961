// Every kernel, once for each instruction set: the including file sets the compiler's flags, EBBTIDE_NAME and
// EBBTIDE_TABLE. The anonymous namespace keeps the linker from mixing the sets.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(EBBTIDE_NEON)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace ebbtide {
namespace {
#include "half.h"
#include "lanes.h"
#include "planes.h"
#include "pages.h"
#include "partials.h"
#include "runs.h"
#include "codes.h"
#include "tiles.h"
#include "quads.h"
#include "attend.h"
#include "join.h"
#include "prefill.h"
#include "rope.h"
#include "score.h"
#include "bounds.h"
#include "shares.h"
#include "means.h"
#include "row_groups.h"
#include "quantise.h"
#include "matmul_raw.h"
#include "matmul_groups.h"
#include "matmul_strips.h"
#include "matmul.h"
#include "step.h"
#include "recurrence.h"
}  // namespace

const Kernels &EBBTIDE_TABLE() {
    static const Kernels table = {EBBTIDE_NAME, BEATS_FLOATS, unpack, read_raw, seal, quantise_rows, quantise_strips, multiply, norm, gate_with,
                                  attend_scratch, attend_chunk, merge_chunks, attend_span, prefill_floats, prefill_scratch,
                                  prefill_panels, pack_panel, attend_block, join_two, rope_scores, raw_scratch, attend_raw,
                                  join_spans, score_scratch, score_record, bound_record, page_shares, record_costs, leave_out, value_spread,
                                  means_scratch, sum_means, prepare_part, take_tokens, gate_outputs, short_conv,
                                  silu_conv, scan};
    return table;
}
}  // namespace ebbtide
