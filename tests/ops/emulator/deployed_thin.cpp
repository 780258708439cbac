// The CUDA kernel of deployed models' linear layers of few inputs as a library for a CPU.
#include "cuda.h"

#include "kernel.cu"

#include "launch.h"

extern "C" int launch(const char *name, int x, int y, int threads, long bytes, const Params *p, bool late) {
    BEGIN
    LAUNCH(thin, SHARED)
    RUN
}
