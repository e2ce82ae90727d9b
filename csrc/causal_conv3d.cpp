// nanowan_csrc::causal_conv3d computes the VAE's causal convolution, with the operations before and after it, on a CPU.
// kernels/causal_conv3d.py defines it. It takes fp32 or bf16, and is fast for channels-last tensors.
// nanowan_csrc::fill_buffer computes the operations before the convolution on a GPU.
//
// The past frames and the normed chunk are written once into one buffer, which winograd.cpp or oneDNN convolves on a
// CPU and cuDNN on a GPU.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <algorithm>
#include <array>
#include <cstring>
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

void check(const Tensor& x, const Maybe& past, const Tensor& w, const Maybe& bias, const Maybe& gamma,
           const Maybe& input_bias, const Maybe& residual) {
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
    for (const auto& [name, given, size] : {std::tuple("bias", bias, w.size(0)), std::tuple("gamma", gamma, x.size(1)),
                                            std::tuple("input_bias", input_bias, x.size(1))})
        TORCH_CHECK(!given.has_value() || given->numel() == size, name, " should have ", size, " values and has ",
                    given.has_value() ? given->numel() : 0);
    TORCH_CHECK(!input_bias.has_value() || gamma.has_value(), "input_bias is for a norm; there is no gamma");
    const std::array<int64_t, 5> result{x.size(0), w.size(0), x.size(2), x.size(3), x.size(4)};
    TORCH_CHECK(!residual.has_value() || residual->sizes() == at::IntArrayRef(result), "residual should be ",
                at::IntArrayRef(result), " and is ", residual.has_value() ? residual->sizes() : x.sizes());
    for (const Maybe& other : {past, Maybe(w), bias, gamma, input_bias, residual})
        TORCH_CHECK(!other.has_value() || (other->device() == x.device() && other->scalar_type() == x.scalar_type()),
                    "everything should be on ", x.device(), " in ", x.scalar_type(), "; something is ",
                    other.has_value() ? other->scalar_type() : x.scalar_type());
}

// Norm one row of C channels and apply SiLU.
template <typename T>
__attribute__((noinline)) void norm_silu(const T* __restrict x, const T* __restrict bias, const T* __restrict gamma,
                                         T* __restrict out, int64_t C) {
    float squares = 0;
    for (int64_t c = 0; c < C; c++) squares += (float(x[c]) + float(bias[c])) * (float(x[c]) + float(bias[c]));
    const float r = std::sqrt(float(C)) / std::max(std::sqrt(squares), 1e-12f);
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
        const float v = (float(x[c]) + float(bias[c])) * r * float(gamma[c]);
        out[c] = T(v / (1 + exponential(-v)));
    }
}

// The same as nanowan_fill_buffer in causal_conv3d.h, on a CPU.
void fill_buffer(const Tensor& x, const Maybe& past, const Maybe& input_bias, const Maybe& gamma, const Tensor& buffer,
                 const Tensor& next, const Clips& s) {
    const Tensor bias = input_bias.has_value() ? input_bias->contiguous() : at::zeros({s.C}, x.options());
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "fill_buffer", [&] {
        const auto* from = x.const_data_ptr<scalar_t>();
        const auto* before = past.has_value() ? past->const_data_ptr<scalar_t>() : nullptr;
        const auto* shift = bias.const_data_ptr<scalar_t>();
        const auto* scale = gamma.has_value() ? gamma->const_data_ptr<scalar_t>() : nullptr;
        auto* to = buffer.mutable_data_ptr<scalar_t>();
        auto* last = next.mutable_data_ptr<scalar_t>();
        const int64_t rows = s.before + s.pixels, bytes = s.C * sizeof(scalar_t);
        at::parallel_for(0, s.B * rows, 64, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; row++) {
                const int64_t b = row / rows, i = row % rows;
                const scalar_t* old = from + (b * s.pixels + i - s.before) * s.C;
                if (i >= s.before && scale)
                    norm_silu(old, shift, scale, to + row * s.C, s.C);
                else if (i >= s.before)
                    std::memcpy(to + row * s.C, old, bytes);
                else if (before)
                    std::memcpy(to + row * s.C, before + (b * s.before + i) * s.C, bytes);
                else
                    std::memset(to + row * s.C, 0, bytes);
                if (i >= s.pixels) std::memcpy(last + (b * s.before + i - s.pixels) * s.C, to + row * s.C, bytes);
            }
        });
    });
}

#ifdef NANOWAN_CUDA
// buffer (B,C,2+T,H,W), next (B,C,2,H,W), x (B,C,T,H,W) and past are channels-last.
void fill_buffer_on_cuda(const Tensor& x, const Maybe& past, const Maybe& input_bias, const Maybe& gamma,
                         Tensor buffer, Tensor next) {
    const c10::cuda::CUDAGuard guard(x.device());
    const bool half = x.scalar_type() == at::kBFloat16;
    TORCH_CHECK(half || x.scalar_type() == at::kFloat, "bf16 or fp32; x is ", x.scalar_type());
    for (const Tensor& t : {x, past.value_or(x), buffer, next})
        TORCH_CHECK(t.is_contiguous(LAST) && t.scalar_type() == x.scalar_type() && t.size(1) == x.size(1),
                    "channels-last tensors like x ", x.sizes(), " are needed; one is ", t.sizes());
    const Clips clips{x.size(0), x.numel() / x.size(0) / x.size(1), x.size(1), next.numel() / x.size(0) / x.size(1)};
    TORCH_CHECK(buffer.numel() == x.numel() + next.numel(), "buffer ", buffer.sizes(), " is not x ", x.sizes(),
                " behind ", next.sizes());
    auto floats = [](const Maybe& t) { return t.has_value() ? Maybe(t->to(at::kFloat).contiguous()) : t; };
    auto pointer = [](const Maybe& t) { return t.has_value() ? t->const_data_ptr<float>() : nullptr; };
    const Maybe bias = floats(input_bias), scale = floats(gamma);
    TORCH_CHECK(!nanowan_fill_buffer(x.const_data_ptr(), past.has_value() ? past->const_data_ptr() : nullptr,
                                     pointer(bias), pointer(scale), buffer.mutable_data_ptr(), next.mutable_data_ptr(),
                                     clips, half, c10::cuda::getCurrentCUDAStream().stream()),
                "fill_buffer: launch failed on x ", x.sizes());
}
#endif

std::tuple<Tensor, Tensor> on_cpu(const Tensor& x_, const Maybe& past, const Tensor& w, const Maybe& bias_,
                                  const Maybe& gamma, const Maybe& input_bias, const Maybe& residual) {
    check(x_, past, w, bias_, gamma, input_bias, residual);
    auto dense = [](const Maybe& t) { return t.has_value() ? Maybe(t->contiguous()) : t; };
    const Maybe bias = dense(bias_);
    const Tensor x = x_.contiguous(LAST);
    const int64_t B = x.size(0), C = x.size(1), T = x.size(2), H = x.size(3), W = x.size(4), before = w.size(2) - 1;
    Tensor all = x, next = at::empty({0}, x.options());
    if (before || gamma.has_value()) {
        all = at::empty({B, C, before + T, H, W}, x.options(), LAST);
        if (before) next = at::empty({B, C, before, H, W}, x.options(), LAST);
        fill_buffer(x, past.has_value() ? Maybe(past->contiguous(LAST)) : past, input_bias, dense(gamma), all, next,
                    Clips{B, T * H * W, C, before * H * W});
    }
    const int64_t pad = w.size(3) / 2;
    const bool fp32 = x.scalar_type() == at::kFloat;
    Tensor out;
    if (fp32 && before && pad && std::min(C, w.size(0)) >= 96 && T * H * W >= 64)  // no faster for smaller sizes
        out = winograd(all, w, bias);
    else if (fp32 && at::globalContext().userEnabledMkldnn() && at::hasMKLDNN())
        // for small maps PyTorch would take a path that is several times slower than oneDNN
        out = at::mkldnn_convolution(all, w, bias, {0, pad, pad}, {1, 1, 1}, {1, 1, 1}, 1);
    else
        out = at::conv3d(all, w, bias, {1, 1, 1}, {0, pad, pad});
    if (residual.has_value()) out.add_(*residual);
    return {out, next};
}

std::tuple<Tensor, Tensor> on_meta(const Tensor& x, const Maybe& past, const Tensor& w, const Maybe& bias,
                                   const Maybe& gamma, const Maybe& input_bias, const Maybe& residual) {
    check(x, past, w, bias, gamma, input_bias, residual);
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
    m.def(
        "causal_conv3d(Tensor x, Tensor? past, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? input_bias, "
        "Tensor? residual) -> (Tensor, Tensor)");
    m.def(
        "fill_buffer(Tensor x, Tensor? past, Tensor? input_bias, Tensor? gamma, Tensor(a!) buffer, Tensor(b!) next) "
        "-> ()");
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
    m.impl("fill_buffer", &fill_buffer_on_cuda);
}
#endif
