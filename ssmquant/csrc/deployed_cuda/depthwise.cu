// A depthwise convolution of quantized values, and an activation. ssmquant/ops/deployed/cuda_depthwise.py compiles it for
// one case and launches it.
//
// A block has a tile of HIGH * WIDE pixels of LANES channels: each value of it, and of its rim, is quantized once on its way
// to shared memory; a thread then slides along lines of the tile with the values of its taps in registers. What is read and
// written may be codes, int8 from 0 and -1 for NaN.
//
// After cuda_math.cu and definitions of: KH, KW, DOWN, RIGHT (of the taps); LANES, ROWS (threads of a channel), HIGH (a multiple of ROWS),
// WIDE; ACT (1: SiLU, 2: GELU); CODED: x is codes, VEC of which are read at once; CODES: y is, by a quantizer of its own.

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23
constexpr int THREADS = LANES * ROWS;
constexpr int GROUPS = LANES / VEC, EACH = THREADS / GROUPS;  // of channels that are read at once; threads for each
template <int N> struct alignas(N) Codes { signed char x[N]; };
template <int N> struct alignas(4 * N) Floats { float x[N]; };
#if CODED
typedef Codes<VEC> Input;
typedef signed char Value;
#else
typedef Floats<VEC> Input;
typedef float Value;
#endif
#if CODES
typedef signed char Output;
#else
typedef float Output;
#endif
constexpr int REACH_DOWN = (KH - 1) * DOWN, REACH_RIGHT = (KW - 1) * RIGHT;
constexpr int TALL = HIGH + REACH_DOWN, BROAD = WIDE + REACH_RIGHT;  // with the rim
constexpr int BYTES = 4 * TALL * BROAD * LANES;

struct Params {
    const void *x;
    const float *scale, *shift, *weights, *bias, *next_scale, *next_shift;  // weights: (taps, channels); next: of y
    void *y;                                                                // (B, H, W, channels)
    long long x_batch, x_down, x_right, x_channel;
    int height, width, channels, across, qmin, qmax, next_min, next_max;    // across: tiles of a line
};

extern __shared__ char shared[];

#ifndef EMULATED
__device__ __forceinline__ float as_float(int x) { return __int_as_float(x); }
#endif

__device__ __forceinline__ float activated(float x) {
#if ACT == 1
    return x * recip(1.0f + exp2_(-x * LOG2E));
#elif ACT == 2                                         // erf by Abramowitz and Stegun 7.1.26, to 1.5e-7
    const float near = fminf(fmaxf(x, -16.0f), 16.0f), size = fmaxf(near, -near) * 0.70710678f;
    const float t = recip(fmaf(0.3275911f, size, 1.0f));
    const float p = t * fmaf(t, fmaf(t, fmaf(t, fmaf(t, 1.061405429f, -1.453152027f), 1.421413741f), -0.284496736f), 0.254829592f);
    const float outside = near * (0.5f * p * exp2_(-size * size * LOG2E));
    return x != x ? x : fmaxf(x, 0.0f) - fmaxf(outside, -outside);
#else
    return x;
#endif
}

// blockIdx.x: tile; blockIdx.y: sample, block of channels.
extern "C" __global__ void __launch_bounds__(THREADS) depthwise(const Params p) {
    float *values = reinterpret_cast<float *>(shared);  // [TALL][BROAD][LANES]
    const int blocks = (p.channels + LANES - 1) / LANES, sample = blockIdx.y / blocks;
    const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES, channel = blockIdx.y % blocks * LANES + lane;
    const int top = blockIdx.x / p.across * HIGH, left = blockIdx.x % p.across * WIDE;
    const bool real = channel < p.channels;
    const float scale = p.scale[0], shift = p.shift[0], inverse = 1.0f / scale, moved = shift * inverse;
    const float least = float(p.qmin), most = float(p.qmax);
    const int group = threadIdx.x % GROUPS * VEC, begin = threadIdx.x / GROUPS, first_channel = blockIdx.y % blocks * LANES + group;
    const auto *x = static_cast<const Value *>(p.x) + sample * p.x_batch + first_channel * p.x_channel;
    constexpr int COUNT = (TALL * BROAD + EACH - 1) / EACH, AT_ONCE = 8;
    for (int first = 0; first < COUNT; first += AT_ONCE) {
        Input held[AT_ONCE];
        bool inside[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int place = begin + (first + i) * EACH;
            const int at_y = top + place / BROAD - REACH_DOWN / 2, at_x = left + place % BROAD - REACH_RIGHT / 2;
            inside[i] = first_channel < p.channels && place < TALL * BROAD && at_y >= 0 && at_y < p.height && at_x >= 0 && at_x < p.width;
            held[i] = inside[i] ? *reinterpret_cast<const Input *>(x + at_y * p.x_down + at_x * p.x_right) : Input{};
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int place = begin + (first + i) * EACH;
            Floats<VEC> value;
#pragma unroll
            for (int c = 0; c < VEC; ++c) {
                float v;
                if (CODED) {
                    v = held[i].x[c] < 0 ? as_float(0x7fffffff) : fmaf(float(held[i].x[c] + p.qmin), scale, -shift);
                } else {
                    const float u = fmaf(float(held[i].x[c]), inverse, moved);
                    v = u != u ? u : fmaf((fminf(fmaxf(u, least), most) + MAGIC) - MAGIC, scale, -shift);
                }
                value.x[c] = inside[i] ? v : 0.0f;
            }
            if (place < TALL * BROAD) *reinterpret_cast<Floats<VEC> *>(values + place * LANES + group) = value;
        }
    }
    float weight[KH * KW];
#pragma unroll
    for (int i = 0; i < KH * KW; ++i) weight[i] = real ? p.weights[i * p.channels + channel] : 0.0f;
    const float bias = real ? p.bias[channel] : 0.0f;
    __syncthreads();
    if (!real) return;
    const float next_scale = CODES ? p.next_scale[0] : 1.0f, next_inverse = 1.0f / next_scale;
    const float next_moved = CODES ? p.next_shift[0] * next_inverse : 0.0f;
    Output *y = static_cast<Output *>(p.y) + (long long)sample * p.height * p.width * p.channels + channel;
    for (int line = row; line < HIGH; line += ROWS) {
        if (top + line >= p.height) break;
        const float *from = values + line * BROAD * LANES + lane;
        float window[KH][REACH_RIGHT + 1];
#pragma unroll
        for (int j = 0; j < REACH_RIGHT; ++j)
#pragma unroll
            for (int i = 0; i < KH; ++i) window[i][j + 1] = from[(i * DOWN * BROAD + j) * LANES];
#pragma unroll 4
        for (int at = 0; at < WIDE && left + at < p.width; ++at) {
            float sum = bias;
#pragma unroll
            for (int i = 0; i < KH; ++i) {
#pragma unroll
                for (int j = 0; j < REACH_RIGHT; ++j) window[i][j] = window[i][j + 1];
                window[i][REACH_RIGHT] = from[(i * DOWN * BROAD + at + REACH_RIGHT) * LANES];
#pragma unroll
                for (int j = 0; j < KW; ++j) sum = fmaf(window[i][j * RIGHT], weight[i * KW + j], sum);
            }
            const float result = activated(sum), u = fmaf(result, next_inverse, next_moved);
            const float code = (fminf(fmaxf(u, float(p.next_min)), float(p.next_max)) + MAGIC) - MAGIC;
            y[((long long)(top + line) * p.width + left + at) * p.channels] =
                Output(!CODES ? result : u != u ? -1.0f : code - float(p.next_min));
        }
    }
}
