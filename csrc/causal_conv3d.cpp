// nanowan_csrc::causal_conv3d(x, past, weight, bias, gamma) -> (out, new past): the VAE's causal convolution, stride 1,
// with what comes before it.
//
// x (B,C,T,H,W); past (B,C,2,H,W), the two frames before x as this convolution saw them, or none for zeros; weight
// (N,C,kt,k,k) of 3x3x3, 3x1x1 or 1x1x1, padded with zeros in space; with gamma (C) x is first RMS-normed over its
// channels, x / max(|x|, 1e-12) * sqrt(C) * gamma, and put through SiLU. out (B,N,T,H,W), and the two frames that stand
// before the next chunk (none with kt = 1). fp32 or bf16; what is fast is channels-last.
//
// On a CPU the frames before and the normed chunk are written once into one buffer, which oneDNN convolves; on a GPU
// causal_conv3d_kernel.cu reads both where they are.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <algorithm>
#include <optional>
#include <tuple>

#include "activations.h"
#ifdef NANOWAN_CUDA
#include <c10/cuda/CUDAStream.h>
#include <c10/cuda/CUDAGuard.h>
#include "causal_conv3d.h"
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

std::tuple<Tensor, Tensor> on_cpu(const Tensor& x_, const Maybe& past, const Tensor& w, const Maybe& bias,
                                  const Maybe& gamma) {
    check(x_, past, w, bias, gamma);
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
        if (gamma.has_value()) {
            const Tensor scale = gamma->contiguous();
            AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "norm_silu", [&] {
                for (int64_t b = 0; b < B; b++) {
                    const scalar_t* from = x.const_data_ptr<scalar_t>() + b * T * H * W * C;
                    scalar_t* to = all.mutable_data_ptr<scalar_t>() + (b * (before + T) + before) * H * W * C;
                    at::parallel_for(0, T * H * W, 64, [&](int64_t i, int64_t j) {
                        norm_silu(from + i * C, scale.const_data_ptr<scalar_t>(), to + i * C, C, j - i);
                    });
                }
            });
        } else {
            all.narrow(2, before, T).copy_(x);
        }
    }
    const int64_t pad = w.size(3) / 2;
    // PyTorch itself sends small maps to a slow path that oneDNN beats several times over
    Tensor out = x.scalar_type() == at::kFloat && at::globalContext().userEnabledMkldnn() && at::hasMKLDNN()
                     ? at::mkldnn_convolution(all, w, bias, {0, pad, pad}, {1, 1, 1}, {1, 1, 1}, 1)
                     : at::conv3d(all, w, bias, {1, 1, 1}, {0, pad, pad});
    return {out, before ? all.narrow(2, T, before).clone(LAST) : at::empty({0}, x.options())};
}

std::tuple<Tensor, Tensor> on_meta(const Tensor& x, const Maybe& past, const Tensor& w, const Maybe& bias,
                                   const Maybe& gamma) {
    check(x, past, w, bias, gamma);
    auto made = [&](c10::SymInt channels, c10::SymInt frames) {
        return at::empty_symint({x.sym_size(0), channels, frames, x.sym_size(3), x.sym_size(4)}, x.options())
            .contiguous(LAST);
    };
    return {made(w.sym_size(0), x.sym_size(2)), w.size(2) == 1 ? at::empty({0}, x.options()) : made(x.sym_size(1), 2)};
}

#ifdef NANOWAN_CUDA
std::tuple<Tensor, Tensor> on_cuda(const Tensor& x_, const Maybe& past_, const Tensor& w, const Maybe& bias_,
                                   const Maybe& gamma_) {
    check(x_, past_, w, bias_, gamma_);
    const c10::cuda::CUDAGuard guard(x_.device());
    const Tensor x = x_.contiguous(LAST), past = past_.has_value() ? past_->contiguous(LAST) : Tensor();
    const int64_t B = x.size(0), C = x.size(1), T = x.size(2), H = x.size(3), W = x.size(4), N = w.size(0),
                  kt = w.size(2), k = w.size(3);
    const bool half = x.scalar_type() == at::kBFloat16;
    TORCH_CHECK(half || x.scalar_type() == at::kFloat, "bf16 or fp32; x is ", x.scalar_type());
    const Tensor taps = w.contiguous(LAST), bias = bias_.has_value() ? bias_->to(at::kFloat).contiguous() : Tensor();
    Tensor normed = x;
    auto stream = c10::cuda::getCurrentCUDAStream().stream();
    if (gamma_.has_value()) {
        const Tensor gamma = gamma_->to(at::kFloat).contiguous();
        normed = at::empty_like(x);
        TORCH_CHECK(!nanowan_norm_silu(x.const_data_ptr(), gamma.const_data_ptr<float>(), normed.mutable_data_ptr(), C,
                                       B * T * H * W, half, stream),
                    "norm_silu: launch failed on x ", x.sizes());
    }
    Tensor out = at::empty({B, N, T, H, W}, x.options(), LAST);
    const CausalConv shape{B, C, T, H, W, N, kt, k};
    TORCH_CHECK(!nanowan_causal_conv3d(normed.const_data_ptr(), past.defined() ? past.const_data_ptr() : nullptr,
                                       taps.const_data_ptr(), bias.defined() ? bias.const_data_ptr<float>() : nullptr,
                                       out.mutable_data_ptr(), shape, half, stream),
                "causal_conv3d: launch failed on x ", x.sizes(), ", weight ", w.sizes());
    if (kt == 1) return {out, at::empty({0}, x.options())};
    Tensor next = at::empty({B, C, 2, H, W}, x.options(), LAST);
    if (T > 1)
        next.copy_(normed.narrow(2, T - 2, 2));
    else {
        if (past.defined())
            next.narrow(2, 0, 1).copy_(past.narrow(2, 1, 1));
        else
            next.narrow(2, 0, 1).zero_();
        next.narrow(2, 1, 1).copy_(normed);
    }
    return {out, next};
}
#endif

bool has_cuda() {
#ifdef NANOWAN_CUDA
    return true;
#else
    return false;
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nanowan_csrc, m) {
    m.def("causal_conv3d(Tensor x, Tensor? past, Tensor weight, Tensor? bias, Tensor? gamma) -> (Tensor, Tensor)");
    m.def("has_cuda() -> bool", &has_cuda);
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
