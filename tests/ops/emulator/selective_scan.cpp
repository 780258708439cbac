// The CUDA kernels of the selective scan as a library for a CPU.
#include "cuda.h"

#include "kernel.cu"

#include "launch.h"

extern "C" int launch(const char *name, int x, int y, int threads, long bytes, const Params *p, bool late) {
    BEGIN
#if PASS == 0
    LAUNCH(scan_forward, BYTES)
#elif PASS == 1
    LAUNCH(scan_backward, BYTES) LAUNCH(scan_sum, 0)
#else
    LAUNCH(scan_ends, BYTES) LAUNCH(scan_carry, 0)
#endif
    RUN
}
