// The CUDA kernels of the selective scan as a library for a CPU.
#include "cuda.h"

#include "kernel.cu"

__attribute__((aligned(16))) char shared[256 * 1024];  // as much as a block can have there, and more

static Params params;

#define LAUNCH(NAME, BYTES) if (!strcmp(name, #NAME) && bytes == BYTES) emulated::body = [] { NAME(params); };

extern "C" int launch(const char *name, int x, int y, int threads, long bytes, const Params *p, bool late) {
    if (bytes > long(sizeof(shared)) || threads > emulated::MAX_THREADS) return emulated::TOO_LARGE;
    params = *p;
    emulated::body = nullptr;
#if PASS == 0
    LAUNCH(scan_forward, BYTES)
#elif PASS == 1
    LAUNCH(scan_backward, BYTES) LAUNCH(scan_sum, 0)
#else
    LAUNCH(scan_ends, BYTES) LAUNCH(scan_carry, 0)
#endif
    if (!emulated::body) return emulated::NO_SUCH_KERNEL;
    emulated::error = emulated::NONE;
    emulated::late = late;
    emulated::block_size = {unsigned(threads), 1, 1};
    for (int j = 0; j < y; ++j)
        for (int i = 0; i < x; ++i) {
            emulated::block_index = {unsigned(i), unsigned(j), 0};
            memset(shared, 0xff, bytes);  // NaN, so that nothing is read before it is written
            emulated::run_block();
        }
    return emulated::error;
}
