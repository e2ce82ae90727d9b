// 3x3x3 convolutions in fp32 on a CPU by Winograd's minimal filtering, F(2x2,3x3) in space (Lavin and Gray, Fast
// algorithms for convolutional neural networks, 2015): 2.25 times fewer multiplications than the definition has. The
// measured errors are smaller too, since each sum is shorter.
//
// For every 2x2 output pixels, the 4x4 input pixels d around them become 16 points, B^T d B. At each point, three
// matrix products with the weights G w G^T convolve in time, which gives m. The output pixels are A^T m A.
#include "winograd.h"

#include <ATen/Parallel.h>
#include <algorithm>
#include <cstring>
#include <vector>

using at::Tensor;
constexpr int64_t POINTS = 16;
constexpr int64_t ROWS = 512, COLUMNS = 128;  // about the size of a matrix product whose operands stay in the caches

namespace {

// Sixteen floats, or a single one if fewer are left: the functions below are templates for both.
typedef float Vector __attribute__((vector_size(64)));

template <typename V>
V load(const float* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}

template <typename V>
void store(float* to, V v) {
    std::memcpy(to, &v, sizeof(V));
}

template <typename Body>
void over_channels(int64_t C, const Body& body) {
    int64_t c = 0;
    for (; c + 16 <= C; c += 16) body(c, Vector{});
    for (; c < C; c++) body(c, float{});
}

// One axis of B^T d, G w and A^T m.
template <typename V>
void to_points(const V (&d)[4], V (&v)[4]) {
    v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
}

template <typename V>
void to_points(const V (&w)[3], V (&u)[4]) {
    const V outer = 0.5f * (w[0] + w[2]), middle = 0.5f * w[1];
    u[0] = w[0], u[1] = outer + middle, u[2] = outer - middle, u[3] = w[2];
}

template <typename V>
void to_pixels(const V (&m)[4], V (&y)[2]) {
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
}

// Transform C channels of a tile (size 4) or a kernel (size 3) to 16 points, which are `stride` floats apart. Pixel
// (x, y) is at from[y * size + x].
template <int size>
void square_to_points(const float* const* from, float* to, int64_t stride, int64_t C) {
    over_channels(C, [&]<typename V>(int64_t c, V) {
        V rows[4][size];
        for (int x = 0; x < size; x++) {
            V column[size], v[4];
            for (int y = 0; y < size; y++) column[y] = load<V>(from[y * size + x] + c);
            to_points(column, v);
            for (int y = 0; y < 4; y++) rows[y][x] = v[y];
        }
        for (int y = 0; y < 4; y++) {
            V v[4];
            to_points(rows[y], v);
            for (int x = 0; x < 4; x++) store(to + (y * 4 + x) * stride + c, v[x]);
        }
    });
}

// Transform N channels at 16 points to 2x2 pixels. Pixel (x, y) goes to to[y * 2 + x].
void points_to_square(const float* from, int64_t stride, const float* bias, float* const* to, int64_t N) {
    over_channels(N, [&]<typename V>(int64_t n, V) {
        V rows[2][4];
        for (int x = 0; x < 4; x++) {
            V column[4], y[2];
            for (int i = 0; i < 4; i++) column[i] = load<V>(from + (i * 4 + x) * stride + n);
            to_pixels(column, y);
            rows[0][x] = y[0], rows[1][x] = y[1];
        }
        const V b = load<V>(bias + n);
        for (int i = 0; i < 2; i++) {
            V y[2];
            to_pixels(rows[i], y);
            store(to[i * 2] + n, y[0] + b), store(to[i * 2 + 1] + n, y[1] + b);
        }
    });
}

}  // namespace

Tensor winograd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_) {
    constexpr auto LAST = at::MemoryFormat::ChannelsLast3d;
    const int64_t B = x.size(0), C = x.size(1), F = x.size(2), H = x.size(3), W = x.size(4), N = weight.size(0);
    const int64_t T = F - 2, down = (H + 1) / 2, across = (W + 1) / 2;
    const int64_t most = std::clamp<int64_t>(ROWS / (T * across), 1, down);  // number of rows of tiles per pass
    const Tensor w = weight.contiguous(LAST);
    const Tensor bias = bias_.has_value() ? bias_->contiguous() : at::zeros({N}, x.options());
    const Tensor out = at::empty({B, N, T, H, W}, x.options(), LAST);
    const Tensor tiles_at = at::empty({POINTS, F * most * across, C}, x.options());
    const Tensor weights_at = at::empty({POINTS, 3, std::min(N, COLUMNS), C}, x.options());
    const Tensor sums_at = at::empty({POINTS, T * most * across, std::min(N, COLUMNS)}, x.options());
    const float *from = x.const_data_ptr<float>(), *kernels = w.const_data_ptr<float>();
    const float *shift = bias.const_data_ptr<float>(), *summed = sums_at.const_data_ptr<float>();
    float *v = tiles_at.mutable_data_ptr<float>(), *u = weights_at.mutable_data_ptr<float>();
    float* to = out.mutable_data_ptr<float>();
    const std::vector<float> zeros(C);

    for (int64_t b = 0; b < B; b++)
        for (int64_t top = 0; top < down; top += most) {
            const int64_t tiles = std::min(most, down - top) * across;  // number of tiles of each frame
            at::parallel_for(0, F * tiles, 16, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) {
                    const int64_t frame = b * F + i / tiles, row = top + i % tiles / across, column = i % across;
                    const float* pixels[16];
                    for (int64_t p = 0; p < 16; p++) {
                        const int64_t y = 2 * row - 1 + p / 4, x = 2 * column - 1 + p % 4;
                        const bool inside = y >= 0 && y < H && x >= 0 && x < W;
                        pixels[p] = inside ? from + ((frame * H + y) * W + x) * C : zeros.data();
                    }
                    square_to_points<4>(pixels, v + i * C, tiles_at.stride(0), C);
                }
            });
            for (int64_t first = 0; first < N; first += COLUMNS) {
                const int64_t columns = std::min(COLUMNS, N - first);
                at::parallel_for(0, 3 * columns, 8, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; i++) {
                        const int64_t tap = i / columns, n = i % columns;
                        const float* pixels[9];
                        for (int64_t p = 0; p < 9; p++) pixels[p] = kernels + (((first + n) * 3 + tap) * 9 + p) * C;
                        square_to_points<3>(pixels, u + (tap * weights_at.size(2) + n) * C, weights_at.stride(0), C);
                    }
                });
                // if there are more threads than points, several share a point's rows
                const int64_t rows = T * tiles, shares = (at::get_num_threads() + POINTS - 1) / POINTS;
                at::parallel_for(0, POINTS * shares, 1, [&](int64_t begin, int64_t end) {
                    const at::AutoDispatchBelowADInplaceOrView here;  // inference_mode is not set in other threads
                    for (int64_t i = begin; i < end; i++) {
                        const int64_t point = i / shares, share = i % shares, row = rows * share / shares;
                        const int64_t count = rows * (share + 1) / shares - row;
                        Tensor sums = sums_at[point].narrow(0, row, count).narrow(1, 0, columns);
                        for (int64_t tap = 0; tap < 3; tap++)
                            at::addmm_out(sums, sums, tiles_at[point].narrow(0, tap * tiles + row, count),
                                          weights_at[point][tap].narrow(0, 0, columns).t(), tap ? 1 : 0);
                    }
                });
                at::parallel_for(0, T * tiles, 16, [&](int64_t begin, int64_t end) {
                    std::vector<float> outside(columns);
                    for (int64_t i = begin; i < end; i++) {
                        const int64_t frame = b * T + i / tiles, row = top + i % tiles / across, column = i % across;
                        float* pixels[4];
                        for (int64_t p = 0; p < 4; p++) {
                            const int64_t y = 2 * row + p / 2, x = 2 * column + p % 2;
                            pixels[p] = y < H && x < W ? to + ((frame * H + y) * W + x) * N + first : outside.data();
                        }
                        points_to_square(summed + i * sums_at.stride(1), sums_at.stride(0), shift + first, pixels,
                                         columns);
                    }
                });
            }
        }
    return out;
}
