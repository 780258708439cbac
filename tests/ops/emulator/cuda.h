// CUDA's language for one block at a time on a CPU: threads are fibers that switch at barriers and shuffles. Enough of it
// to run the kernels of ssmquant/csrc unchanged, slowly. Shuffles and warp barriers need all 32 lanes, as there.
//
// Between barriers a GPU may run threads in any order and copy to shared memory at any time before it is waited for. Here
// a warp runs until it waits for others, and `late` picks one of two extremes: the last thread first and copies as late as
// can be, or the first and at once. Kernels that lack a barrier or a wait give different results.
#pragma once

#include <setjmp.h>  // few headers, for they take most of the time to compile
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define EMULATED
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__
#define __restrict__

extern "C" {
float fmaf(float, float, float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float fabsf(float) noexcept;
float sqrtf(float) noexcept;
float exp2f(float) noexcept;
}

namespace emulated {

constexpr int MAX_THREADS = 1024, STACK = 128 * 1024;
enum Error { NONE, NO_SUCH_KERNEL, TOO_LARGE, MISALIGNED, DEADLOCK };
struct Dim { unsigned x, y, z; };
struct Copy { void *to; const void *from; int bytes; };  // from null: zeros
struct Barrier { int waiting = 0; long turn = 0; bool all = true, result = true; };
struct Fiber {
    ucontext_t first;
    jmp_buf at;
    bool started, done;
    const Barrier *waits;  // for this one to get beyond `turn`
    long turn;
    char *stack;
    Copy *copies;
    int count, room;
};

inline Dim thread_index, block_index, block_size;
inline Fiber fibers[MAX_THREADS];
inline Barrier block, warps[MAX_THREADS / 32];
inline float exchange[2][MAX_THREADS];
inline jmp_buf scheduler;
inline int threads, left, current, error;
inline bool late;
inline void (*body)();

// The first of `count` threads from `base` on that can run, or -1.
inline int first_ready(int base, int count) {
    if (base + count > threads) count = threads - base;  // the last warp need not be whole
    for (int i = 0; i < count; ++i) {
        int thread = base + (late ? count - 1 - i : i);
        const Fiber &f = fibers[thread];
        if (!f.done && (!f.waits || f.waits->turn != f.turn)) return thread;
    }
    return -1;
}
inline void next() {  // never returns
    int thread = first_ready(current / 32 * 32, 32);
    if (thread < 0) thread = first_ready(0, threads);
    if (thread < 0) error = DEADLOCK, _longjmp(scheduler, 1);
    current = thread;
    thread_index = {unsigned(thread), 0, 0};
    Fiber &f = fibers[thread];
    f.waits = nullptr;
    if (f.started) _longjmp(f.at, 1);
    f.started = true;
    setcontext(&f.first);
}
inline bool meet(Barrier &b, int count, bool vote = true) {
    b.all = b.all && vote;
    if (++b.waiting == count) {
        b.result = b.all, b.all = true, b.waiting = 0, ++b.turn;
    } else {
        Fiber &f = fibers[current];
        f.waits = &b, f.turn = b.turn;
        if (!_setjmp(f.at)) next();
    }
    return b.result;
}
inline void meet_warp() { meet(warps[current / 32], 32); }
inline float swap(float x, int from) {
    float *turn = exchange[warps[current / 32].turn & 1];  // nobody is two turns ahead
    turn[current] = x;
    meet_warp();
    return turn[current / 32 * 32 + (from & 31)];
}
inline void perform(const Copy &c) {
    if (c.from) memcpy(c.to, c.from, c.bytes);
    else memset(c.to, 0, c.bytes);
}
inline void begin_copy(const Copy &c) {
    if (((uintptr_t)c.to | (uintptr_t)c.from) % c.bytes) error = MISALIGNED;
    if (!late) return perform(c);
    Fiber &f = fibers[current];
    if (f.count == f.room) f.copies = (Copy *)realloc(f.copies, (f.room = 2 * f.room + 64) * sizeof(Copy));
    f.copies[f.count++] = c;
}
inline void finish_copies() {
    Fiber &f = fibers[current];
    for (int i = 0; i < f.count; ++i) perform(f.copies[i]);
    f.count = 0;
}
inline void entry() {
    body();
    fibers[current].done = true;
    if (--left == 0) _longjmp(scheduler, 1);
    next();
}
inline void run_block() {
    threads = left = block_size.x;
    for (int i = 0; i < threads; ++i) {
        Fiber &f = fibers[i];
        f.started = f.done = false;
        f.waits = nullptr;
        f.count = 0;
        if (!f.stack) f.stack = (char *)malloc(STACK);
        getcontext(&f.first);
        f.first.uc_stack.ss_sp = f.stack;
        f.first.uc_stack.ss_size = STACK;
        f.first.uc_link = nullptr;
        makecontext(&f.first, entry, 0);
    }
    block = Barrier();
    for (auto &w : warps) w = Barrier();
    current = late ? 0 : threads - 1;
    if (!_setjmp(scheduler)) next();
}

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_size

inline void __syncthreads() { emulated::meet(emulated::block, emulated::block_size.x); }
inline bool __syncthreads_and(bool x) { return emulated::meet(emulated::block, emulated::block_size.x, x); }
inline void __syncwarp() { emulated::meet_warp(); }
inline bool __all_sync(unsigned, bool x) {
    bool all = true;
    for (int i = 0; i < 32; ++i) all = (emulated::swap(x ? 1.0f : 0.0f, i) != 0.0f) && all;
    return all;
}
inline float __shfl_sync(unsigned, float x, int lane) { return emulated::swap(x, lane); }
inline float __shfl_xor_sync(unsigned, float x, int mask) { return emulated::swap(x, (emulated::current & 31) ^ mask); }
inline float __shfl_up_sync(unsigned, float x, int by) {
    int lane = emulated::current & 31;
    return emulated::swap(x, lane >= by ? lane - by : lane);
}
inline float __shfl_down_sync(unsigned, float x, int by) {
    int lane = emulated::current & 31;
    return emulated::swap(x, lane + by < 32 ? lane + by : lane);
}

// What the kernels say in PTX.
struct F16 { unsigned short bits; };
struct BF16 { unsigned short bits; };
inline float bits_to_float(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
inline float widen(float x) { return x; }
inline float widen(F16 x) { _Float16 h; memcpy(&h, &x.bits, 2); return float(h); }
inline float widen(BF16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline void narrow(float x, float &y) { y = x; }
inline void narrow(float x, F16 &y) { _Float16 h = _Float16(x); memcpy(&y.bits, &h, 2); }
inline void narrow(float x, BF16 &y) {
    uint32_t u;
    memcpy(&u, &x, 4);
    y.bits = x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline void copy_done() { emulated::finish_copies(); }
template <int BYTES> inline void copy(void *to, const void *from, bool there) {
    emulated::begin_copy({to, there ? from : nullptr, BYTES});
}
inline float exp2_(float x) { return exp2f(x); }
inline float recip(float x) { return 1.0f / x; }
inline float as_float(int x) { return bits_to_float(uint32_t(x)); }
inline int as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
inline int total_of(unsigned x, int sum) {
    for (int i = 0; i < 32; i += 8) sum += int8_t(x >> i);
    return sum;
}
// m16n8k32 of bytes: those of `a` of type A, int8 in b.
template <class A> inline void multiply_bytes(int (&y)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const int (&sum)[4]) {
    const int g = (emulated::current & 31) / 4, t = emulated::current & 3;
    int total[4] = {sum[0], sum[1], sum[2], sum[3]};
    for (int q = 0; q < 4; ++q) {
        int words[4], of_column[2][2];
        for (int i = 0; i < 4; ++i) words[i] = as_int(emulated::swap(as_float(int(a[i])), 4 * g + q));
        for (int c = 0; c < 2; ++c) {
            of_column[c][0] = as_int(emulated::swap(as_float(int(b0)), 4 * (2 * t + c) + q));
            of_column[c][1] = as_int(emulated::swap(as_float(int(b1)), 4 * (2 * t + c) + q));
        }
        for (int i = 0; i < 4; ++i)
            for (int half = 0; half < 2; ++half)
                for (int byte = 0; byte < 32; byte += 8)
                    total[i] += int(A(words[half * 2 + i / 2] >> byte)) * int(int8_t(of_column[i % 2][half] >> byte));
    }
    for (int i = 0; i < 4; ++i) y[i] = total[i];
}
inline void multiply(int (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { multiply_bytes<int8_t>(sum, a, b0, b1, sum); }
inline void multiply_codes(int (&y)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const int (&sum)[4]) {
    multiply_bytes<uint8_t>(y, a, b0, b1, sum);
}
inline float max_nan(float x, float y) { return x != x || y != y ? as_float(0x7fffffff) : fmaxf(x, y); }
inline float min_nan(float x, float y) { return x != x || y != y ? as_float(0x7fffffff) : fminf(x, y); }
inline int bytes_of(unsigned x, unsigned y, unsigned which) {
    unsigned z = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned from = which >> 4 * i & 15, byte = (from & 4 ? y : x) >> 8 * (from & 3) & 255;
        z |= (from & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return int(z);
}
inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x < y ? y : x; }
extern char shared[];
inline unsigned place_of(const float *p) { return unsigned(reinterpret_cast<const char *>(p) - shared); }
inline void load_pair(unsigned at, float &x, float &y) {
    const float *p = reinterpret_cast<const float *>(shared + at);
    x = p[0], y = p[1];
}
inline int this_thread(int first) { return int(threadIdx.x) - first; }
inline void store_if(bool there, float *to, float x) { if (there) *to = x; }
inline void store_if(bool there, float *to, float x, float y) { if (there) to[0] = x, to[1] = y; }
inline int dot4(unsigned x, int w, int sum) {
    for (int i = 0; i < 4; ++i) sum += int(x >> 8 * i & 255) * int(int8_t(uint32_t(w) >> 8 * i & 255));
    return sum;
}
