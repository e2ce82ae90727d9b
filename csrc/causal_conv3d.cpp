// nanowan_csrc::causal_conv3d(x, past, weight, bias, gamma) -> (out, new past): the VAE's causal convolution, stride 1,
// with what comes before it.
//
// x (B,C,T,H,W); past (B,C,2,H,W), the two frames before x as this convolution saw them, or none for zeros; weight
// (N,C,kt,k,k) of 3x3x3, 3x1x1 or 1x1x1, padded with zeros in space; with gamma (C) x is first RMS-normed over its
// channels, x / max(|x|, 1e-12) * sqrt(C) * gamma, and put through SiLU. out (B,N,T,H,W), and the two frames that stand
// before the next chunk (none with kt = 1). fp32 or bf16; what is fast is channels-last.
//
// The frames before and the normed chunk are written once into one buffer, which winograd.cpp or oneDNN convolves on a
// CPU and cuDNN on a GPU, where causal_conv3d_kernel.cu norms.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <algorithm>
#include <optional>
#include <tuple>

#include "activations.h"
#include "causal_conv3d.h"
#include "winograd.h"
#ifdef NANOWAN_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

using at::Tensor;
using Maybe = std::optional<Tensor>;
constexpr auto LAST = at::MemoryFormat::ChannelsLast3d;

namespace {

void check(const Tensor& x, const Maybe& past, const Tensor& w, const Maybe& bias, const Maybe& gamma) {
    TORCH_CHECK(x.dim() == 5 && w.dim() == 5 && x.size(1) == w.size(1),
                "x should be (B,C,T,H,W) and weight (N,C,kt,k,k); x is ", x.sizes(), ", weight ", w.sizes());
    const int64_t kt = w.size(2), k = w.size(3);
    TORCH_CHECK(k == w.size(4) && ((kt == 3 && (k == 3 || k == 1)) || (kt == 1 && k == 1)),
                "a kernel of 3x3x3, 3x1x1 or 1x1x1; weight is ", w.sizes());
    TORCH_CHECK(
        !past.has_value() || (kt == 3 && past->dim() == 5 && past->size(0) == x.size(0) && past->size(1) == x.size(1) &&
                              past->size(2) == 2 && past->size(3) == x.size(3) && past->size(4) == x.size(4)),
        "past should be two frames of x ", x.sizes(), " before a kernel of three; it is ",
        past.has_value() ? past->sizes() : x.sizes());
    TORCH_CHECK(!bias.has_value() || bias->numel() == w.size(0), "bias should have ", w.size(0), " values and has ",
                bias.has_value() ? bias->numel() : 0);
    TORCH_CHECK(!gamma.has_value() || gamma->numel() == x.size(1), "gamma should have ", x.size(1), " values and has ",
                gamma.has_value() ? gamma->numel() : 0);
    for (const Maybe& other : {past, Maybe(w), bias, gamma})
        TORCH_CHECK(!other.has_value() || (other->device() == x.device() && other->scalar_type() == x.scalar_type()),
                    "everything should be on ", x.device(), " in ", x.scalar_type(), "; something is ",
                    other.has_value() ? other->scalar_type() : x.scalar_type());
}

// Pixels of C channels each, normed and put through SiLU.
template <typename T>
__attribute__((noinline)) void norm_silu(const T* __restrict x, const T* __restrict gamma, T* __restrict out, int64_t C,
                                         int64_t pixels) {
    for (int64_t p = 0; p < pixels; p++, x += C, out += C) {
        float squares = 0;
        for (int64_t c = 0; c < C; c++) squares += float(x[c]) * float(x[c]);
        const float r = std::sqrt(float(C)) / std::max(std::sqrt(squares), 1e-12f);
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
            const float v = float(x[c]) * r * float(gamma[c]);
            out[c] = T(v / (1 + exponential(-v)));
        }
    }
}

void norm_silu_on_cpu(const Tensor& x, const Tensor& gamma, const Tensor& all, const NormedClips& clips) {
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "norm_silu", [&] {
        for (int64_t b = 0; b < clips.B; b++) {
            const scalar_t* from = x.const_data_ptr<scalar_t>() + b * clips.pixels * clips.C;
            scalar_t* to =
                all.mutable_data_ptr<scalar_t>() + (b * (clips.before + clips.pixels) + clips.before) * clips.C;
            at::parallel_for(0, clips.pixels, 64, [&](int64_t i, int64_t j) {
                norm_silu(from + i * clips.C, gamma.const_data_ptr<scalar_t>(), to + i * clips.C, clips.C, j - i);
            });
        }
    });
}

#ifdef NANOWAN_CUDA
void norm_silu_on_cuda(const Tensor& x, const Tensor& gamma, const Tensor& all, const NormedClips& clips) {
    const bool half = x.scalar_type() == at::kBFloat16;
    TORCH_CHECK(half || x.scalar_type() == at::kFloat, "bf16 or fp32; x is ", x.scalar_type());
    TORCH_CHECK(!nanowan_norm_silu(x.const_data_ptr(), gamma.to(at::kFloat).const_data_ptr<float>(),
                                   all.mutable_data_ptr(), clips, half, c10::cuda::getCurrentCUDAStream().stream()),
                "norm_silu: launch failed on x ", x.sizes());
}
#endif

template <typename Norm>
std::tuple<Tensor, Tensor> convolve(const Tensor& x_, const Maybe& past, const Tensor& w, const Maybe& bias_,
                                    const Maybe& gamma, Norm norm) {
    check(x_, past, w, bias_, gamma);
    const Maybe bias = bias_.has_value() ? Maybe(bias_->contiguous()) : bias_;
    const Tensor x = x_.contiguous(LAST);
    const int64_t B = x.size(0), C = x.size(1), T = x.size(2), H = x.size(3), W = x.size(4), before = w.size(2) - 1;
    Tensor all = x;
    if (before || gamma.has_value()) {
        all = at::empty({B, C, before + T, H, W}, x.options(), LAST);
        if (before) {
            if (past.has_value())
                all.narrow(2, 0, before).copy_(*past);
            else
                all.narrow(2, 0, before).zero_();
        }
        if (gamma.has_value())
            norm(x, gamma->contiguous(), all, NormedClips{B, T * H * W, C, before * H * W});
        else
            all.narrow(2, before, T).copy_(x);
    }
    const int64_t pad = w.size(3) / 2;
    const bool fp32_on_cpu = x.is_cpu() && x.scalar_type() == at::kFloat;
    Tensor out;
    if (fp32_on_cpu && before && pad && std::min(C, w.size(0)) >= 96 && T * H * W >= 64)  // with fewer it is no faster
        out = winograd(all, w, bias);
    else if (fp32_on_cpu && at::globalContext().userEnabledMkldnn() && at::hasMKLDNN())
        // PyTorch itself sends small maps to a slow path that oneDNN beats several times over
        out = at::mkldnn_convolution(all, w, bias, {0, pad, pad}, {1, 1, 1}, {1, 1, 1}, 1);
    else
        out = at::conv3d(all, w, bias, {1, 1, 1}, {0, pad, pad});
    return {out, before ? all.narrow(2, T, before).clone(LAST) : at::empty({0}, x.options())};
}

std::tuple<Tensor, Tensor> on_cpu(const Tensor& x, const Maybe& past, const Tensor& w, const Maybe& bias,
                                  const Maybe& gamma) {
    return convolve(x, past, w, bias, gamma, norm_silu_on_cpu);
}

#ifdef NANOWAN_CUDA
std::tuple<Tensor, Tensor> on_cuda(const Tensor& x, const Maybe& past, const Tensor& w, const Maybe& bias,
                                   const Maybe& gamma) {
    const c10::cuda::CUDAGuard guard(x.device());
    return convolve(x, past, w, bias, gamma, norm_silu_on_cuda);
}
#endif

std::tuple<Tensor, Tensor> on_meta(const Tensor& x, const Maybe& past, const Tensor& w, const Maybe& bias,
                                   const Maybe& gamma) {
    check(x, past, w, bias, gamma);
    auto made = [&](c10::SymInt channels, c10::SymInt frames) {
        return at::empty_symint({x.sym_size(0), channels, frames, x.sym_size(3), x.sym_size(4)}, x.options())
            .contiguous(LAST);
    };
    return {made(w.sym_size(0), x.sym_size(2)), w.size(2) == 1 ? at::empty({0}, x.options()) : made(x.sym_size(1), 2)};
}

bool has_cuda() {
#ifdef NANOWAN_CUDA
    return true;
#else
    return false;
#endif
}

bool fits_this_gpu() {
#ifdef NANOWAN_CUDA
    return nanowan_fits_this_gpu();
#else
    return false;
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nanowan_csrc, m) {
    m.def("causal_conv3d(Tensor x, Tensor? past, Tensor weight, Tensor? bias, Tensor? gamma) -> (Tensor, Tensor)");
    m.def("has_cuda() -> bool", &has_cuda);
    m.def("fits_this_gpu() -> bool", &fits_this_gpu);
}
TORCH_LIBRARY_IMPL(nanowan_csrc, CPU, m) {
    m.impl("causal_conv3d", &on_cpu);
}
TORCH_LIBRARY_IMPL(nanowan_csrc, Meta, m) {
    m.impl("causal_conv3d", &on_meta);
}
#ifdef NANOWAN_CUDA
TORCH_LIBRARY_IMPL(nanowan_csrc, CUDA, m) {
    m.impl("causal_conv3d", &on_cuda);
}
#endif
