// The CUDA kernel of deployed models' depthwise convolutions and projections behind them as a library for a CPU.
#include "cuda.h"

#include "kernel.cu"

#define Params Both
#include "launch.h"

extern "C" int launch(const char *name, int x, int y, int threads, long bytes, const Params *p, bool late) {
    BEGIN
    LAUNCH(fronted, BYTES)
    RUN
}
