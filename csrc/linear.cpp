// fp32 matrix products on AMX tiles, the CPU side of kernels/linear.py. A tile multiplies bf16, whose mantissa has 8
// bits, and adds in fp32. An fp32 number is the exact sum of three bf16 numbers, a = a1 + a2 + a3, each 2^-8 of the one
// before; of the nine products the six above fp32's own rounding are added.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <algorithm>
#include <optional>
#include <vector>

#include "activations.h"

using at::Tensor;

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t EDGE = 16, STEP = 32, TILE = 1024, PARTS = 3;  // a tile: 16 rows of 32 bf16, or of 16 fp32
// what is split at once: rows of the left matrix, depth of both, columns of the right one for each thread
constexpr int64_t HEIGHT = 1024, DEPTH = 512, WIDTH = 256;

bool allowed() {  // Linux gives a process the tiles' registers when it asks
    static const bool yes = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return yes;
}

int64_t blocks(int64_t n, int64_t size) {
    return (n + size - 1) / size;
}

// The parts of 16 numbers, each as the upper half of an fp32
inline void split(__m512 a, __m512i* parts) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
    for (int p = 0; p < PARTS; p++) {
        parts[p] = p + 1 < PARTS ? _mm512_and_si512(_mm512_castps_si512(a), upper) : _mm512_castps_si512(a);
        a = _mm512_sub_ps(a, _mm512_castsi512_ps(parts[p]));
    }
}

inline __m512 load(const float* a, int64_t n) {
    return n >= 16 ? _mm512_loadu_ps(a) : _mm512_maskz_loadu_ps(__mmask16(n > 0 ? (1 << n) - 1 : 0), a);
}

// 32 numbers of a row, of which n are there, as bf16: one row of a tile for each part
inline void split_row(const float* a, int64_t n, __m512i* rows) {
    alignas(64) static const short odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                              33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    __m512i low[PARTS], high[PARTS];
    split(load(a, n), low);
    split(load(a + 16, n - 16), high);
    for (int p = 0; p < PARTS; p++) rows[p] = _mm512_permutex2var_epi16(low[p], _mm512_load_si512(odd), high[p]);
}

// 16 rows of 16 pairs -> 16 columns
inline void transpose(__m512i* v) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2)
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++)
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]),
                      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++)
            t[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0x88),
                  t[i + j + 4] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0xdd);
    for (int j = 0; j < 8; j++)
        v[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88), v[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
}

// 16 rows from row m of the left matrix x (M,K), or of its GELU, in steps of 32 from k to k + depth -> the tiles of all
// parts of each step
void split_left(const float* x, int64_t M, int64_t K, bool activated, int64_t m, int64_t k, int64_t depth,
                char* tiles) {
    float values[DEPTH];
    for (int64_t r = 0; r < EDGE; r++) {
        const float* row = x + (m + r) * K + k;
        if (activated && m + r < M) {
#pragma omp simd
            for (int64_t i = 0; i < depth; i++) values[i] = gelu(row[i]);
            row = values;
        }
        for (int64_t s = 0; s < depth; s += STEP) {
            __m512i parts[PARTS] = {};
            if (m + r < M) split_row(row + s, depth - s, parts);
            for (int p = 0; p < PARTS; p++)
                _mm512_store_si512(tiles + (s / STEP * PARTS + p) * TILE + r * 64, parts[p]);
        }
    }
}

// 32 rows from row k, and 16 columns from column n, of the right matrix, which is w (K,N), or its transpose where w is
// (N,K)
void split_right(const float* w, int64_t K, int64_t N, bool transposed, int64_t k, int64_t n, char* tiles) {
    __m512i rows[PARTS][EDGE];
    for (int64_t r = 0; r < EDGE; r++) {
        __m512i found[PARTS] = {}, next[PARTS] = {};
        if (transposed) {
            if (n + r < N) split_row(w + (n + r) * K + k, K - k, found);
        } else {
            if (k + 2 * r < K) split(load(w + (k + 2 * r) * N + n, N - n), found);
            if (k + 2 * r + 1 < K) split(load(w + (k + 2 * r + 1) * N + n, N - n), next);
            for (int p = 0; p < PARTS; p++)
                found[p] = _mm512_or_si512(_mm512_srli_epi32(found[p], 16),
                                           _mm512_and_si512(next[p], _mm512_set1_epi32(int(0xffff0000))));
        }
        for (int p = 0; p < PARTS; p++) rows[p][r] = found[p];
    }
    for (int p = 0; p < PARTS; p++) {
        if (transposed) transpose(rows[p]);
        for (int64_t r = 0; r < EDGE; r++) _mm512_store_si512(tiles + p * TILE + r * 64, rows[p][r]);
    }
}

// Registers 0 to 3 are c, 4 and 5 a part of the left matrix, 6 and 7 one of the right
#define LEFT(p) _tile_loadd(4, a + (p) * TILE, 64); _tile_loadd(5, a + apart + (p) * TILE, 64);
#define FIRST _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(2, 5, 6);
#define SECOND _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(3, 5, 7);
#define RIGHT(p) _tile_loadd(6, b + (p) * TILE, 64); FIRST _tile_loadd(7, b + apart + (p) * TILE, 64); SECOND

// c (32,32), begun with `start`, plus two row blocks times two column blocks, which lie so many bytes apart; strides in
// bytes
void multiply(const char* a, const char* b, int64_t apart, int64_t steps, const float* start, int64_t start_stride,
              float* c, int64_t stride) {
    _tile_loadd(0, start, start_stride);
    _tile_loadd(1, start + 16, start_stride);
    const float* lower = reinterpret_cast<const float*>(reinterpret_cast<const char*>(start) + 16 * start_stride);
    _tile_loadd(2, lower, start_stride);
    _tile_loadd(3, lower + 16, start_stride);
    for (int64_t s = 0; s < steps; s++, a += PARTS * TILE, b += PARTS * TILE) {
        LEFT(0) RIGHT(2) RIGHT(1) RIGHT(0)
        LEFT(1) FIRST SECOND RIGHT(1)
        LEFT(2) RIGHT(0)
    }
    float* under = reinterpret_cast<float*>(reinterpret_cast<char*>(c) + 16 * stride);
    _tile_stored(0, c, stride);
    _tile_stored(1, c + 16, stride);
    _tile_stored(2, under, stride);
    _tile_stored(3, under + 16, stride);
}

struct alignas(64) Tiles {
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Memory that a thread keeps from call to call: fresh pages cost as much as the product
char* scratch(std::vector<char>& kept, int64_t bytes) {
    if (int64_t(kept.size()) < bytes + 64) kept.resize(bytes + 64);
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(kept.data()) + 63) / 64 * 64);
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool transposed,
              bool activated) {
    const int64_t K = x.size(-1), N = weight.size(transposed ? 0 : 1), M = x.numel() / K,
                  threads = at::get_num_threads();
    TORCH_CHECK(allowed(), "this CPU, or its system, has no AMX tiles");
    TORCH_CHECK(weight.dim() == 2 && weight.size(transposed ? 1 : 0) == K && weight.is_contiguous() &&
                    x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat,
                "x ", x.sizes(), " ", x.scalar_type(), " and weight ", weight.sizes(), " ", weight.scalar_type(),
                " should be fp32, the weight contiguous, and fit each other");
    TORCH_CHECK(!bias.has_value() || (bias->numel() == N && bias->scalar_type() == at::kFloat), "bias should be ", N,
                " fp32 numbers");
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = N;
    Tensor y = at::empty(shape, x.options()), input = x.contiguous(),
           begun = at::zeros({blocks(N, STEP) * STEP}, x.options());
    if (bias.has_value()) begun.narrow(0, 0, N).copy_(*bias);
    const float *from = input.const_data_ptr<float>(), *w = weight.const_data_ptr<float>(),
                *start = begun.const_data_ptr<float>();
    float* to = y.mutable_data_ptr<float>();

    static thread_local std::vector<char> kept;
    const int64_t column = DEPTH / STEP * PARTS * TILE;  // bytes of 16 rows or columns of a split matrix
    char* left = scratch(kept, HEIGHT / EDGE * column);
    const int64_t panels = blocks(blocks(N, WIDTH), threads) * threads, wide = blocks(blocks(N, panels), STEP) * STEP;
    for (int64_t m0 = 0; m0 < M; m0 += HEIGHT)
        for (int64_t k = 0; k < K; k += DEPTH) {
            const int64_t m1 = std::min(m0 + HEIGHT, M), depth = std::min(DEPTH, K - k), steps = blocks(depth, STEP);
            at::parallel_for(0, 2 * blocks(m1 - m0, STEP), 1, [&](int64_t i, int64_t end) {
                for (; i < end; i++) split_left(from, M, K, activated, m0 + i * EDGE, k, depth, left + i * column);
            });
            at::parallel_for(0, blocks(N, wide), 1, [&](int64_t panel, int64_t end) {
                static thread_local std::vector<char> kept;
                char* right = scratch(kept, wide / EDGE * column);
                alignas(64) float edge[STEP * STEP];
                const Tiles tiles;
                _tile_loadconfig(&tiles);
                for (; panel < end; panel++) {
                    const int64_t n0 = panel * wide, n1 = std::min(n0 + wide, blocks(N, STEP) * STEP);
                    for (int64_t i = 0, across = (n1 - n0) / EDGE; i < steps * across; i++) {  // along the rows of w
                        const int64_t s = transposed ? i % steps : i / across, j = transposed ? i / steps : i % across;
                        split_right(w, K, N, transposed, k + s * STEP, n0 + j * EDGE,
                                    right + j * column + s * PARTS * TILE);
                    }
                    for (int64_t m = m0; m < m1; m += STEP)
                        for (int64_t n = n0; n < n1; n += STEP) {
                            const char *a = left + (m - m0) / EDGE * column, *b = right + (n - n0) / EDGE * column;
                            const int64_t high = std::min(STEP, M - m), across = std::min(STEP, N - n);
                            const bool whole = high == STEP && across == STEP;
                            float *c = to + m * N + n, *found = whole ? c : edge;
                            const int64_t stride = 4 * (whole ? N : STEP);
                            for (int64_t r = 0; r < high && k && !whole; r++)
                                std::copy_n(c + r * N, across, edge + r * STEP);
                            multiply(a, b, column, steps, k ? found : start + n, k ? stride : 0, found, stride);
                            for (int64_t r = 0; r < high && !whole; r++)
                                std::copy_n(edge + r * STEP, across, c + r * N);
                        }
                }
                _tile_release();
            });
        }
    return y;
}

}  // namespace
#else
namespace {
bool allowed() {
    return false;
}
Tensor linear(const Tensor&, const Tensor&, const std::optional<Tensor>&, bool, bool) {
    TORCH_CHECK(false, "the extension was built for a CPU without AMX tiles");
}
}  // namespace
#endif

namespace {
Tensor on_meta(const Tensor& x, const Tensor& weight, const std::optional<Tensor>&, bool transposed, bool) {
    auto shape = x.sym_sizes().vec();
    shape.back() = weight.sym_size(transposed ? 0 : 1);
    return at::empty_symint(shape, x.options());
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(nanowan_csrc, m) {
    m.def("has_tiles() -> bool", &allowed);
    m.def("linear(Tensor x, Tensor weight, Tensor? bias, bool transposed, bool activated) -> Tensor");
}
TORCH_LIBRARY_IMPL(nanowan_csrc, CPU, m) {
    m.impl("linear", &linear);
}
TORCH_LIBRARY_IMPL(nanowan_csrc, Meta, m) {
    m.impl("linear", &on_meta);
}
