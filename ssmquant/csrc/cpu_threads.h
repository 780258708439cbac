// Tasks shared out over threads, and the choice of an instruction set. For files compiled once for any machine.
#pragma once

#include <dlfcn.h>
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

// Runs work(data) on so many threads, this one included, and returns when all have.
using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// The OpenMP library that torch has loaded, if any. Its threads wait for work a while before they sleep, so others beside
// them would find the processors busy. GNU's does not survive a fork; a process that was forked uses threads of its own.
Parallel openmp = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { openmp = nullptr; });

template <typename F>
struct Job {
  const F& run;
  const int64_t tasks;
  std::atomic<int64_t> next{0}, threads{0};

  void work() {
    const int64_t thread = threads.fetch_add(1, std::memory_order_relaxed);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(i, thread);
  }

  static void work_on(void* job) { static_cast<Job*>(job)->work(); }

  static void* start(void* job) {
    work_on(job);
    return nullptr;
  }
};

// Calls run(task, thread) for all tasks, which are begun in order. A thread that cannot be started leaves its share to
// the others. A second OpenMP library beside torch's may not be loaded, and nothing of C++'s library is used, whose
// version would have to fit.
template <typename F>
void share(int64_t threads, int64_t tasks, const F& run) {
  Job<F> job{run, tasks};
  threads = std::min(threads, tasks);
  if (threads <= 1) return job.work();
  if (openmp != nullptr) return openmp(Job<F>::work_on, &job, unsigned(threads), 0);
  pthread_t others[kMostThreads];
  int64_t started = 0;
  while (started + 1 < threads && pthread_create(&others[started], nullptr, Job<F>::start, &job) == 0) ++started;
  job.work();
  for (int64_t i = 0; i < started; ++i) pthread_join(others[i], nullptr);
}

}  // namespace

#define SSMQUANT_EXPORT extern "C" __attribute__((visibility("default")))
