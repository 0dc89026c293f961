// What a row of bytes consists of. Included inside an anonymous namespace.

// A group of a row.
struct RowGroup {
    int32_t fours[GROUP / 4];  // 32 codes, int8, four at a time
    float scale;
    int32_t less_eight;  // -8 times the sum of the codes
};
static_assert(sizeof(RowGroup) == ROW_GROUP_BYTES, "row_bytes counts on it");

inline const RowGroup *apart(const RowGroup *row, int64_t num_bytes) {
    return (const RowGroup *)((const uint8_t *)row + num_bytes);
}
