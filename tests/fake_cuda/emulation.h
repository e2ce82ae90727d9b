// Just enough of CUDA in C++ threads to run csrc/causal_conv3d_kernel.cu without a GPU.
// A thread is a thread, blocks come one after another, a barrier is a barrier. Slow, and without any of the hardware's
// timing: it checks arithmetic and indices.
#pragma once
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(n)
#define __syncthreads() emulation::block->arrive_and_wait()
#define __syncwarp() emulation::warps[threadIdx.x / 32]->arrive_and_wait()

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
typedef struct CUstream_st* cudaStream_t;
inline thread_local dim3 threadIdx;
inline dim3 blockIdx;

namespace emulation {
using Barrier = std::barrier<>;
inline std::unique_ptr<Barrier> block;
inline std::vector<std::unique_ptr<Barrier>> warps;
inline float lanes[1024];

template <typename Kernel>
auto launch(Kernel kernel, dim3 grid, unsigned threads) {
    return [=](auto... arguments) {
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = dim3(x, y);
                block = std::make_unique<Barrier>(threads);
                warps.clear();
                for (unsigned w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<Barrier>(32));
                std::vector<std::thread> all;
                for (unsigned t = 0; t < threads; t++)
                    all.emplace_back([=] {
                        threadIdx = dim3(t);
                        kernel(arguments...);
                    });
                for (auto& t : all) t.join();
            }
    };
}
}  // namespace emulation

inline int cudaGetLastError() { return 0; }
struct cudaFuncAttributes {};
template <typename Kernel>
int cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) { return 0; }
inline float __expf(float x) { return std::exp(x); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    emulation::lanes[threadIdx.x] = value;
    __syncwarp();
    const float other = emulation::lanes[threadIdx.x ^ mask];
    __syncwarp();
    return other;
}

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
inline __nv_bfloat16 __float2bfloat16(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
