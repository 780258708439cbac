// Functions that CUDA kernels share: their texts are put behind this one. No header is included: NVRTC needs none.

#ifndef EMULATED
__device__ __forceinline__ float exp2_(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float recip(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float as_float(int x) { return __int_as_float(x); }
__device__ __forceinline__ int as_int(float x) { return __float_as_int(x); }
// Four of eight bytes, as prmt counts them.
__device__ __forceinline__ int bytes_of(int x, int y, int which) {
    int z;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(which));
    return z;
}
// NaN if x is, and then with all bits of the lowest byte set.
__device__ __forceinline__ float max_nan(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
__device__ __forceinline__ float min_nan(float x, float y) {
    float z;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
__device__ __forceinline__ void copy_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
template <int BYTES>                                 // to shared memory, behind the program's back; zeros if not there
__device__ __forceinline__ void copy(void *to, const void *from, bool there) {
    if constexpr (BYTES == 16)                       // past L1: no other block reads the same soon
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(unsigned(__cvta_generic_to_shared(to))), "l"(from), "r"(there ? BYTES : 0) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :: "r"(unsigned(__cvta_generic_to_shared(to))), "l"(from), "n"(BYTES), "r"(there ? BYTES : 0) : "memory");
}
#endif

// Of kernels that are launched "early": waits for all that the one before has done. What comes before it in a kernel must
// not depend on others. LET: the next one's blocks come in as soon as all of this one's have begun, and not when they are
// done. That hides their launch, and fills multiprocessors that have nothing left to do; but of kernels of few blocks the
// next one's are spread unevenly, over what these leave.
template <bool LET = false> __device__ __forceinline__ void kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (LET) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The lowest bytes of four integers as one.
__device__ __forceinline__ unsigned joined(int a, int b, int c, int d) {
    return bytes_of(bytes_of(a, b, 0x0040), bytes_of(c, d, 0x0040), 0x5410);
}

template <int N> struct alignas(4 * N) Floats { float x[N]; };

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
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
    const float size = min_nan(fabsf(x), 16.0f), t = recip(fmaf(0.3275911f * 0.70710678f, size, 1.0f));
    float p = fmaf(t, fmaf(t, 0.5307027145f, -0.7265760135f), 0.7107068705f);
    p = fmaf(t, fmaf(t, p, -0.142248368f), 0.127414796f);
    return fmaf(size * exp2_(size * (size * (-0.5f * LOG2E))), -t * p, fmaxf(x, 0.0f));
}
