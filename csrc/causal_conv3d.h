#pragma once
#include <cstdint>

// B clips of `pixels` (T*H*W) rows of C channels; `before` rows stand before each clip in the output only.
struct NormedClips {
    int64_t B, pixels, C, before;
};

#ifndef __CUDACC__
typedef struct CUstream_st* cudaStream_t;
#endif

extern "C" {
// x / max(|x|, 1e-12) * sqrt(C) * gamma, then SiLU, of every row; bf16 if half, else fp32; x and out lie at multiples
// of 16 bytes. 0, or a CUDA error.
int nanowan_norm_silu(const void* x, const float* gamma, void* out, NormedClips clips, bool half, cudaStream_t stream);
// Whether the current GPU has code here, or PTX that it can make its own.
int nanowan_fits_this_gpu();
}
