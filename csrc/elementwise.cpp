// The CPU kernels of kernels/modulate.py and kernels/qk_norm_rope.py, whose docstrings define the operations. Each
// tensor is read or written once and the arithmetic is fp32, while PyTorch's operators make a pass for every arithmetic
// step. The tokens are divided among threads.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "activations.h"

using at::Tensor;
using Maybe = std::optional<Tensor>;

#define DISPATCH(TYPE, ...) AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, TYPE, "nanowan", __VA_ARGS__)

namespace {

// Rows (B,F,D) of any strides, but dense along D; at(clip, row) points to a row.
struct Rows {
    const float* data = nullptr;
    int64_t b = 0, f = 0;
    explicit Rows(const Maybe& t, const char* name, int64_t B, int64_t F, int64_t D) {
        if (!t.has_value()) return;
        TORCH_CHECK(t->dim() == 3 && t->size(0) == B && t->size(1) == F && t->size(2) == D &&
                        t->scalar_type() == at::kFloat && (t->stride(2) == 1 || D == 1),
                    name, " should be fp32 (", B, ",", F, ",", D, ") with dense rows, and is ", t->scalar_type(), " ",
                    t->sizes());
        data = t->const_data_ptr<float>(), b = t->stride(0), f = t->stride(1);
    }
    const float* at(int64_t clip, int64_t row) const { return data ? data + clip * b + row * f : nullptr; }
};

// Which of F rows serves token l of L: row index[l] or, without `index` (L,), row l / (L/F).
struct Serving {
    const int32_t* index = nullptr;
    int64_t L, tokens;
    Serving(const Maybe& i, int64_t L, int64_t F) : L(L), tokens(L / F) {
        if (!i.has_value()) {
            TORCH_CHECK(F > 0 && L % F == 0, L, " tokens cannot be shared by ", F, " rows");
            return;
        }
        TORCH_CHECK(i->dim() == 1 && i->size(0) == L && i->scalar_type() == at::kInt && i->is_contiguous(),
                    "index should be int32 (", L, "), and is ", i->scalar_type(), " ", i->sizes());
        index = i->const_data_ptr<int32_t>();
        for (int64_t l = 0; l < L; l++)
            TORCH_CHECK(index[l] >= 0 && index[l] < F, "token ", l, " asks for row ", index[l], " of ", F);
    }
    int64_t row(int64_t l) const { return index ? index[l] : l / tokens; }
};

int64_t count_rows(const Maybe& gate, const Maybe& weight) {
    return weight.has_value() ? weight->size(1) : gate.has_value() ? gate->size(1) : 1;
}

template <typename Y, typename O>
__attribute__((noinline)) void modulate_tokens(const float* x, const Y* y, float* fresh, O* out, const Rows& gate,
                                               const Rows& weight, const Rows& shift, const Serving& serving, int64_t D,
                                               double eps, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / serving.L, f = serving.row(i % serving.L);
        const float *a = x + i * D, *g = gate.at(b, f);
        if (y) {
            const Y* branch = y + i * D;
            float* sum = fresh + i * D;
            if (g) {
                for (int64_t d = 0; d < D; d++) sum[d] = a[d] + g[d] * float(branch[d]);
            } else {
                for (int64_t d = 0; d < D; d++) sum[d] = a[d] + float(branch[d]);
            }
            a = sum;
        }
        if (!out) continue;
        float total = 0, squares = 0;
        for (int64_t d = 0; d < D; d++) total += a[d];
        const float mean = total / D;
        for (int64_t d = 0; d < D; d++) squares += (a[d] - mean) * (a[d] - mean);
        const float rstd = 1 / std::sqrt(squares / D + float(eps));
        const float *w = weight.at(b, f), *s = shift.at(b, f);
        O* o = out + i * D;
        for (int64_t d = 0; d < D; d++) o[d] = O((a[d] - mean) * rstd * w[d] + s[d]);
    }
}

std::vector<Tensor> modulate(const Tensor& x_, const Maybe& y_, const Maybe& gate, const Maybe& weight,
                             const Maybe& shift, const Maybe& index, double eps, at::ScalarType dtype) {
    TORCH_CHECK(x_.dim() == 3 && x_.scalar_type() == at::kFloat, "x should be fp32 (B,L,D), and is ", x_.scalar_type(),
                " ", x_.sizes());
    const int64_t B = x_.size(0), L = x_.size(1), D = x_.size(2), F = count_rows(gate, weight);
    const Serving serving(index, L, F);
    const Tensor x = x_.contiguous();
    Tensor y, fresh, out;
    if (y_.has_value()) {
        TORCH_CHECK(y_->sizes() == x.sizes(), "y ", y_->sizes(), " should have the shape of x ", x.sizes());
        y = y_->contiguous(), fresh = at::empty_like(x);
    }
    if (weight.has_value()) out = at::empty(x.sizes(), x.options().dtype(dtype));
    const Rows g(gate, "gate", B, F, D), w(weight, "weight", B, F, D), s(shift, "shift", B, F, D);
    DISPATCH(y.defined() ? y.scalar_type() : at::kFloat, [&] {
        using Y = scalar_t;
        const Y* branch = y.defined() ? y.const_data_ptr<Y>() : nullptr;
        float* sum = fresh.defined() ? fresh.mutable_data_ptr<float>() : nullptr;
        DISPATCH(out.defined() ? dtype : at::kFloat, [&] {
            scalar_t* result = out.defined() ? out.mutable_data_ptr<scalar_t>() : nullptr;
            at::parallel_for(0, B * L, 16, [&](int64_t a, int64_t b) {
                modulate_tokens<Y, scalar_t>(x.const_data_ptr<float>(), branch, sum, result, g, w, s, serving, D, eps,
                                             a, b);
            });
        });
    });
    std::vector<Tensor> found;
    if (fresh.defined()) found.push_back(fresh);
    if (out.defined()) found.push_back(out);
    return found;
}

// The backward pass of tokens [begin,end), all served by one row. If `sums` (3,D) is not null, the gradients of gate,
// weight and shift that come from these tokens are added to it.
template <typename Y, typename O>
__attribute__((noinline)) void modulate_backward_tokens(const float* dnew, const O* dout, const float* stream,
                                                        const Y* y, const float* gate, const float* w, float* dx, Y* dy,
                                                        float* sums, int64_t D, double eps, int64_t begin,
                                                        int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        float* grad = dx + i * D;
        if (dnew)
            std::memcpy(grad, dnew + i * D, D * sizeof(float));
        else
            std::memset(grad, 0, D * sizeof(float));
        if (dout) {
            const float* a = stream + i * D;
            const O* g = dout + i * D;
            float total = 0, squares = 0, sum = 0, product = 0;
            for (int64_t d = 0; d < D; d++) total += a[d];
            const float mean = total / D;
            for (int64_t d = 0; d < D; d++) squares += (a[d] - mean) * (a[d] - mean);
            const float rstd = 1 / std::sqrt(squares / D + float(eps));
            for (int64_t d = 0; d < D; d++) {
                const float dn = float(g[d]) * w[d];
                sum += dn, product += dn * ((a[d] - mean) * rstd);
            }
            sum /= D, product /= D;
            for (int64_t d = 0; d < D; d++) {
                const float normed = (a[d] - mean) * rstd;
                grad[d] += rstd * (float(g[d]) * w[d] - sum - normed * product);
                if (sums) sums[D + d] += float(g[d]) * normed, sums[2 * D + d] += float(g[d]);
            }
        }
        if (!dnew) continue;
        Y* branch = dy + i * D;
        if (sums && gate) {
            for (int64_t d = 0; d < D; d++) sums[d] += grad[d] * float(y[i * D + d]);
        }
        for (int64_t d = 0; d < D; d++) branch[d] = Y(gate ? grad[d] * gate[d] : grad[d]);
    }
}

std::vector<Tensor> modulate_backward(const Maybe& dnew_, const Maybe& dout_, const Tensor& stream_, const Maybe& y_,
                                      const Maybe& gate, const Maybe& weight, const Maybe& index, double eps,
                                      at::ScalarType branch, bool need_rows) {
    const int64_t B = stream_.size(0), L = stream_.size(1), D = stream_.size(2), F = count_rows(gate, weight);
    const Serving serving(index, L, F);
    const Tensor stream = stream_.contiguous(), dnew = dnew_.has_value() ? dnew_->contiguous() : Tensor();
    const Tensor dout = dout_.has_value() ? dout_->contiguous() : Tensor();
    const Tensor y = y_.has_value() ? y_->contiguous() : Tensor();
    Tensor dx = at::empty_like(stream);
    Tensor dy = dnew.defined() ? at::empty(stream.sizes(), stream.options().dtype(branch)) : Tensor();
    Tensor sums = need_rows ? at::zeros({B, F, 3, D}, stream.options()) : Tensor();
    const Rows g(gate, "gate", B, F, D), w(weight, "weight", B, F, D);
    DISPATCH(branch, [&] {
        using Y = scalar_t;
        DISPATCH(dout.defined() ? dout.scalar_type() : at::kFloat, [&] {
            // Splits tokens [begin,end) into runs that one row serves, and does all runs, or only those of row `only`.
            auto work = [&](int64_t begin, int64_t end, int64_t only) {
                for (int64_t i = begin, stop; i < end; i = stop) {
                    const int64_t b = i / L, f = serving.row(i % L);
                    for (stop = i + 1; stop < end && stop % L && serving.row(stop % L) == f;) stop++;
                    if (only >= 0 && f != only) continue;
                    modulate_backward_tokens<Y, scalar_t>(
                        dnew.defined() ? dnew.const_data_ptr<float>() : nullptr,
                        dout.defined() ? dout.const_data_ptr<scalar_t>() : nullptr, stream.const_data_ptr<float>(),
                        y.defined() ? y.const_data_ptr<Y>() : nullptr, g.at(b, f), w.at(b, f),
                        dx.mutable_data_ptr<float>(), dy.defined() ? dy.mutable_data_ptr<Y>() : nullptr,
                        need_rows ? sums.mutable_data_ptr<float>() + (b * F + f) * 3 * D : nullptr, D, eps, i, stop);
                }
            };
            if (need_rows) {  // one thread per row, so that sums are always added in the same order
                at::parallel_for(0, B * F, 1, [&](int64_t first, int64_t last) {
                    for (int64_t r = first; r < last; r++) work(r / F * L, (r / F + 1) * L, r % F);
                });
            } else {
                at::parallel_for(0, B * L, 16, [&](int64_t begin, int64_t end) { work(begin, end, -1); });
            }
        });
    });
    std::vector<Tensor> found{dx};
    if (dy.defined()) found.push_back(dy);
    if (need_rows) found.push_back(sums);
    return found;
}

// load(l, to) writes the cosine and sine of each pair of a head (d/2,2) for token l. A negative position turns in the
// opposite direction.
struct Turn {
    const float* table = nullptr;
    const int32_t* positions = nullptr;
    int64_t half, ends[4];
    Turn(const Maybe& t, const Maybe& p, int64_t d, int64_t L)
        : half(d / 2), ends{0, half - 2 * (half / 3), half - half / 3, half} {
        if (!t.has_value()) return;
        TORCH_CHECK(t->dim() == 3 && t->size(1) == half && t->size(2) == 2 && t->is_contiguous() &&
                        t->scalar_type() == at::kFloat,
                    "a table should be fp32 (P,", half, ",2), and is ", t->scalar_type(), " ", t->sizes());
        TORCH_CHECK(p.has_value() && p->dim() == 2 && p->size(0) == L && p->size(1) == 3 && p->is_contiguous() &&
                        p->scalar_type() == at::kInt,
                    "with a table, positions int32 (", L, ",3) are needed", p.has_value() ? ", and they are " : "",
                    p.has_value() ? p->sizes() : at::IntArrayRef());
        table = t->const_data_ptr<float>(), positions = p->const_data_ptr<int32_t>();
        int64_t longest = -1;
        for (int64_t i = 0; i < 3 * L; i++) longest = std::max<int64_t>(longest, std::abs(positions[i]));
        TORCH_CHECK(longest < t->size(0), "position ", longest, " is outside of a table of ", t->size(0));
    }
    void load(int64_t l, float* to) const {
        for (int axis = 0; axis < 3; axis++) {
            const int64_t at = positions[3 * l + axis], begin = 2 * ends[axis], end = 2 * ends[axis + 1];
            std::memcpy(to + begin, table + std::abs(at) * half * 2 + begin, (end - begin) * sizeof(float));
            if (at < 0)
                for (int64_t j = begin + 1; j < end; j += 2) to[j] = -to[j];
        }
    }
};

__attribute__((noinline)) void rotate(float* __restrict v, const float* __restrict turn, int64_t heads, int64_t half,
                                      float sign) {
    for (int64_t n = 0; n < heads; n++) {
        float* h = v + 2 * n * half;
        for (int64_t j = 0; j < half; j++) {
            const float a = h[2 * j], b = h[2 * j + 1], cos = turn[2 * j], sin = sign * turn[2 * j + 1];
            h[2 * j] = a * cos - b * sin;
            h[2 * j + 1] = a * sin + b * cos;
        }
    }
}

// Write one row, normed and weighted, to v.
template <typename T>
__attribute__((noinline)) void norm_row(const T* __restrict x, const float* __restrict w, float* __restrict v,
                                        int64_t D, float eps) {
    float squares = 0;
    for (int64_t d = 0; d < D; d++) squares += float(x[d]) * float(x[d]);
    const float rstd = 1 / std::sqrt(squares / D + eps);
    for (int64_t d = 0; d < D; d++) v[d] = float(x[d]) * rstd * w[d];
}

// Compute the gradient dx of a row from the gradient g of the normed and weighted row. If `total` is not null, add the
// row's gradient of the weight to it.
template <typename T>
__attribute__((noinline)) void norm_row_backward(const T* __restrict x, const float* __restrict w, float* __restrict g,
                                                 float* __restrict total, T* __restrict dx, int64_t D, float eps) {
    float squares = 0, product = 0;
    for (int64_t d = 0; d < D; d++) squares += float(x[d]) * float(x[d]);
    const float rstd = 1 / std::sqrt(squares / D + eps);
    if (total) {
        for (int64_t d = 0; d < D; d++) total[d] += g[d] * float(x[d]) * rstd;
    }
    for (int64_t d = 0; d < D; d++) g[d] *= w[d];
    for (int64_t d = 0; d < D; d++) product += g[d] * float(x[d]);
    product *= rstd * rstd / D;
    for (int64_t d = 0; d < D; d++) dx[d] = T(rstd * (g[d] - float(x[d]) * product));
}

void check_norm(at::TensorList xs, at::TensorList weights, int64_t heads) {
    TORCH_CHECK(xs.size() && xs.size() == weights.size(), xs.size(), " tensors and ", weights.size(), " weights");
    for (size_t i = 0; i < xs.size(); i++)
        TORCH_CHECK(xs[i].dim() == 3 && xs[i].sizes() == xs[0].sizes() && xs[i].size(2) % heads == 0 &&
                        weights[i].numel() == xs[i].size(2) && weights[i].scalar_type() == at::kFloat,
                    "x ", xs[i].sizes(), " with an fp32 weight ", weights[i].sizes(), " in ", heads, " heads");
}

std::vector<Tensor> qk_norm_rope(at::TensorList xs, at::TensorList weights, double eps, int64_t heads,
                                 const Maybe& table, const Maybe& positions) {
    check_norm(xs, weights, heads);
    const int64_t B = xs[0].size(0), L = xs[0].size(1), D = xs[0].size(2);
    const Turn turn(table, positions, D / heads, L);
    std::vector<Tensor> outs;
    for (size_t n = 0; n < xs.size(); n++) {
        const Tensor &x = xs[n], weight = weights[n].contiguous();
        TORCH_CHECK(x.stride(2) == 1 || D == 1, "x should have dense rows, and has strides ", x.strides());
        outs.push_back(at::empty({B, L, heads, D / heads}, x.options()));
        DISPATCH(x.scalar_type(), [&] {
            scalar_t* out = outs.back().mutable_data_ptr<scalar_t>();
            const float* w = weight.const_data_ptr<float>();
            at::parallel_for(0, B * L, 16, [&](int64_t a, int64_t b) {
                std::vector<float> v(D), t(2 * turn.half);
                for (int64_t i = a; i < b; i++) {
                    const scalar_t* row = x.const_data_ptr<scalar_t>() + i / L * x.stride(0) + i % L * x.stride(1);
                    norm_row(row, w, v.data(), D, float(eps));
                    if (turn.table) turn.load(i % L, t.data()), rotate(v.data(), t.data(), heads, turn.half, 1);
                    for (int64_t d = 0; d < D; d++) out[i * D + d] = scalar_t(v[d]);
                }
            });
        });
    }
    return outs;
}

std::vector<Tensor> qk_norm_rope_backward(at::TensorList douts, at::TensorList xs, at::TensorList weights, double eps,
                                          int64_t heads, const Maybe& table, const Maybe& positions,
                                          bool need_weights) {
    check_norm(xs, weights, heads);
    const int64_t B = xs[0].size(0), L = xs[0].size(1), D = xs[0].size(2), parts = 16;
    const Turn turn(table, positions, D / heads, L);
    std::vector<Tensor> found;
    Tensor sums = need_weights ? at::zeros({int64_t(xs.size()), parts, D}, weights[0].options()) : Tensor();
    for (size_t n = 0; n < xs.size(); n++) {
        const Tensor &x = xs[n], weight = weights[n].contiguous(), dout = douts[n].contiguous();
        TORCH_CHECK(x.stride(2) == 1 || D == 1, "x should have dense rows, and has strides ", x.strides());
        found.push_back(at::empty({B, L, D}, x.options()));
        DISPATCH(x.scalar_type(), [&] {
            scalar_t* dx = found.back().mutable_data_ptr<scalar_t>();
            const float* w = weight.const_data_ptr<float>();
            at::parallel_for(
                0, parts, 1, [&](int64_t first, int64_t last) {  // fixed parts, so that the order of sums is fixed
                    std::vector<float> g(D), t(2 * turn.half);
                    for (int64_t part = first; part < last; part++) {
                        float* total = need_weights ? sums.mutable_data_ptr<float>() + (n * parts + part) * D : nullptr;
                        for (int64_t i = B * L * part / parts; i < B * L * (part + 1) / parts; i++) {
                            const scalar_t *row =
                                               x.const_data_ptr<scalar_t>() + i / L * x.stride(0) + i % L * x.stride(1),
                                           *grad = dout.const_data_ptr<scalar_t>() + i * D;
                            for (int64_t d = 0; d < D; d++) g[d] = float(grad[d]);
                            if (turn.table)
                                turn.load(i % L, t.data()), rotate(g.data(), t.data(), heads, turn.half, -1);
                            norm_row_backward(row, w, g.data(), total, dx + i * D, D, float(eps));
                        }
                    }
                });
        });
    }
    if (need_weights) found.push_back(sums.sum(1));
    return found;
}

template <typename T>
__attribute__((noinline)) void gelu_span(const T* x, T* out, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = T(gelu(float(x[i])));
}

template <typename T>
__attribute__((noinline)) void gelu_backward_span(const T* __restrict x, T* __restrict grad, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) grad[i] = T(float(grad[i]) * gelu_slope(float(x[i])));
}

// out may be the same tensor as x
void gelu_forward(const Tensor& x_, Tensor out) {
    const Tensor x = x_.contiguous();
    TORCH_CHECK(out.sizes() == x.sizes() && out.scalar_type() == x.scalar_type() && out.is_contiguous(), "out ",
                out.sizes(), " for x ", x.sizes());
    DISPATCH(x.scalar_type(), [&] {
        at::parallel_for(0, x.numel(), 4096, [&](int64_t a, int64_t b) {
            gelu_span(x.const_data_ptr<scalar_t>() + a, out.mutable_data_ptr<scalar_t>() + a, b - a);
        });
    });
}

// multiplies grad, in place, by the derivative of GELU at x
void gelu_backward(const Tensor& x_, Tensor grad) {
    const Tensor x = x_.contiguous();
    TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() && grad.is_contiguous(),
                "a gradient ", grad.sizes(), " for x ", x.sizes());
    DISPATCH(x.scalar_type(), [&] {
        at::parallel_for(0, x.numel(), 4096, [&](int64_t a, int64_t b) {
            gelu_backward_span(x.const_data_ptr<scalar_t>() + a, grad.mutable_data_ptr<scalar_t>() + a, b - a);
        });
    });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nanowan_csrc, m) {
    m.def("gelu(Tensor x, Tensor(a!) out) -> ()", &gelu_forward);
    m.def("gelu_backward_(Tensor x, Tensor(a!) grad) -> ()");
    m.def(
        "modulate(Tensor x, Tensor? y, Tensor? gate, Tensor? weight, Tensor? shift, Tensor? index, float eps, "
        "ScalarType dtype) -> Tensor[]",
        &modulate);
    m.def(
        "modulate_backward(Tensor? dnew, Tensor? dout, Tensor stream, Tensor? y, Tensor? gate, Tensor? weight, "
        "Tensor? index, float eps, ScalarType branch, bool need_rows) -> Tensor[]",
        &modulate_backward);
    m.def(
        "qk_norm_rope(Tensor[] xs, Tensor[] weights, float eps, int heads, Tensor? table, Tensor? positions) -> "
        "Tensor[]",
        &qk_norm_rope);
    m.def(
        "qk_norm_rope_backward(Tensor[] douts, Tensor[] xs, Tensor[] weights, float eps, int heads, Tensor? table, "
        "Tensor? positions, bool need_weights) -> Tensor[]",
        &qk_norm_rope_backward);
}
TORCH_LIBRARY_IMPL(nanowan_csrc, CPU, m) {
    m.impl("gelu_backward_", &gelu_backward);
}
TORCH_LIBRARY_IMPL(nanowan_csrc, Meta, m) {
    m.impl("gelu_backward_", [](const Tensor&, Tensor) {});
}
