// Causal attention for training on one CPU core: bfloat16 products with AVX-512 or AMX, forward and
// backward, heads of 64. Lanes are queries everywhere, so that nothing is ever summed across a
// vector. Blocks of keys that no query of a block attends to are left out, and so are blocks of queries
// that nobody wants the output of. Knows no model.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int N = 64;       // queries in a block, keys in a block, channels of a head
constexpr int PAIRS = N / 2;  // bfloat16 products take two neighbours at a time
constexpr float LOG2E = 1.4426950408889634f;

using bf16 = uint16_t;

// 2^x for x <= 0.
inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

// c (64 x 64 floats) = or += a b, of a (64 x 64) and b (PAIRS x 64 pairs): b[k][j] holds rows 2 k and 2 k + 1 of column j.
#if defined(__AMX_BF16__)

constexpr int TILE = 16;  // rows and columns of floats; pairs of a row

// Linux gives tiles to a process that asks.
inline bool are_given() {
    constexpr long ASK_FOR_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0;
}

// Tiles of sixteen rows of 64 bytes, all eight alike, for the calling thread, while this lives.
struct Tiles {
    struct alignas(64) Shapes {
        uint8_t palette = 1, none[15] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
    };
    Tiles() {
        const Shapes shapes;
        asm volatile("" ::"r"(&shapes) : "memory");  // GCC does not know that all of it is read
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
};

template <bool ADD>
inline void multiply(const bf16* a, const uint32_t* b, float* c) {
    constexpr int ROW = N * sizeof(float), HALF = TILE * N, NEXT = 2 * TILE;  // bytes; floats; bfloat16
    asm volatile("" ::: "memory");  // nor that tiles are
    for (int m = 0; m < N; m += 2 * TILE) {
        const bf16* rows = a + m * N;
        _tile_loadd(4, rows, N * sizeof(bf16));
        _tile_loadd(5, rows + HALF, N * sizeof(bf16));
        _tile_loadd(6, rows + NEXT, N * sizeof(bf16));
        _tile_loadd(7, rows + HALF + NEXT, N * sizeof(bf16));
        for (int n = 0; n < N; n += TILE) {
            float* at = c + m * N + n;
            if (ADD) {
                _tile_loadd(0, at, ROW);
                _tile_loadd(1, at + HALF, ROW);
            } else {
                _tile_zero(0);
                _tile_zero(1);
            }
            _tile_loadd(2, b + n, ROW);
            _tile_dpbf16ps(0, 4, 2);
            _tile_dpbf16ps(1, 5, 2);
            _tile_loadd(3, b + HALF + n, ROW);
            _tile_dpbf16ps(0, 6, 3);
            _tile_dpbf16ps(1, 7, 3);
            _tile_stored(0, at, ROW);
            _tile_stored(1, at + HALF, ROW);
        }
    }
    asm volatile("" ::: "memory");
}

#else

inline bool are_given() { return true; }
struct Tiles {};

template <bool ADD>
inline void multiply(const bf16* a, const uint32_t* b, float* c) {
    for (int m = 0; m < N; m += 4) {
        __m512 sum[4][4];
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j)
                sum[i][j] = ADD ? _mm512_loadu_ps(c + (m + i) * N + 16 * j) : _mm512_setzero_ps();
        for (int k = 0; k < PAIRS; ++k) {
            __m512bh right[4];
            for (int j = 0; j < 4; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + k * N + 16 * j);
            for (int i = 0; i < 4; ++i) {
                int32_t pair;
                std::memcpy(&pair, a + (m + i) * N + 2 * k, 4);
                const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
                for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
            }
        }
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) _mm512_storeu_ps(c + (m + i) * N + 16 * j, sum[i][j]);
    }
}

#endif

// x (64 x 64) -> pairs of channels: out[d / 2][row] holds x[row][d], x[row][d + 1].
inline void pack_channels(const bf16* x, uint32_t* out) {
    for (int row = 0; row < N; ++row)
        for (int k = 0; k < PAIRS; ++k) std::memcpy(out + k * N + row, x + row * N + 2 * k, 4);
}

// x (64 x 64) -> pairs of rows: out[row / 2][d] holds x[row][d], x[row + 1][d].
inline void pack_rows(const bf16* x, uint32_t* out) {
    for (int k = 0; k < PAIRS; ++k)
        for (int j = 0; j < N; j += 16) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + 2 * k * N + j)));
            const __m512i high =
                _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + (2 * k + 1) * N + j)));
            _mm512_storeu_si512(out + k * N + j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

// x (64 x 64) -> out[d][row].
inline void turn(const bf16* x, bf16* out) {
    for (int row = 0; row < N; ++row)
        for (int d = 0; d < N; ++d) out[d * N + row] = x[row * N + d];
}

inline __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline __m512i paired(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// x (channels x queries floats) -> out (queries x channels bfloat16).
inline void store_turned(const float* x, bf16* out) {
    alignas(64) bf16 rounded[N * N];
    for (int i = 0; i < N * N; i += 16) _mm256_storeu_si256((__m256i*)(rounded + i), to_bf16(_mm512_loadu_ps(x + i)));
    turn(rounded, out);
}

struct Buffers {
    alignas(64) float scores[N * N], grads[N * N], out[N * N];
    alignas(64) uint32_t queries[PAIRS * N], upstream[PAIRS * N], query_rows[PAIRS * N], upstream_rows[PAIRS * N];
    alignas(64) uint32_t pairs[PAIRS * N];
    alignas(64) bf16 probabilities[N * N], score_grads[N * N];
};

inline void hide_later_keys(float* scores) {
    for (int key = 0; key < N; ++key)
        for (int q = 0; q < key; ++q) scores[key * N + q] = -std::numeric_limits<float>::infinity();
}

void forward_head(const bf16* q, const bf16* k, const bf16* v, const uint8_t* wanted, int64_t tokens, float scale,
                  float nothing, bf16* out, float* lse) {
    const int64_t blocks = tokens / N;
    const Tiles tiles;
    std::vector<bf16> values(blocks * N * N);
    for (int64_t j = 0; j < blocks; ++j) turn(v + j * N * N, values.data() + j * N * N);
    auto* b = new Buffers;
    const __m512 factor = _mm512_set1_ps(scale * LOG2E);
    for (int64_t i = 0; i < blocks; ++i) {
        if (!wanted[i]) continue;
        pack_channels(q + i * N * N, b->queries);
        std::memset(b->out, 0, sizeof b->out);
        __m512 most[4], total[4];
        for (int j = 0; j < 4; ++j) most[j] = _mm512_set1_ps(-1e30f), total[j] = _mm512_setzero_ps();
        for (int64_t block = i; block >= 0; --block) {  // the nearest first: it is attended to the most
            multiply<false>(k + block * N * N, b->queries, b->scores);
            if (block == i) hide_later_keys(b->scores);
            __m512 peak[4];
            for (int j = 0; j < 4; ++j) peak[j] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
            for (int key = 0; key < N; ++key)
                for (int j = 0; j < 4; ++j)
                    peak[j] = _mm512_max_ps(peak[j], _mm512_loadu_ps(b->scores + key * N + 16 * j));
            bool any = false;
            for (int j = 0; j < 4; ++j) {
                peak[j] = _mm512_mul_ps(peak[j], factor);
                any |= _mm512_cmp_ps_mask(peak[j], _mm512_sub_ps(most[j], _mm512_set1_ps(nothing)), _CMP_GT_OQ) != 0;
            }
            if (!any) continue;
            __m512 keep[4];
            bool grown = false;
            for (int j = 0; j < 4; ++j) {
                const __m512 now = _mm512_max_ps(most[j], peak[j]);
                grown |= _mm512_cmp_ps_mask(now, most[j], _CMP_GT_OQ) != 0;
                keep[j] = exp2_of(_mm512_sub_ps(most[j], now));
                total[j] = _mm512_mul_ps(total[j], keep[j]);
                most[j] = now;
            }
            if (grown && block != i)
                for (int d = 0; d < N; ++d)
                    for (int j = 0; j < 4; ++j) {
                        float* at = b->out + d * N + 16 * j;
                        _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), keep[j]));
                    }
            for (int key = 0; key < N; key += 2)
                for (int j = 0; j < 4; ++j) {
                    const float* at = b->scores + key * N + 16 * j;
                    const __m512 one = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(at), factor, most[j]));
                    const __m512 two = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(at + N), factor, most[j]));
                    total[j] = _mm512_add_ps(total[j], _mm512_add_ps(one, two));
                    _mm512_storeu_si512(b->pairs + key / 2 * N + 16 * j, paired(to_bf16(one), to_bf16(two)));
                }
            multiply<true>(values.data() + block * N * N, b->pairs, b->out);
        }
        for (int j = 0; j < 4; ++j) {
            alignas(64) float sums[16], peaks[16];
            _mm512_store_ps(sums, total[j]);
            _mm512_store_ps(peaks, most[j]);
            for (int lane = 0; lane < 16; ++lane)
                lse[i * N + 16 * j + lane] = peaks[lane] + std::log2(sums[lane]);
            const __m512 share = _mm512_div_ps(_mm512_set1_ps(1.0f), total[j]);
            for (int d = 0; d < N; ++d) {
                float* at = b->out + d * N + 16 * j;
                _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), share));
            }
        }
        store_turned(b->out, out + i * N * N);
    }
    delete b;
}

void backward_head(const bf16* q, const bf16* k, const bf16* v, const bf16* out, const bf16* up, const float* lse,
                   const uint8_t* wanted, int64_t tokens, float scale, float nothing, bf16* q_grad, float* k_grad,
                   float* v_grad) {
    const int64_t blocks = tokens / N;
    const Tiles tiles;
    std::vector<bf16> keys(blocks * N * N);
    for (int64_t j = 0; j < blocks; ++j) turn(k + j * N * N, keys.data() + j * N * N);
    auto* b = new Buffers;
    const __m512 factor = _mm512_set1_ps(scale * LOG2E), scaling = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < blocks; ++i) {
        if (!wanted[i]) continue;
        pack_channels(q + i * N * N, b->queries);
        pack_channels(up + i * N * N, b->upstream);
        pack_rows(q + i * N * N, b->query_rows);
        pack_rows(up + i * N * N, b->upstream_rows);
        std::memset(b->out, 0, sizeof b->out);
        alignas(64) float inner[N];
        for (int row = 0; row < N; ++row) {
            const int64_t at = (i * N + row) * N;
            __m512 sum = _mm512_setzero_ps();
            for (int d = 0; d < N; d += 32)
                sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(up + at + d),
                                       (__m512bh)_mm512_loadu_si512(out + at + d));
            inner[row] = _mm512_reduce_add_ps(sum);
        }
        __m512 total[4], mean[4];
        for (int j = 0; j < 4; ++j) {
            total[j] = _mm512_loadu_ps(lse + i * N + 16 * j);
            mean[j] = _mm512_load_ps(inner + 16 * j);
        }
        for (int64_t block = i; block >= 0; --block) {
            multiply<false>(k + block * N * N, b->queries, b->scores);
            if (block == i) hide_later_keys(b->scores);
            __m512 highest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
            for (int key = 0; key < N; ++key)
                for (int j = 0; j < 4; ++j)
                    highest = _mm512_max_ps(
                        highest, _mm512_fmsub_ps(_mm512_loadu_ps(b->scores + key * N + 16 * j), factor, total[j]));
            if (_mm512_cmp_ps_mask(highest, _mm512_set1_ps(-nothing), _CMP_GT_OQ) == 0) continue;
            multiply<false>(v + block * N * N, b->upstream, b->grads);
            for (int key = 0; key < N; key += 2)
                for (int j = 0; j < 4; ++j) {
                    __m256i rounded[2];
                    for (int two = 0; two < 2; ++two) {
                        const int64_t at = (key + two) * N + 16 * j;
                        const __m512 p = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(b->scores + at), factor, total[j]));
                        const __m512 grad = _mm512_mul_ps(
                            _mm512_mul_ps(p, scaling), _mm512_sub_ps(_mm512_loadu_ps(b->grads + at), mean[j]));
                        rounded[two] = to_bf16(grad);
                        _mm256_storeu_si256((__m256i*)(b->probabilities + at), to_bf16(p));
                        _mm256_storeu_si256((__m256i*)(b->score_grads + at), rounded[two]);
                    }
                    _mm512_storeu_si512(b->pairs + key / 2 * N + 16 * j, paired(rounded[0], rounded[1]));
                }
            multiply<true>(b->probabilities, b->upstream_rows, v_grad + block * N * N);
            multiply<true>(b->score_grads, b->query_rows, k_grad + block * N * N);
            multiply<true>(keys.data() + block * N * N, b->pairs, b->out);
        }
        store_turned(b->out, q_grad + i * N * N);
    }
    delete b;
}

}  // namespace

// Arrays are (batch, heads or kv_heads, tokens, 64), tokens a multiple of 64, except for lse (batch,
// heads, tokens) and wanted (batch, tokens / 64): of which blocks of queries the output is wanted.
// Elsewhere out, lse and q_grad are left as they are. k_grad and v_grad are added to.
struct Shape {
    int64_t batch, heads, kv_heads, tokens;
};

extern "C" bool attention_runs() { return are_given(); }

extern "C" void attention_forward(Shape shape, const bf16* q, const bf16* k, const bf16* v, const uint8_t* wanted,
                                  float nothing, bf16* out, float* lse) {
    const int64_t head_size = shape.tokens * N, groups = shape.heads / shape.kv_heads;
    for (int64_t i = 0; i < shape.batch * shape.heads; ++i)
        forward_head(q + i * head_size, k + i / groups * head_size, v + i / groups * head_size,
                     wanted + i / shape.heads * (shape.tokens / N), shape.tokens, 0.125f, nothing,
                     out + i * head_size, lse + i * shape.tokens);
}

extern "C" void attention_backward(Shape shape, const bf16* q, const bf16* k, const bf16* v, const bf16* out,
                                   const float* lse, const uint8_t* wanted, const bf16* upstream, float nothing,
                                   bf16* q_grad, float* k_grad, float* v_grad) {
    const int64_t head_size = shape.tokens * N, groups = shape.heads / shape.kv_heads;
    for (int64_t i = 0; i < shape.batch * shape.heads; ++i)
        backward_head(q + i * head_size, k + i / groups * head_size, v + i / groups * head_size, out + i * head_size,
                      upstream + i * head_size, lse + i * shape.tokens,
                      wanted + i / shape.heads * (shape.tokens / N), shape.tokens, 0.125f, nothing,
                      q_grad + i * head_size, k_grad + i / groups * head_size, v_grad + i / groups * head_size);
}
