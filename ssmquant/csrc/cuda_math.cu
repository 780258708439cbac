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

