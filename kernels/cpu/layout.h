// The numbers of a PageLayout (../layout.py), in the order of dispatch.layout_numbers.
#pragma once
#include <cstdint>

namespace ebbtide {

enum RawKind : int64_t { CODES = 0, RAW_F32 = 1, RAW_BF16 = 2, RAW_F16 = 3 };

struct Layout {
    int64_t kv_heads, head_dim, page_tokens, pages_per_record;
    int64_t raw_kind;  // CODES, or what a full page holds
    int64_t key_bits, value_bits, near_bits;
    int64_t near_resident;
    int64_t near_head_bytes, near_record_bytes, key_min_offset;
    int64_t value_mean_offset;  // 0 = near blocks hold no means of values
    int64_t value_offset, value_min_offset, far_head_bytes, head_stride_bytes, record_bytes;
    int64_t shared_from;  // values are the keys, of which elements from here on count; -1: they are stored

    int64_t far_key_bits() const { return key_bits - near_bits; }
    bool shares() const { return shared_from >= 0; }
    int64_t value_first() const { return shares() ? shared_from : 0; }
    int64_t blocks_per_record() const { return pages_per_record * kv_heads; }
};
constexpr int64_t HEAD_ALIGN = 8;  // head_dim is a multiple of it
constexpr int LAYOUT_NUMBERS = 19;
static_assert(sizeof(Layout) == LAYOUT_NUMBERS * sizeof(int64_t), "every field is one number");

// One page of one head: where its blocks and its tokens are.
struct Block {
    int64_t head, first_token;  // token within all tokens of the call
    int64_t near_at, far_at;    // byte offsets in the near records and in the records

    // Blocks are counted record by record, page by page, head by head.
    Block(const Layout &l, int64_t index) {
        int64_t record = index / l.blocks_per_record();
        int64_t within = index % l.blocks_per_record();
        head = within % l.kv_heads;
        first_token = (record * l.pages_per_record + within / l.kv_heads) * l.page_tokens;
        far_at = record * l.record_bytes + within * l.head_stride_bytes;
        near_at = record * l.near_record_bytes + within * l.near_head_bytes;
    }
    const uint8_t *near_block(const Layout &l, const uint8_t *near, const uint8_t *records) const {
        return l.near_resident ? near + near_at : records + far_at + l.far_head_bytes;
    }
    uint8_t *near_block(const Layout &l, uint8_t *near, uint8_t *records) const {
        return l.near_resident ? near + near_at : records + far_at + l.far_head_bytes;
    }
};

}  // namespace ebbtide
