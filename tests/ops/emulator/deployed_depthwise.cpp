// The CUDA kernel of deployed models' depthwise convolutions as a library for a CPU.
#include "cuda.h"

#include "kernel.cu"

#define Params Image
#include "launch.h"

extern "C" int launch(const char *name, int x, int y, int threads, long bytes, const Params *p, bool late) {
    BEGIN
    LAUNCH(depthwise, BYTES)
    RUN
}
