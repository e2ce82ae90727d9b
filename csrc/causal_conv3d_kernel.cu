// The causal convolution on tensor cores, sm_80 and up: an implicit GEMM over output pixels (rows), output channels
// (columns) and taps x input channels (the sum). A block makes 128 pixels x 128 channels in 8 warps of 32 x 64. The
// rows of the left matrix are fetched where they lie, from the two frames before the chunk, from the chunk, or as zeros
// beyond the border: nothing is padded or concatenated. Tiles come by cp.async, one ahead of the multiplication. No
// torch headers: `nvcc -c` compiles this anywhere.
#include <cuda_bf16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#include <mma.h>

#include "causal_conv3d.h"

using namespace nvcuda;

namespace {

constexpr int M = 128, N = 128, WARPS = 8, THREADS = 32 * WARPS;

template <typename T>
struct Kind;  // how a dtype meets the tensor cores: the depth of a tile, of one multiplication, and the fragments' type
template <>
struct Kind<__nv_bfloat16> {
    static constexpr int DEPTH = 32, STEP = 16, PAD = 8;
    using Fragment = __nv_bfloat16;
};
template <>
struct Kind<float> {
    static constexpr int DEPTH = 16, STEP = 8, PAD = 4;
    using Fragment = wmma::precision::tf32;
};

template <typename T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
    return v;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
    return __float2bfloat16(v);
}
__device__ inline float to_float(float v) {
    return v;
}
__device__ inline float to_float(__nv_bfloat16 v) {
    return __bfloat162float(v);
}

template <typename T>
struct Tiles {
    static constexpr int DEPTH = Kind<T>::DEPTH, PAD = Kind<T>::PAD;
    T rows[2][M][DEPTH + PAD], taps[2][N][DEPTH + PAD];
};

// WIDE: C is a multiple of 16 bytes, so that tiles come in pieces of that
template <typename T, bool WIDE>
__global__ void __launch_bounds__(THREADS)
    convolve(const T* __restrict__ x, const T* __restrict__ past, const T* __restrict__ taps,
             const float* __restrict__ bias, T* __restrict__ out, CausalConv s) {
    using K = Kind<T>;
    constexpr int DEPTH = K::DEPTH, PIECE = WIDE ? 16 / sizeof(T) : 1;
    __shared__ __align__(32) Tiles<T> tiles;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, pad = int(s.k) / 2;
    const int64_t pixels = s.B * s.T * s.H * s.W, first = int64_t(blockIdx.x) * M;
    const int column = blockIdx.y * N, depths = (int(s.C) + DEPTH - 1) / DEPTH, steps = int(s.kt * s.k * s.k) * depths;

    // every thread fetches pieces of the same rows at every step: their pixels are worked out once
    constexpr int ROW_PIECES = DEPTH / PIECE, ROW_STRIDE = THREADS / ROW_PIECES, MINE = M / ROW_STRIDE;
    static_assert(THREADS % ROW_PIECES == 0 && M % ROW_STRIDE == 0 && N % ROW_STRIDE == 0,
                  "rows must be shared out evenly");
    const int piece = thread % ROW_PIECES * PIECE;

    auto load = [&](int step, int to) {
        const int tap = step / depths, c = step % depths * DEPTH, dt = tap / int(s.k * s.k),
                  dy = tap / int(s.k) % int(s.k) - pad, dx = tap % int(s.k) - pad;
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int row = thread / ROW_PIECES + i * ROW_STRIDE;
            const int64_t p = first + row;
            const int w = int(p % s.W) + dx, h = int(p / s.W % s.H) + dy,
                      t = int(p / (s.W * s.H) % s.T) + dt - int(s.kt - 1);
            const int64_t b = p / (s.W * s.H * s.T);
            const T* frame = t >= 0 ? x + (b * s.T + t) * s.H * s.W * s.C : past + (b * 2 + t + 2) * s.H * s.W * s.C;
            const bool real =
                p < pixels && w >= 0 && w < s.W && h >= 0 && h < s.H && (t >= 0 || past) && c + piece < s.C;
            const T* from = real ? frame + (int64_t(h) * s.W + w) * s.C + c + piece : x;
            if constexpr (WIDE)
                __pipeline_memcpy_async(&tiles.rows[to][row][piece], from, 16, real ? 0 : 16);
            else
                tiles.rows[to][row][piece] = real ? *from : from_float<T>(0);
        }
#pragma unroll
        for (int n = thread / ROW_PIECES; n < N; n += ROW_STRIDE) {
            const bool real = c + piece < s.C && column + n < s.N;
            const T* from = real ? taps + ((column + n) * s.kt * s.k * s.k + tap) * s.C + c + piece : taps;
            if constexpr (WIDE)
                __pipeline_memcpy_async(&tiles.taps[to][n][piece], from, 16, real ? 0 : 16);
            else
                tiles.taps[to][n][piece] = real ? *from : from_float<T>(0);
        }
    };

    wmma::fragment<wmma::accumulator, 16, 16, K::STEP, float> sums[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) wmma::fill_fragment(sums[i][j], 0.0f);
    const int top = warp % 4 * 32, left = warp / 4 * 64;

    load(0, 0);
    for (int step = 0; step < steps; step++) {
        const int now = step % 2;
        __pipeline_commit();
        __pipeline_wait_prior(0);
        __syncthreads();  // this tile is whole, and nobody still reads the other
        if (step + 1 < steps) load(step + 1, 1 - now);
#pragma unroll
        for (int d = 0; d < DEPTH; d += K::STEP) {
            wmma::fragment<wmma::matrix_a, 16, 16, K::STEP, typename K::Fragment, wmma::row_major> a[2];
#pragma unroll
            for (int i = 0; i < 2; i++) wmma::load_matrix_sync(a[i], &tiles.rows[now][top + 16 * i][d], DEPTH + K::PAD);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                wmma::fragment<wmma::matrix_b, 16, 16, K::STEP, typename K::Fragment, wmma::col_major> b;
                wmma::load_matrix_sync(b, &tiles.taps[now][left + 16 * j][d], DEPTH + K::PAD);
#pragma unroll
                for (int i = 0; i < 2; i++) wmma::mma_sync(sums[i][j], a[i], b, sums[i][j]);
            }
        }
    }

    __syncthreads();
    // the tiles have been read; what a warp stages lies in their place
    float (*staged)[16][20] = reinterpret_cast<float (*)[16][20]>(&tiles);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            wmma::store_matrix_sync(&staged[warp][0][0], sums[i][j], 20, wmma::mem_row_major);
            __syncwarp();
            for (int e = lane; e < 256; e += 32) {
                const int64_t p = first + top + 16 * i + e / 16;
                const int n = column + left + 16 * j + e % 16;
                if (p < pixels && n < s.N)
                    out[p * s.N + n] = from_float<T>(staged[warp][e / 16][e % 16] + (bias ? bias[n] : 0.0f));
            }
            __syncwarp();
        }
}

// One warp a pixel.
template <typename T>
__global__ void __launch_bounds__(THREADS) norm_silu(const T* __restrict__ x, const float* __restrict__ gamma,
                                                     T* __restrict__ out, int64_t C, int64_t pixels) {
    const int64_t p = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (p >= pixels) return;
    float squares = 0;
    for (int64_t c = threadIdx.x % 32; c < C; c += 32) {
        const float v = to_float(x[p * C + c]);
        squares += v * v;
    }
    for (int other = 16; other; other /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, other);
    const float r = sqrtf(float(C)) / fmaxf(sqrtf(squares), 1e-12f);
    for (int64_t c = threadIdx.x % 32; c < C; c += 32) {
        const float v = to_float(x[p * C + c]) * r * gamma[c];
        out[p * C + c] = from_float<T>(v / (1 + __expf(-v)));
    }
}

template <typename T>
int launch(const void* x, const void* past, const void* taps, const float* bias, void* out, const CausalConv& s,
           cudaStream_t stream) {
    const dim3 grid(unsigned((s.B * s.T * s.H * s.W + M - 1) / M), unsigned((s.N + N - 1) / N));
    const auto kernel = (s.C * sizeof(T)) % 16 ? convolve<T, false> : convolve<T, true>;
    kernel<<<grid, THREADS, 0, stream>>>(static_cast<const T*>(x), static_cast<const T*>(past),
                                         static_cast<const T*>(taps), bias, static_cast<T*>(out), s);
    return int(cudaGetLastError());
}

}  // namespace

int nanowan_causal_conv3d(const void* x, const void* past, const void* taps, const float* bias, void* out,
                          CausalConv shape, bool half, cudaStream_t stream) {
    return half ? launch<__nv_bfloat16>(x, past, taps, bias, out, shape, stream)
                : launch<float>(x, past, taps, bias, out, shape, stream);
}

int nanowan_norm_silu(const void* x, const float* gamma, void* out, int64_t C, int64_t pixels, bool half,
                      cudaStream_t stream) {
    const unsigned blocks = unsigned((pixels + WARPS - 1) / WARPS);
    if (half)
        norm_silu<__nv_bfloat16><<<blocks, THREADS, 0, stream>>>(static_cast<const __nv_bfloat16*>(x), gamma,
                                                                 static_cast<__nv_bfloat16*>(out), C, pixels);
    else
        norm_silu<float><<<blocks, THREADS, 0, stream>>>(static_cast<const float*>(x), gamma,
                                                         static_cast<float*>(out), C, pixels);
    return int(cudaGetLastError());
}
