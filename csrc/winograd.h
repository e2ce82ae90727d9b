#pragma once
#include <ATen/ATen.h>
#include <optional>

// x (B,C,2+T,H,W) fp32 channels-last on a CPU, weight (N,C,3,3,3), bias (N) -> (B,N,T,H,W), zero-padded in space only.
at::Tensor winograd(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);
