// What the libraries of emulated kernels share: a kernel by its name, and a grid of blocks.
#pragma once

__attribute__((aligned(16))) char shared[256 * 1024];  // as much as a block can have there, and more

static Params params;

#define BEGIN                                                                                              \
    if (bytes > long(sizeof(shared)) || threads > emulated::MAX_THREADS) return emulated::TOO_LARGE;       \
    params = *p;                                                                                           \
    emulated::body = nullptr;
#define LAUNCH(NAME, BYTES) if (!strcmp(name, #NAME) && bytes == BYTES) emulated::body = [] { NAME(params); };
#define RUN                                                                                                \
    if (!emulated::body) return emulated::NO_SUCH_KERNEL;                                                  \
    emulated::error = emulated::NONE;                                                                      \
    emulated::late = late;                                                                                 \
    emulated::block_size = {unsigned(threads), 1, 1};                                                      \
    for (int j = 0; j < y; ++j)                                                                            \
        for (int i = 0; i < x; ++i) {                                                                      \
            emulated::block_index = {unsigned(i), unsigned(j), 0};                                         \
            memset(shared, 0xff, bytes); /* NaN, so that nothing is read before it is written */           \
            emulated::run_block();                                                                         \
        }                                                                                                  \
    return emulated::error;
