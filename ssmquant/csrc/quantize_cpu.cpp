// CPU fake quantization: threads, ranges, and the sums over what chunks leave behind. C ABI, see quantize_cpu.h.

#include "quantize_cpu.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "cpu_threads.h"

extern const QuantizePath ssmquant_quantize_portable;
#if defined(__x86_64__)
extern const QuantizePath ssmquant_quantize_avx2, ssmquant_quantize_avx512;
#endif

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
// A group of no more elements than that is likely still in a near cache for its second pass, if that comes at once.
constexpr int64_t kNear = 1 << 16;

const Paths<QuantizePath> kPaths(SSMQUANT_PATHS(ssmquant_quantize_));

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

// ---- LSQ -----------------------------------------------------------------------------------------------------------

float floored(float alpha, double eps) {
  if (eps <= 0) return alpha;
  const float magnitude = std::fabs(alpha), least = float(eps);
  const float raised = magnitude < least ? least : magnitude;
  return alpha < 0 ? -raised : raised;
}

void lsq_forward(const QuantizeCall& call) {
  const auto run = kPaths.found[call.path]->lsq[call.dtype];
  const Cut cut(1, call.count);
  const Scale scale{floored(*call.alpha, call.eps), *call.beta, 0, 0};
  share(useful_threads(call, kForward), cut.tasks, [&](int64_t chunk, int64_t) {
    run(call, span_of(cut, chunk, 0, cut.size, 0), scale);
  });
}

void lsq_backward(const QuantizeCall& call) {
  const auto run = kPaths.found[call.path]->lsq_back[call.dtype];
  const Cut cut(1, call.count);
  const Scale scale{floored(*call.alpha, call.eps), *call.beta, 0, 0};
  double(*sums)[2] = static_cast<double(*)[2]>(call.workspace);
  share(useful_threads(call, kBackward), cut.tasks, [&](int64_t chunk, int64_t) {
    sums[chunk][kAlpha] = sums[chunk][kBeta] = 0;
    run(call, span_of(cut, chunk, 0, cut.size, 0), scale, sums[chunk]);
  });
  double alpha = 0, beta = 0;
  for (int64_t i = 0; i < cut.tasks; ++i) {
    alpha += sums[i][kAlpha];
    beta += sums[i][kBeta];
  }
  *call.dalpha = float(alpha * call.scale);
  *call.dbeta = float(beta);
}

// ---- DLS -----------------------------------------------------------------------------------------------------------

double dot(const float* c, const double* stats) {
  return double(c[0]) * stats[0] + double(c[1]) * stats[1] + double(c[2]) * stats[2] + double(c[3]) * stats[3];
}

double sign(double x) { return double(x > 0) - double(x < 0); }

// What a group's range is made from. Forward and backward compute it from the same numbers.
struct Statistics {
  double plain[4];    // mean, deviation, min, max
  double shifted[4];  // of x + beta, with |mean| in front
  float beta, signed_alpha, ceiling;

  Statistics(const QuantizeCall& call, float mean, float std, float low, float high) {
    const double all[4] = {mean, std, low, high};
    std::copy(all, all + 4, plain);
    beta = float(dot(call.v, plain));
    const double b = beta;
    const double moved[4] = {std::fabs(mean + b), std, low + b, high + b};
    std::copy(moved, moved + 4, shifted);
    signed_alpha = float(dot(call.w, shifted));
    ceiling = (high - low) / float(call.steps);
  }

  float alpha(const QuantizeCall& call) const {
    const float alpha0 = std::fabs(signed_alpha), eps = float(call.eps);
    if (alpha0 != alpha0 || ceiling != ceiling) return alpha0 + ceiling;
    if (call.floor_first) return std::min(std::max(alpha0, eps), ceiling);
    return std::max(std::min(alpha0, ceiling), eps);
  }
};

class DLS {
 public:
  DLS(const QuantizeCall& call, Cost cost)
      : call_(call),
        path_(*kPaths.found[call.path]),
        cut_(call.groups, call.count / call.groups),
        threads_(useful_threads(call, cost)),
        run_(call.groups == 1 ? call.count : call.inner) {}

  // Elements of eight bytes.
  static int64_t workspace(const QuantizeCall& call, bool backward) {
    const Cut cut(call.groups, call.count / call.groups);
    const int64_t chunks = cut.groups * cut.chunks;
    if (!backward) return chunks * int64_t(sizeof(Moments) / 8);
    return chunks * kSums + cut.groups * (8 + int64_t(sizeof(Slot) / 8));
  }

  void forward() const {
    Moments* moments = static_cast<Moments*>(call_.workspace);
    in_two_passes(
        [&](int64_t group, int64_t chunk) {
          path_.moments[call_.dtype](call_, span(group, chunk), &moments[group * cut_.chunks + chunk]);
        },
        [&](int64_t group) { set_range(group, moments + group * cut_.chunks); },
        [&](int64_t group, int64_t chunk) {
          path_.dls[call_.dtype](call_, span(group, chunk), scale(group));
        });
  }

  void backward() const {
    double(*sums)[kSums] = static_cast<double(*)[kSums]>(call_.workspace);
    double(*parts)[8] = reinterpret_cast<double(*)[8]>(sums + cut_.groups * cut_.chunks);
    Slot* slots = reinterpret_cast<Slot*>(parts + cut_.groups);
    in_two_passes(
        [&](int64_t group, int64_t chunk) {
          double* own = sums[group * cut_.chunks + chunk];
          std::fill(own, own + kSums, 0.0);
          path_.dls_sums[call_.dtype](call_, span(group, chunk), scale(group), own);
        },
        [&](int64_t group) { slots[group].ends = join(group, sums + group * cut_.chunks, parts[group]); },
        [&](int64_t group, int64_t chunk) {
          const Ends& ends = slots[group].ends;
          const double* own = sums[group * cut_.chunks + chunk];
          const bool finite = std::isfinite(ends.low_part) && std::isfinite(ends.high_part);
          const bool with_ends = !finite || own[kAtLow] > 0 || own[kAtHigh] > 0;
          path_.dls_back[call_.dtype](call_, span(group, chunk), scale(group), ends, with_ends);
        });
    double totals[8] = {};
    for (int64_t group = 0; group < cut_.groups; ++group) {
      for (int i = 0; i < 8; ++i) totals[i] += parts[group][i];
    }
    for (int i = 0; i < 4; ++i) {
      call_.dw[i] = float(totals[i]);
      call_.dv[i] = float(totals[4 + i]);
    }
  }

 private:
  struct Slot {
    alignas(8) Ends ends;
  };

  Span span(int64_t group, int64_t chunk) const {
    const bool together = run_ >= cut_.size;
    return span_of(cut_, chunk, group * run_, together ? cut_.size : run_, run_ * call_.groups);
  }

  Scale scale(int64_t group) const {
    const float* r = call_.ranges + group;
    const int64_t G = call_.groups;
    return {r[4 * G], r[5 * G], r[2 * G], r[3 * G]};
  }

  // first(group, chunk) for all chunks, between(group), then second(group, chunk) if x has a result.
  template <typename First, typename Between, typename Second>
  void in_two_passes(const First& first, const Between& between, const Second& second) const {
    const bool both = call_.y != nullptr;
    if (cut_.size <= kNear && cut_.groups >= threads_) {
      const int64_t in_task = cut_.groups_in_task;
      share(threads_, divide_up(cut_.groups, in_task), [&](int64_t task, int64_t) {
        for (int64_t g = task * in_task; g < std::min((task + 1) * in_task, cut_.groups); ++g) {
          for (int64_t chunk = 0; chunk < cut_.chunks; ++chunk) first(g, chunk);
          between(g);
          for (int64_t chunk = both ? cut_.chunks - 1 : -1; chunk >= 0; --chunk) second(g, chunk);
        }
      });
      return;
    }
    // Who has done the last task of the first pass goes on with what is between; the others wait for that.
    const int64_t tasks = cut_.tasks;
    std::atomic<int64_t> done{0};
    std::atomic<bool> ready{false};
    share(threads_, both ? 2 * tasks : tasks, [&](int64_t task, int64_t) {
      if (task < tasks) {
        cut_.for_chunks(task, first);
        if (done.fetch_add(1) + 1 < tasks) return;
        for (int64_t g = 0; g < cut_.groups; ++g) between(g);
        ready.store(true);
      } else {
        while (!ready.load()) sched_yield();
        // What was read last is read first: some of it is still in a cache.
        cut_.for_chunks(2 * tasks - 1 - task, second);
      }
    });
  }

  void set_range(int64_t group, const Moments* chunks) const {
    const int64_t G = call_.groups;
    double sum = 0, squares = 0;
    float low = chunks[0].low, high = chunks[0].high;
    for (int64_t i = 0; i < cut_.chunks; ++i) {
      const Moments& m = chunks[i];
      sum += m.mean * double(span(group, i).count);
      low = m.low < low || m.low != m.low ? m.low : low;
      high = m.high > high || m.high != m.high ? m.high : high;
    }
    const double mean = sum / double(cut_.size);
    for (int64_t i = 0; i < cut_.chunks; ++i) {
      const double d = chunks[i].mean - mean;
      squares += chunks[i].squares + d * d * double(span(group, i).count);
    }
    // A mean of very many equal values may be rounded.
    if (low == high && squares == squares) squares = 0;
    const float std = float(std::sqrt(squares / call_.freedom));
    const Statistics s(call_, float(mean), std, low, high);
    float* r = call_.ranges + group;
    const float all[6] = {float(mean), std, low, high, s.alpha(call_), s.beta};
    for (int i = 0; i < 6; ++i) r[i * G] = all[i];
  }

  // The gradients of w and v from one group, and of x through its statistics: as _DLSFunction.backward.
  Ends join(int64_t group, const double (*chunks)[kSums], double* parts) const {
    const int64_t G = call_.groups;
    const float *r = call_.ranges + group, *w = call_.w, *v = call_.v;
    const Statistics s(call_, r[0], r[G], r[2 * G], r[3 * G]);
    double sums[kSums] = {};
    for (int64_t i = 0; i < cut_.chunks; ++i) {
      for (int k = 0; k < kSums; ++k) sums[k] += chunks[i][k];
    }
    const double n = double(cut_.size);
    double dalpha = sums[kAlpha] * call_.scale, dbeta = sums[kBeta];
    if (!call_.dead_pass) {
      const float magnitude = std::fabs(s.signed_alpha);
      dalpha *= double(magnitude <= s.ceiling && magnitude >= float(call_.eps));
    }
    dalpha *= sign(s.signed_alpha);
    double d[4];
    for (int i = 0; i < 4; ++i) {
      parts[i] = s.shifted[i] * dalpha;
      d[i] = double(w[i]) * dalpha;
    }
    d[0] *= sign(s.plain[0] + double(s.beta));
    dbeta += d[0] + d[2] + d[3];
    for (int i = 0; i < 4; ++i) {
      parts[4 + i] = s.plain[i] * dbeta;
      d[i] += double(v[i]) * dbeta;
    }
    const double std = s.plain[1], slope = std > 0 ? d[1] / (std * call_.freedom) : 0.0;
    return {r[0], float(d[0] / n), float(slope), float((d[2] + sums[kLow]) / sums[kAtLow]),
            float((d[3] + sums[kHigh]) / sums[kAtHigh])};
  }

  const QuantizeCall& call_;
  const QuantizePath& path_;
  const Cut cut_;
  const int64_t threads_, run_;
};

// ---- banks ---------------------------------------------------------------------------------------------------------

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
  explicit WeightBank(const QuantizeCall& call) : call_(call), path_(*kPaths.found[call.path]) {
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

// How many instruction sets this machine can run, best first, and their names.
SSMQUANT_EXPORT int64_t ssmquant_quantize_paths() { return kPaths.count; }

SSMQUANT_EXPORT const char* ssmquant_quantize_path(int64_t index) { return kPaths.found[index]->name; }

// What a call needs as its workspace, in units of eight bytes. The forward pass of LSQ needs none.
SSMQUANT_EXPORT int64_t ssmquant_lsq_workspace(const QuantizeCall* call, int64_t) {
  return 2 * Cut(1, call->count).tasks;
}

SSMQUANT_EXPORT int64_t ssmquant_dls_workspace(const QuantizeCall* call, int64_t backward) {
  return DLS::workspace(*call, backward != 0);
}

SSMQUANT_EXPORT int64_t ssmquant_bank_workspace(const QuantizeCall* call, int64_t backward) {
  return WeightBank::workspace(*call, backward != 0);
}

SSMQUANT_EXPORT void ssmquant_lsq_forward(const QuantizeCall* call) { lsq_forward(*call); }

SSMQUANT_EXPORT void ssmquant_lsq_backward(const QuantizeCall* call) { lsq_backward(*call); }

SSMQUANT_EXPORT void ssmquant_dls_forward(const QuantizeCall* call) { DLS(*call, kRangeForward).forward(); }

SSMQUANT_EXPORT void ssmquant_dls_backward(const QuantizeCall* call) { DLS(*call, kRangeBackward).backward(); }

SSMQUANT_EXPORT void ssmquant_bank_forward(const QuantizeCall* call) { WeightBank(*call).forward(); }

SSMQUANT_EXPORT void ssmquant_bank_backward(const QuantizeCall* call) { WeightBank(*call).backward(); }
