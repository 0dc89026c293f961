// AMX's tiles: up to eight registers of sixteen rows of 64 bytes, of which one product adds rows by columns. Included inside an
// anonymous namespace, by amx.cpp.

#if defined(__clang__)
#define EBBTIDE_SIXTEEN_TIMES _Pragma("unroll 16")
#else
#define EBBTIDE_SIXTEEN_TIMES _Pragma("GCC unroll 16")
#endif
constexpr int AMX_ROWS = 16;

// GCC does not know that loading a tile, or their shapes, reads memory.
inline void written(const void *p) { asm volatile("" ::"r"(p) : "memory"); }

struct TileShape {
    int rows, row_bytes;
};

// What the calling thread's tiles are, from 0 on, while this lives.
class TileShapes {
public:
    template <int COUNT>
    explicit TileShapes(const TileShape (&shapes)[COUNT]) {
        struct alignas(64) {
            uint8_t palette = 1, none[15] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } of;
        static_assert(COUNT <= 8, "there are eight tiles");
        for (int i = 0; i < COUNT; ++i) {
            of.row_bytes[i] = (uint16_t)shapes[i].row_bytes;
            of.rows[i] = (uint8_t)shapes[i].rows;
        }
        written(&of);
        _tile_loadconfig(&of);
    }
    ~TileShapes() { _tile_release(); }
    TileShapes(const TileShapes &) = delete;
    TileShapes &operator=(const TileShapes &) = delete;
};
