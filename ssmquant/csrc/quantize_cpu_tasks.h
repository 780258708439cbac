// How CPU fake quantization is cut into tasks, and for how many threads. For quantize_cpu.cpp.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu_threads.h"
#include "quantize_cpu.h"

namespace {

// What is worth the start of a thread, and what an element takes, in tenths of a nanosecond.
constexpr int64_t kThreadWork = 600000;
enum Cost : int64_t {
  kForward = 2,
  kBackward = 3,
  kRangeForward = 4,
  kRangeBackward = 10,
  kGridForward = 8,
  kGridBackward = 25,
};

int64_t useful_threads(const QuantizeCall& call, Cost cost) {
  return parts(std::min(call.threads, kMostThreads), call.count * cost / kThreadWork);
}

// Groups of equal size, cut into chunks; tasks of one chunk, or of several groups that are smaller than that.
struct Cut {
  int64_t groups, size, chunks, groups_in_task, tasks;

  Cut(int64_t groups, int64_t size) : groups(groups), size(size) {
    chunks = divide_up(size, kChunk);
    groups_in_task = chunks > 1 ? 1 : parts(kChunk / std::max<int64_t>(size, 1), groups);
    tasks = chunks > 1 ? groups * chunks : divide_up(groups, groups_in_task);
    if (size == 0) tasks = 0;
  }

  // Calls run(group, chunk) for what belongs to a task.
  template <typename F>
  void for_chunks(int64_t task, const F& run) const {
    if (chunks > 1) return run(task / chunks, task % chunks);
    const int64_t first = task * groups_in_task;
    for (int64_t g = first; g < std::min(first + groups_in_task, groups); ++g) run(g, 0);
  }
};

Span span_of(const Cut& cut, int64_t chunk, int64_t offset, int64_t run, int64_t stride) {
  const int64_t first = chunk * kChunk;
  return {offset, run, stride, first, std::min(kChunk, cut.size - first)};
}

// Its magnitude raised to eps, its sign kept.
float floored(float alpha, double eps) {
  if (eps <= 0) return alpha;
  const float magnitude = std::fabs(alpha), least = float(eps);
  const float raised = magnitude < least ? least : magnitude;
  return alpha < 0 ? -raised : raised;
}

}  // namespace
