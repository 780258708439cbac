// What the two halves of the CPU kernels of fake quantization share.
//
// quantize_cpu.cpp, with banks in quantize_cpu_bank.h, is the library's interface: it shares out chunks of groups, and
// joins the sums that they leave behind in a fixed order. quantize_cpu_path.cpp, with RFA in quantize_cpu_path_bank.h,
// computes them; it is compiled once for each instruction set ("path"). Both without contraction to fused
// multiply-adds. Sums are of the same order on every path, so results depend on neither the number of threads nor the
// instruction set.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#pragma GCC visibility push(hidden)
#endif

constexpr int64_t kChunk = 1 << 14;  // elements of a group that are summed by one task
constexpr int kDtypes = 4;           // see Dtype; there is no function for float64

// Mirrored by ssmquant/ops/quantize/cpu.py. All members have eight bytes.
struct QuantizeCall {
  int64_t path, threads;
  int64_t dtype;  // of x, g and y
  const void *x, *g;
  void* y;  // or the gradient of x; null where it is not wanted
  int64_t qmin, qmax;
  double eps;
  const float *alpha, *beta;  // LSQ and banks
  float *dalpha, *dbeta;
  double scale;  // of the gradients of alpha, not for banks
  void* workspace;
  // LSQ: one group; DLS: (offset // inner) % groups
  int64_t count, groups, inner;
  // DLS
  int64_t steps;  // 2 ** bits
  int64_t floor_first, dead_pass;
  double freedom;  // what a group's sum of squares is divided by for its variance
  const float *w, *v;
  float* ranges;  // (6, groups)
  float *dw, *dv;
  // banks
  int64_t weights, levels;
  const int64_t *counts, *weight_groups;  // per weight
  const double* scales;
  const float *grid, *thresholds;
  float* dgrid;
};

// `count` elements of a group from its `first` on. The group begins at `offset`; what is next to each other in memory
// are runs of `run` elements, `stride` apart.
struct Span {
  int64_t offset, run, stride;
  int64_t first, count;
};

struct Scale {
  float alpha, beta;
  float low, high;  // DLS
};

struct Moments {
  double mean, squares;  // sum of squared deviations from it
  float low, high;
};

// What the gradients of alpha and beta, and for DLS of low and high, are sums of; how many elements equal low and high.
enum Sum { kAlpha, kBeta, kLow, kHigh, kAtLow, kAtHigh, kSums };

// The gradient of x through the statistics of its group: mean_part + (x - mean) * slope, low_part and high_part at its
// ends.
struct Ends {
  float mean, mean_part, slope, low_part, high_part;
};

constexpr int kLevels = 256;
constexpr int kCells = 1024;  // of equal width, from qmin to qmax
constexpr int kFewBounds = 16, kFewInCell = 4;

// Bounds in order, prepared for counting those that are below a value.
struct Bounds {
  int count;
  int in_cell;  // at most so many lie in one cell; 0 for more than kFewInCell, or kFewBounds in all
  float low, cells;
  float values[2 * kLevels];  // and infinity behind them
  int32_t before[kCells];     // how many lie in the cells before each

  // Rises with u, so bounds in cells before that of u are below u, however this is rounded.
  int32_t cell(float u) const { return int32_t((u - low) * cells); }
};

// Segment s lies below entry s of the grid, and above the one before.
struct Segments {
  Bounds entries;
  float start[kLevels + 1], slope[kLevels + 1];
  float middle[kLevels + 1];  // the threshold in the segment
};

constexpr int kCopies = 4;  // of bins, lest neighbours wait for each other

struct QuantizePath {
  const char* name;
  // By dtype. Forward, and backward with sums added to `sums`; for DLS the gradient of x takes a pass of its own.
  void (*lsq[kDtypes])(const QuantizeCall&, const Span&, const Scale&);
  void (*lsq_back[kDtypes])(const QuantizeCall&, const Span&, const Scale&, double* sums);
  void (*moments[kDtypes])(const QuantizeCall&, const Span&, Moments*);
  void (*dls[kDtypes])(const QuantizeCall&, const Span&, const Scale&);
  void (*dls_sums[kDtypes])(const QuantizeCall&, const Span&, const Scale&, double* sums);
  // Nothing is at an end of the range unless `with_ends`.
  void (*dls_back[kDtypes])(const QuantizeCall&, const Span&, const Scale&, const Ends&, bool with_ends);
  void (*rfa)(const QuantizeCall&, const Span&, const Scale&, const Bounds& thresholds);
  // bins: (kCopies, levels + 1, 2), sums of a step and of a step times the way into its segment
  void (*rfa_back)(const QuantizeCall&, const Span&, const Scale&, const Segments&, double* sums, double* bins);
};

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
