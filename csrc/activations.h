// Activation functions, in forms that compilers vectorise.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

// e^x to 2 ulp (Cephes' expf: 2^n e^r, |r| <= ln(2)/2). x is clamped to -60..60; beyond this range, GELU and
// SiLU are x or nearly 0. So nothing overflows, in whichever order a compiler multiplies.
inline float exponential(float x) {
    x = x < -60.0f ? -60.0f : x > 60.0f ? 60.0f : x;
    const float n = std::floor(x * 1.44269504f + 0.5f), r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
    float p = std::fma(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = std::fma(std::fma(p, r, 8.3334519073e-3f), r, 4.1665795894e-2f);
    p = std::fma(std::fma(p, r, 1.6666665459e-1f), r, 5.0000001201e-1f);
    return std::fma(p * r, r, r + 1) * std::bit_cast<float>((int32_t(n) + 127) << 23);
}

// GELU by its tanh formula, x * sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3), and its derivative
constexpr float GELU_A = -1.5957691216057308f, GELU_B = 0.044715f;

inline float gelu(float x) {
    return x / (1 + exponential(GELU_A * (x + GELU_B * x * x * x)));
}

inline float gelu_slope(float x) {
    const float e = exponential(GELU_A * (x + GELU_B * x * x * x)), s = 1 / (1 + e);
    return s - x * s * (e * s) * GELU_A * (1 + 3 * GELU_B * x * x);
}
