// Banks of weights: shared out, their grids made ready for searching, their sums joined. For quantize_cpu.cpp.
#pragma once

#include <algorithm>
#include <limits>

#include "quantize_cpu_tasks.h"

namespace {

// Counts a weight's bounds, and its cells: see Bounds.
void prepare(const QuantizeCall& call, const float* from, int64_t count, Bounds& to) {
  to.count = int(count);
  to.in_cell = 0;
  to.low = float(call.qmin);
  to.cells = float(kCells - 1) / float(call.qmax - call.qmin);
  std::copy(from, from + count, to.values);
  if (count <= kFewBounds) return;
  std::fill(to.values + count, to.values + 2 * kLevels, std::numeric_limits<float>::infinity());
  int32_t cell = 0, most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float u = std::min(std::max(from[i], float(call.qmin)), float(call.qmax));
    const int32_t own = u == u ? to.cell(u) : cell;
    for (; cell < own; ++cell) to.before[cell + 1] = int32_t(i);
    if (i == 0) to.before[0] = 0;
    most = std::max(most, int32_t(i) + 1 - to.before[cell]);
  }
  for (; cell < kCells - 1; ++cell) to.before[cell + 1] = int32_t(count);
  if (most <= kFewInCell) to.in_cell = most;
}

void prepare(const QuantizeCall& call, const float* grid, const float* thresholds, Segments& to) {
  constexpr float tail = 0.1f, infinity = std::numeric_limits<float>::infinity();
  const int64_t n = call.levels;
  prepare(call, grid, n, to.entries);
  for (int64_t s = 0; s <= n; ++s) {
    const bool inner = s > 0 && s < n;
    to.start[s] = grid[std::max<int64_t>(s - 1, 0)];
    to.slope[s] = inner ? 1.0f / (grid[s] - grid[s - 1]) : tail;
    // Segments 0 and n belong to the first and the last code.
    to.middle[s] = inner ? thresholds[s - 1] : s == 0 ? -infinity : infinity;
  }
}

struct Weight {
  int64_t first_task, first_group, first_element, first_sum;
};

class WeightBank {
 public:
  WeightBank(const QuantizeCall& call, const QuantizePath& path) : call_(call), path_(path) {
    weights_ = static_cast<Weight*>(call.workspace);
    const Weight end = plan(call, weights_);
    tasks_ = end.first_task;
    sums_ = reinterpret_cast<double(*)[2]>(weights_ + call.weights);
    bins_ = reinterpret_cast<double*>(sums_ + end.first_sum);
  }

  static int64_t workspace(const QuantizeCall& call, bool backward) {
    const Weight end = plan(call, nullptr);
    const int64_t table = call.weights * int64_t(sizeof(Weight) / 8);
    return backward ? table + 2 * end.first_sum + end.first_task * bins_of_task(call) : table;
  }

  void forward() const {
    share(useful_threads(call_, call_.levels > 0 ? kGridForward : kForward), tasks_, [&](int64_t task, int64_t) {
      const int64_t w = weight_of(task);
      if (call_.levels == 0) {
        for_spans(task, w, [&](const Span& span, int64_t group, int64_t) {
          path_.lsq[0](call_, span, scale(group));
        });
        return;
      }
      Bounds thresholds;
      prepare(call_, call_.thresholds + w * (call_.levels - 1), call_.levels - 1, thresholds);
      for_spans(task, w, [&](const Span& span, int64_t group, int64_t) {
        path_.rfa(call_, span, scale(group), thresholds);
      });
    });
  }

  void backward() const {
    const int64_t threads = useful_threads(call_, call_.levels > 0 ? kGridBackward : kBackward);
    share(threads, tasks_, [&](int64_t task, int64_t) { backward_task(task); });
    for (int64_t w = 0; w < call_.weights; ++w) {
      const Cut cut = cut_of(call_, w);
      for (int64_t g = 0; g < cut.groups; ++g) {
        double alpha = 0, beta = 0;
        for (int64_t i = 0; i < cut.chunks; ++i) {
          const double* own = sums_[weights_[w].first_sum + g * cut.chunks + i];
          alpha += own[kAlpha];
          beta += own[kBeta];
        }
        call_.dalpha[weights_[w].first_group + g] = float(alpha * call_.scales[w]);
        call_.dbeta[weights_[w].first_group + g] = float(beta);
      }
      if (call_.levels > 0) join_bins(w, cut);
    }
  }

 private:
  static Cut cut_of(const QuantizeCall& call, int64_t w) {
    return {call.weight_groups[w], call.counts[w] / call.weight_groups[w]};
  }

  static int64_t bins_of_task(const QuantizeCall& call) { return call.levels > 0 ? 2 * (call.levels + 1) : 0; }

  // Where every weight begins; returns where the last one ends.
  static Weight plan(const QuantizeCall& call, Weight* to) {
    Weight next{};
    for (int64_t w = 0; w < call.weights; ++w) {
      if (to != nullptr) to[w] = next;
      const Cut cut = cut_of(call, w);
      next.first_task += cut.tasks;
      next.first_group += cut.groups;
      next.first_element += call.counts[w];
      next.first_sum += cut.groups * cut.chunks;
    }
    return next;
  }

  int64_t weight_of(int64_t task) const {
    const auto later = [](int64_t t, const Weight& w) { return t < w.first_task; };
    return std::upper_bound(weights_, weights_ + call_.weights, task, later) - weights_ - 1;
  }

  Scale scale(int64_t group) const { return {floored(call_.alpha[group], call_.eps), call_.beta[group], 0, 0}; }

  // Calls run(span, group, sum) for the chunks of a task; group and sum count through all weights.
  template <typename F>
  void for_spans(int64_t task, int64_t w, const F& run) const {
    const Weight& weight = weights_[w];
    const Cut cut = cut_of(call_, w);
    cut.for_chunks(task - weight.first_task, [&](int64_t g, int64_t chunk) {
      const Span span = span_of(cut, chunk, weight.first_element + g * cut.size, cut.size, 0);
      run(span, weight.first_group + g, weight.first_sum + g * cut.chunks + chunk);
    });
  }

  void backward_task(int64_t task) const {
    const int64_t w = weight_of(task), bins = bins_of_task(call_);
    if (call_.levels == 0) {
      for_spans(task, w, [&](const Span& span, int64_t group, int64_t sum) {
        sums_[sum][kAlpha] = sums_[sum][kBeta] = 0;
        path_.lsq_back[0](call_, span, scale(group), sums_[sum]);
      });
      return;
    }
    Segments segments;
    prepare(call_, call_.grid + w * call_.levels, call_.thresholds + w * (call_.levels - 1), segments);
    alignas(16) double copies[kCopies * 2 * (kLevels + 1)];
    std::fill(copies, copies + kCopies * bins, 0.0);
    for_spans(task, w, [&](const Span& span, int64_t group, int64_t sum) {
      sums_[sum][kAlpha] = sums_[sum][kBeta] = 0;
      path_.rfa_back(call_, span, scale(group), segments, sums_[sum], copies);
    });
    for (int64_t i = 0; i < bins; ++i) {
      double total = 0;
      for (int k = 0; k < kCopies; ++k) total += copies[k * bins + i];
      bins_[task * bins + i] = total;
    }
  }

  // The surrogate S = p + (u - a_left) / gap: the fraction f of the gap goes to the right entry, 1 - f to the left one.
  void join_bins(int64_t w, const Cut& cut) const {
    constexpr double tail = 0.1f;
    const int64_t n = call_.levels, bins = bins_of_task(call_);
    double totals[2 * (kLevels + 1)] = {};
    for (int64_t t = 0; t < cut.tasks; ++t) {
      for (int64_t i = 0; i < bins; ++i) totals[i] += bins_[(weights_[w].first_task + t) * bins + i];
    }
    const float* grid = call_.grid + w * n;
    float* to = call_.dgrid + w * n;
    double before = tail * totals[0];  // what an entry gets from the segment below
    for (int64_t i = 0; i < n; ++i) {
      if (i == n - 1) {
        to[i] = float(-(before + tail * totals[2 * n]));
        break;
      }
      const double gap = double(grid[i + 1] - grid[i]), right = totals[2 * (i + 1) + 1] / gap;
      to[i] = float(-(before + (totals[2 * (i + 1)] - right) / gap));
      before = right / gap;
    }
  }

  const QuantizeCall& call_;
  const QuantizePath& path_;
  Weight* weights_;
  int64_t tasks_;
  double (*sums_)[2];
  double* bins_;
};

}  // namespace
