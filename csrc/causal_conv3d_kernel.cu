// What comes before the VAE's causal convolution on a GPU: RMS norm and SiLU, written where the convolution reads them,
// behind the frames before the chunk. One warp a row, 16 bytes a load. No torch headers: `nvcc -c` compiles this
// anywhere. kernels/causal_conv3d.py has the same in Triton.
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

// N: values at once, which divides C
template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
    fill_buffer(const T* __restrict__ x, const T* __restrict__ past, const float* __restrict__ bias,
                const float* __restrict__ gamma, T* __restrict__ buffer, T* __restrict__ next, Clips s) {
    using Values = Pack<T, N>;
    using Floats = Pack<float, N>;
    const int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32, rows = s.before + s.pixels;
    if (row >= s.B * rows) return;
    const int64_t b = row / rows, i = row % rows, packs = s.C / N;
    const bool is_new = i >= s.before, normed = is_new && gamma;
    const T* source = is_new ? x + (b * s.pixels + i - s.before) * s.C : past ? past + (b * s.before + i) * s.C : x;
    const auto* from = reinterpret_cast<const Values*>(source);
    auto* to = reinterpret_cast<Values*>(buffer + row * s.C);
    auto* last = reinterpret_cast<Values*>(next + (b * s.before + i - s.pixels) * s.C);
    // a pack of the row as it is normed: with the bias, or zeros where there is no past
    const auto load = [&](int64_t k) {
        const Values values = from[k];
        Floats shift, v;
        if (bias) shift = reinterpret_cast<const Floats*>(bias)[k];
#pragma unroll
        for (int j = 0; j < N; j++) {
            v.v[j] = is_new || past ? to_float(values.v[j]) : 0.0f;
            if (normed && bias) v.v[j] += shift.v[j];
        }
        return v;
    };
    float r = 1;
    if (normed) {
        float squares = 0;
        for (int64_t k = threadIdx.x % 32; k < packs; k += 32) {
            const Floats v = load(k);
#pragma unroll
            for (int j = 0; j < N; j++) squares += v.v[j] * v.v[j];
        }
        for (int other = 16; other; other /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, other);
        r = sqrtf(float(s.C)) / fmaxf(sqrtf(squares), 1e-12f);
    }
    for (int64_t k = threadIdx.x % 32; k < packs; k += 32) {
        const Floats v = load(k);
        Floats scale;
        if (normed) scale = reinterpret_cast<const Floats*>(gamma)[k];
        Values results;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float n = normed ? v.v[j] * r * scale.v[j] : v.v[j];
            results.v[j] = from_float<T>(normed ? n / (1 + __expf(-n)) : n);
        }
        to[k] = results;
        if (i >= s.pixels) last[k] = results;
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
    cudaGetLastError();  // which else the next launch would report
    return !error;
}
