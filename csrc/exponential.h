#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

// e^x to 2 ulp in steps that compilers vectorise (Cephes' expf: 2^n e^r, |r| <= ln(2)/2). Held between e^-60 and e^60, beyond which GELU and
// SiLU are x or 0 to fp32, so that no order in which a compiler multiplies can overflow.
inline float exponential(float x) {
    x = x < -60.0f ? -60.0f : x > 60.0f ? 60.0f : x;
    const float n = std::floor(x * 1.44269504f + 0.5f), r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
    float p = std::fma(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = std::fma(std::fma(p, r, 8.3334519073e-3f), r, 4.1665795894e-2f);
    p = std::fma(std::fma(p, r, 1.6666665459e-1f), r, 5.0000001201e-1f);
    return std::fma(p * r, r, r + 1) * std::bit_cast<float>((int32_t(n) + 127) << 23);
}
