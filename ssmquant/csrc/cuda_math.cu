// Functions that CUDA kernels share: their texts are put behind this one. No header is included: NVRTC needs none.

#ifndef EMULATED
__device__ __forceinline__ float exp2_(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float recip(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
#endif

constexpr float LOG2E = 1.44269504088896341f;

// log(1 + exp(x)) to a few ulp: log1p by atanh(s) = s q(s * s), s <= 1/3, where q errs by 4e-9.
__device__ __forceinline__ float softplus(float x) {
    float e = exp2_(-fabsf(x) * LOG2E);
    float s = e * recip(2.0f + e), z = s * s;
    float q = fmaf(z, fmaf(z, fmaf(z, fmaf(z, 0.14087329f, 0.13980709f), 0.20012427f), 0.33333158f), 1.0f);
    return fmaf(2.0f * s, q, fmaxf(x, 0.0f));
}


__device__ __forceinline__ float silu(float x) { return x * recip(1.0f + exp2_(-x * LOG2E)); }

// By the error function of Abramowitz and Stegun 7.1.26, to 1.5e-7.
__device__ __forceinline__ float gelu(float x) {
    const float near = fminf(fmaxf(x, -16.0f), 16.0f), size = fmaxf(near, -near) * 0.70710678f;
    const float t = recip(fmaf(0.3275911f, size, 1.0f));
    const float p = t * fmaf(t, fmaf(t, fmaf(t, fmaf(t, 1.061405429f, -1.453152027f), 1.421413741f), -0.284496736f), 0.254829592f);
    const float outside = near * (0.5f * p * exp2_(-size * size * LOG2E));
    return x != x ? x : fmaxf(x, 0.0f) - fmaxf(outside, -outside);
}
