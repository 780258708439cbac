// The CUDA kernels of deployed models' scans as a library for a CPU.
#include "cuda.h"

#include "kernel.cu"

#include "launch.h"

extern "C" int launch(const char *name, int x, int y, int threads, long bytes, const Params *p, bool late) {
    BEGIN
    LAUNCH(scan_steps, steps_bytes(*p)) LAUNCH(scan_ends, ENDS_BYTES) LAUNCH(scan_carry, CARRY_BYTES) LAUNCH(scan_out, OUT_BYTES)
    RUN
}
