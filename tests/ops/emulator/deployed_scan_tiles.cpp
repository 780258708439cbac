// The CUDA kernel of deployed models' scans of one state as a library for a CPU.
#include "cuda.h"

#include "kernel.cu"

#include "launch.h"

extern "C" int launch(const char *name, int x, int y, int threads, long bytes, const Params *p, bool late) {
    BEGIN
    LAUNCH(scan_tiles, tiles_bytes(*p))
    RUN
}
