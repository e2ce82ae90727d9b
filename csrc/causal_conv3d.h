#pragma once
#include <cstdint>

// The buffer that a convolution reads: B clips, of which each has `before` rows that the convolution saw last and
// `pixels` (T*H*W) new ones, of C channels each.
struct Clips {
    int64_t B, pixels, C, before;
};

#ifndef __CUDACC__
typedef struct CUstream_st* cudaStream_t;
#endif

extern "C" {
// Write a buffer: the rows of `past`, or zeros if it is null, then those of x, and the last `before` of all to `next`
// too. With gamma x's rows are normed first, y = x + bias (if not null), y / max(|y|, 1e-12) * sqrt(C) * gamma, and put
// through SiLU. bf16 if half, else fp32; all but bias and gamma lie at multiples of 16 bytes. 0, or a CUDA error.
int nanowan_fill_buffer(const void* x, const void* past, const float* bias, const float* gamma, void* buffer,
                        void* next, Clips clips, bool half, cudaStream_t stream);
// Whether the current GPU has code here, or PTX that it can make its own.
int nanowan_fits_this_gpu();
}
