// CPU fake quantization: threads, ranges, and the sums over what chunks leave behind. C ABI, see quantize_cpu.h.

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "quantize_cpu_bank.h"
#include "quantize_cpu_tasks.h"

extern const QuantizePath ssmquant_quantize_portable;
#if defined(__x86_64__)
extern const QuantizePath ssmquant_quantize_avx2, ssmquant_quantize_avx512;
#endif

namespace {

// A group of no more elements than that is likely still in a near cache for its second pass, if that comes at once.
constexpr int64_t kNear = 1 << 16;

const Paths<QuantizePath> kPaths(SSMQUANT_PATHS(ssmquant_quantize_));

// ---- LSQ -----------------------------------------------------------------------------------------------------------

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

SSMQUANT_EXPORT void ssmquant_bank_forward(const QuantizeCall* call) {
  WeightBank(*call, *kPaths.found[call->path]).forward();
}

SSMQUANT_EXPORT void ssmquant_bank_backward(const QuantizeCall* call) {
  WeightBank(*call, *kPaths.found[call->path]).backward();
}
