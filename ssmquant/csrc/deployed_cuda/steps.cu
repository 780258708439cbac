// Step sizes of scans, from their low rank: codes, or values. After cuda_math.cu and definitions of: RANK; QUANT: they are
// quantized.

#ifndef EMULATED
__device__ __forceinline__ int dot4(unsigned x, int w, int sum) {  // bytes of x have no sign
    int y;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(w), "r"(sum));
    return y;
}
// A store without a branch.
__device__ __forceinline__ void store_if(bool there, float *to, float x) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.f32 [%1], %2; }" ::"r"(int(there)), "l"(to), "f"(x) : "memory");
}
__device__ __forceinline__ void store_if(bool there, float *to, float x, float y) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.v2.f32 [%1], {%2, %3}; }" ::"r"(int(there)), "l"(to), "f"(x), "f"(y) : "memory");
}
#endif

constexpr int WORDS = (RANK + 3) / 4;  // of a direction and pixel

// The sum of a low rank's codes: an integer and the bits of MAGIC are the bits of their sum.
__device__ __forceinline__ float total_of_codes(const unsigned (&word)[WORDS]) {
    int sum = as_int(MAGIC);
#pragma unroll
    for (int w = 0; w < WORDS; ++w) sum = dot4(word[w], 0x01010101, sum);
    return as_float(sum) - MAGIC;
}

// A step size in levels, of the products `dot` (with the bits of MAGIC) and the sum of codes; its code from 0 to `most`.
__device__ __forceinline__ float step_level(int dot, float total, float of_dot, float of_total, float moved) {
    return fmaf(of_dot, as_float(dot) - MAGIC, fmaf(of_total, total, moved));
}
__device__ __forceinline__ int code_of_step(float level, int qmin, int most) {
    return min(as_int(fmaxf(level, float(qmin)) + MAGIC) - (as_int(MAGIC) + qmin), most);
}

// Codes of step sizes, or values, of one pixel.
template <int FOURS>
__device__ __forceinline__ void step_codes(int qmin, int qmax, const unsigned (&word)[WORDS], const Floats<4> (&weight)[WORDS][FOURS],
                                           const Floats<4> (&affine)[3][FOURS], bool there, unsigned char *to) {
    const float total = total_of_codes(word);
    float made[FOURS];
#pragma unroll
    for (int q = 0; q < FOURS; ++q) {
        float x[4];
        int code[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            int dot = as_int(MAGIC);
#pragma unroll
            for (int w = 0; w < WORDS; ++w) dot = dot4(word[w], as_int(weight[w][q].x[c]), dot);
            x[c] = step_level(dot, total, affine[0][q].x[c], affine[1][q].x[c], affine[2][q].x[c]);
            code[c] = code_of_step(x[c], qmin, qmax - qmin);
        }
        made[q] = as_float(joined(code[0], code[1], code[2], code[3]));
        if (!QUANT) {
            float *const of_four = reinterpret_cast<float *>(to) + 4 * q;
            store_if(there, of_four, x[0], x[1]);
            store_if(there, of_four + 2, x[2], x[3]);
        }
    }
    float *const codes = reinterpret_cast<float *>(to);
    if (QUANT && FOURS == 1) store_if(there, codes, made[0]);
    if (QUANT && FOURS == 2) store_if(there, codes, made[0], made[1]);
}
