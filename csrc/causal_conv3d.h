#pragma once
#include <cstdint>

// The buffer that a convolution reads: B clips, each with `before` rows that the convolution saw last and `pixels`
// (T*H*W) new rows, of C channels each.
struct Clips {
    int64_t B, pixels, C, before;
};

#ifndef __CUDACC__
typedef struct CUstream_st* cudaStream_t;
#endif

extern "C" {
// Write a buffer: the rows of `past`, or zeros if it is null, then the rows of x; the last `before` rows also to
// `next`. With gamma, x's rows are normed first, y = x + bias (if not null), y / max(|y|, 1e-12) * sqrt(C) * gamma, and
// SiLU is applied. bf16 if half, else fp32; all pointers but bias and gamma are multiples of 16 bytes. Returns 0 or a
// CUDA error.
int nanowan_fill_buffer(const void* x, const void* past, const float* bias, const float* gamma, void* buffer,
                        void* next, Clips clips, bool half, cudaStream_t stream);
// Whether this file has code for the current GPU, or PTX that the GPU can compile.
int nanowan_fits_this_gpu();
}
