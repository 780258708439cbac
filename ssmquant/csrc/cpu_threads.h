// Tasks shared out over threads, and the choice of an instruction set. For files compiled once for any machine.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

constexpr int64_t kMostThreads = 256;

// Forms of the same kernels, one an instruction set, that this machine can run, best first. To be asked for once, when
// the library is loaded: a virtual machine takes some microseconds to answer.
template <typename Path>
struct Paths {
  const Path* found[4];
  int64_t count = 0;

  // Null where a form is not compiled.
  Paths(const Path* avx512, const Path* avx2, const Path* portable) : Paths(nullptr, avx512, avx2, portable) {}
  Paths(const Path* vnni, const Path* avx512, const Path* avx2, const Path* portable) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned a, b, features = 0, d;
    __get_cpuid(1, &a, &b, &features, &d);
    // Not all compilers know a name for F16C.
    const bool common = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (features & bit_F16C) != 0;
    const bool wide = common && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (wide && vnni != nullptr && __builtin_cpu_supports("avx512vnni")) found[count++] = vnni;
    if (wide && avx512 != nullptr) found[count++] = avx512;
    if (common && avx2 != nullptr) found[count++] = avx2;
#else
    (void)vnni, (void)avx512, (void)avx2;
#endif
    found[count++] = portable;
  }
};

#if defined(__x86_64__)
#define SSMQUANT_PATHS(prefix) &prefix##avx512, &prefix##avx2, &prefix##portable
#else
#define SSMQUANT_PATHS(prefix) nullptr, nullptr, &prefix##portable
#endif

inline int64_t parts(int64_t wanted, int64_t most) { return std::max<int64_t>(1, std::min(wanted, most)); }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename F>
struct Worker {
  const F* run;
  std::atomic<int64_t>* next;
  int64_t tasks, thread;
  pthread_t handle;

  void work() const {
    for (int64_t i; (i = next->fetch_add(1, std::memory_order_relaxed)) < tasks;) (*run)(i, thread);
  }

  static void* start(void* self) {
    static_cast<const Worker*>(self)->work();
    return nullptr;
  }
};

// Calls run(task, thread) for all tasks. A thread that cannot be started leaves its share to the others. Threads of
// our own, since a second OpenMP library beside torch's may not be loaded, and nothing of C++'s library, whose version
// would have to fit.
template <typename F>
void share(int64_t threads, int64_t tasks, const F& run) {
  std::atomic<int64_t> next{0};
  Worker<F> workers[kMostThreads];
  int64_t started = 1;
  for (int64_t i = 0; i < std::min(threads, tasks); ++i) {
    workers[i] = {&run, &next, tasks, i, {}};
    if (i > 0) {
      if (pthread_create(&workers[i].handle, nullptr, Worker<F>::start, &workers[i]) != 0) break;
      started = i + 1;
    }
  }
  workers[0].work();
  for (int64_t i = 1; i < started; ++i) pthread_join(workers[i].handle, nullptr);
}

}  // namespace

#define SSMQUANT_EXPORT extern "C" __attribute__((visibility("default")))
