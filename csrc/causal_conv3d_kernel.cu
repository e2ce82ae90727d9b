// The operations before the VAE's causal convolution on a GPU: write the past frames to the buffer that the convolution
// reads, and after them the chunk with RMS norm and SiLU. One warp per row, 16 bytes per load. This file includes no
// torch headers, so `nvcc -c` compiles it anywhere. kernels/causal_conv3d.py has the same kernel in Triton.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "causal_conv3d.h"

namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;

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

template <typename T, int N>
struct __align__(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
    T v[N];
};

// N: how many values are loaded at once; it divides C
template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
    fill_buffer(const T* __restrict__ x, const T* __restrict__ past, const float* __restrict__ bias,
                const float* __restrict__ gamma, T* __restrict__ buffer, T* __restrict__ next, Clips s) {
    using Values = Pack<T, N>;
    using Floats = Pack<float, N>;
    const int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32, rows = s.before + s.pixels;
    if (row >= s.B * rows) return;
    const int64_t b = row / rows, i = row % rows;
    const int lane = threadIdx.x % 32, packs = int(s.C / N);
    auto* to = reinterpret_cast<Values*>(buffer + row * s.C);
    auto* last = i < s.pixels ? to : reinterpret_cast<Values*>(next + (b * s.before + i - s.pixels) * s.C);
    const T* source = i >= s.before ? x + (b * s.pixels + i - s.before) * s.C : past + (b * s.before + i) * s.C;
    const auto* from = reinterpret_cast<const Values*>(source);
    if (i < s.before || !gamma) {
        for (int k = lane; k < packs; k += 32) {
            Values values{};
            if (i >= s.before || past) values = from[k];
            last[k] = to[k] = values;
        }
        return;
    }
    float squares = 0;
    for (int k = lane; k < packs; k += 32) {
        const Values values = from[k];
        const Floats shift = bias ? reinterpret_cast<const Floats*>(bias)[k] : Floats{};
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float v = to_float(values.v[j]) + shift.v[j];
            squares += v * v;
        }
    }
    for (int other = 16; other; other /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, other);
    const float r = sqrtf(float(s.C)) / fmaxf(sqrtf(squares), 1e-12f);
    for (int k = lane; k < packs; k += 32) {
        Values values = from[k];
        const Floats shift = bias ? reinterpret_cast<const Floats*>(bias)[k] : Floats{};
        const Floats scale = reinterpret_cast<const Floats*>(gamma)[k];
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float v = (to_float(values.v[j]) + shift.v[j]) * r * scale.v[j];
            values.v[j] = from_float<T>(v / (1 + __expf(-v)));
        }
        last[k] = to[k] = values;
    }
}

template <typename T>
int launch(const void* x, const void* past, const float* bias, const float* gamma, void* buffer, void* next,
           const Clips& s, cudaStream_t stream) {
    constexpr int WIDE = 16 / sizeof(T);
    const unsigned blocks = unsigned((s.B * (s.before + s.pixels) + WARPS - 1) / WARPS);
    const auto kernel = s.C % WIDE ? fill_buffer<T, 1> : fill_buffer<T, WIDE>;
    kernel<<<blocks, THREADS, 0, stream>>>(static_cast<const T*>(x), static_cast<const T*>(past), bias, gamma,
                                           static_cast<T*>(buffer), static_cast<T*>(next), s);
    return int(cudaGetLastError());
}

}  // namespace

int nanowan_fill_buffer(const void* x, const void* past, const float* bias, const float* gamma, void* buffer,
                        void* next, Clips s, bool half, cudaStream_t stream) {
    return half ? launch<__nv_bfloat16>(x, past, bias, gamma, buffer, next, s, stream)
                : launch<float>(x, past, bias, gamma, buffer, next, s, stream);
}

int nanowan_fits_this_gpu() {
    cudaFuncAttributes attributes;
    const int error = int(cudaFuncGetAttributes(&attributes, fill_buffer<float, 4>));
    cudaGetLastError();  // clears the error, which the next launch would report otherwise
    return !error;
}
