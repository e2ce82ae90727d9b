// What comes before the VAE's causal convolution on a GPU: RMS norm and SiLU, written where the convolution reads them,
// behind the frames before the chunk. One warp a pixel, 16 bytes a load. No torch headers: `nvcc -c` compiles this
// anywhere.
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
    norm_silu(const T* __restrict__ x, const float* __restrict__ gamma, T* __restrict__ out, NormedClips s) {
    const int64_t p = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32, packs = s.C / N;
    if (p >= s.B * s.pixels) return;
    const auto* from = reinterpret_cast<const Pack<T, N>*>(x + p * s.C);
    auto* to = reinterpret_cast<Pack<T, N>*>(out + (p + (p / s.pixels + 1) * s.before) * s.C);
    float squares = 0;
    for (int64_t i = threadIdx.x % 32; i < packs; i += 32) {
        const Pack<T, N> values = from[i];
#pragma unroll
        for (int j = 0; j < N; j++) squares += to_float(values.v[j]) * to_float(values.v[j]);
    }
    for (int other = 16; other; other /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, other);
    const float r = sqrtf(float(s.C)) / fmaxf(sqrtf(squares), 1e-12f);
    for (int64_t i = threadIdx.x % 32; i < packs; i += 32) {
        const Pack<T, N> values = from[i];
        const Pack<float, N> scale = reinterpret_cast<const Pack<float, N>*>(gamma)[i];
        Pack<T, N> results;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float v = to_float(values.v[j]) * r * scale.v[j];
            results.v[j] = from_float<T>(v / (1 + __expf(-v)));
        }
        to[i] = results;
    }
}

template <typename T>
int launch(const void* x, const float* gamma, void* out, const NormedClips& s, cudaStream_t stream) {
    constexpr int WIDE = 16 / sizeof(T);
    const unsigned blocks = unsigned((s.B * s.pixels + WARPS - 1) / WARPS);
    const auto kernel = s.C % WIDE ? norm_silu<T, 1> : norm_silu<T, WIDE>;
    kernel<<<blocks, THREADS, 0, stream>>>(static_cast<const T*>(x), gamma, static_cast<T*>(out), s);
    return int(cudaGetLastError());
}

}  // namespace

int nanowan_norm_silu(const void* x, const float* gamma, void* out, NormedClips s, bool half, cudaStream_t stream) {
    return half ? launch<__nv_bfloat16>(x, gamma, out, s, stream) : launch<float>(x, gamma, out, s, stream);
}

int nanowan_fits_this_gpu() {
    cudaFuncAttributes attributes;
    const int error = int(cudaFuncGetAttributes(&attributes, norm_silu<float, 4>));
    cudaGetLastError();  // which else the next launch would report
    return !error;
}
