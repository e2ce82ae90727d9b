#pragma once
#include <cstdint>

// A causal convolution of x (B,T,H,W,C) after past (B,2,H,W,C), channels last in memory, with taps (N,kt,k,k,C) ->
// (B,T,H,W,N).
struct CausalConv {
    int64_t B, C, T, H, W, N, kt, k;
};

#ifndef __CUDACC__
typedef struct CUstream_st* cudaStream_t;
#endif

extern "C" {
// bf16 if half, else fp32 multiplied in TF32; sums are fp32. past or bias may be null. 0, or a CUDA error.
int nanowan_causal_conv3d(const void* x, const void* past, const void* taps, const float* bias, void* out,
                          CausalConv shape, bool half, cudaStream_t stream);
// x / max(|x|, 1e-12) * sqrt(C) * gamma, then SiLU, for `pixels` rows of C. 0, or a CUDA error.
int nanowan_norm_silu(const void* x, const float* gamma, void* out, int64_t C, int64_t pixels, bool half,
                      cudaStream_t stream);
}
