#pragma once
#include <cstdint>

// Sizes of the buffer that a convolution reads. It has B clips. Each clip has `before` rows of past frames, then
// `pixels` (T*H*W) rows of new frames; each row has C channels.
struct Clips {
    int64_t B, pixels, C, before;
};

#ifndef __CUDACC__
typedef struct CUstream_st* cudaStream_t;
#endif

extern "C" {
// Write a buffer: the rows of `past`, or zeros if it is null, then the rows of x. The buffer's last `before` rows are
// also written to `next`. If gamma is not null, each row of x is normed first: y = x + bias (if bias is not null), then
// y / max(|y|, 1e-12) * sqrt(C) * gamma, then SiLU. Tensors are bf16 if half, else fp32. All pointers but bias and
// gamma are multiples of 16 bytes. Returns 0 or a CUDA error.
int nanowan_fill_buffer(const void* x, const void* past, const float* bias, const float* gamma, void* buffer,
                        void* next, Clips clips, bool half, cudaStream_t stream);
// Whether this file has code for the current GPU, or PTX that the GPU can compile.
int nanowan_fits_this_gpu();
}
