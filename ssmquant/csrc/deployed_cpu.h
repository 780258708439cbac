// What the two halves of the CPU kernels of deployed models share.
//
// deployed_cpu.cpp is the library's interface: it cuts calls into tasks and starts threads. deployed_cpu_path.cpp
// computes tasks; it is compiled once for each instruction set ("path"). A task owns what it writes, or waits for the
// task before it in a fixed order, hence no result depends on the number of threads.
//
// Values are float32, codes uint8 (0 is qmin). Matrices of codes have rows of `padded` bytes, a multiple of kPad, and
// kSlack bytes behind them that may be read.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#pragma GCC visibility push(hidden)
#endif

constexpr int64_t kPad = 16, kSlack = 64;
constexpr int64_t kRows = 64;             // rows of one task
constexpr int64_t kSteps = 32;            // steps of a scan that are computed at once
constexpr int32_t kNotANumber = INT32_MIN;  // the sum of a row of codes that had a NaN

// How values become codes, round(clip((x + shift) / scale, qmin, qmax)) - qmin, and codes become values,
// clip((code + qmin) * scale - shift, low, high): one of each or, `by_sample`, one for every sample.
struct Quantizer {
  const float *scale, *shift, *low, *high;  // low and high may be null
  int64_t by_sample, qmin, qmax;
};

// Mirrored by ssmquant/ops/deployed/calls.py. Strides count elements. All members have eight bytes.
struct Values {  // (batch, rows, groups, columns)
  const float* data;
  int64_t batch, row, group, column;
};

struct Codes {  // (batch, rows, groups, padded)
  uint8_t* data;
  int32_t* sums;  // of each of them, (batch, rows, groups)
  int64_t padded;
  int64_t batch, row, group;  // strides, in rows of `padded` codes
};

// A norm over the columns of a row: (x - mean) / sqrt(variance + eps) * weight + bias, or with 0 for the mean (RMS norm);
// or factors alone: x * weight.
enum NormKind : int64_t { kNoNorm, kLayerNorm, kRmsNorm, kFactors };
struct Norm {
  int64_t kind;
  const float *weight, *bias;  // (columns), or null
  double eps;
};

// What becomes of results before they are written.
enum Activation : int64_t { kNoActivation, kSilu, kGelu };

struct EncodeCall {
  int64_t path, threads;
  int64_t batch, rows, groups, columns;
  Values x;
  Norm norm;  // comes first
  Quantizer quantizer;
  Codes codes;
};

// norm(x) * silu(z), and its moments as of MomentsCall.
struct GateCall {
  int64_t path, threads;
  int64_t batch, rows, columns;
  Values x, z;                   // of one group, next to each other in a row
  Norm norm;
  float* y;  // (batch, rows, columns)
  double* workspace;
  float* moments;  // or null
};


// Mean, unbiased standard deviation, minimum and maximum of each sample.
struct MomentsCall {
  int64_t path, threads;
  int64_t batch, rows, groups, columns;
  Values x;
  double* workspace;  // kMoments for each task
  float* moments;     // (batch, 4)
};

// The ranges of DLS from moments of samples of `count` elements, each of which stands for `copies`; see quantizers/dls.py.
struct RangesCall {
  const float* moments;  // (samples, 4)
  int64_t samples, count, copies;
  const float *w, *v;  // 4 each
  int64_t levels;
  double eps;
  float* ranges;  // (4, samples): scale, shift, low, high
};

constexpr int64_t kMoments = 5;  // count, mean, sum of squared deviations, minimum, maximum

// A matrix (outputs, inputs) of signed codes as `pack` of cpu.py lays it out for the path: (tiles, units, lanes, unit),
// with what makes values of them, each (tiles * lanes): value = scale * code - shift; total: sum of a row's values.
struct Weights {
  const void* codes;
  const float *scale, *shift, *total;
  int64_t units;
  int64_t narrow;  // 0; or the largest magnitude of a code, if they are int8 where the path's own form is int16
};

struct LinearCall {
  int64_t path, threads;
  int64_t batch, rows, inputs, outputs;
  Codes x;
  // Of x. With low and high products are of values, not of codes, and weights are laid out as (tiles, inputs, lanes).
  Quantizer quantizer;
  Weights weights;
  const float* bias;  // (tiles * lanes), or null
  int64_t act;        // an Activation
  float* y;           // (batch, rows, outputs)
};

// linear of the codes of norm(x) or, with a z, of norm(x) * silu(z): each task has its rows' values and codes to itself.
struct ProjectCall {
  int64_t path, threads;
  int64_t batch, rows, inputs, outputs;
  Values x, z;  // of one group; with a norm or a z, next to each other in a row. z.data: or null
  Norm norm;
  Quantizer quantizer;  // without low and high; with a clip its qmin is 0, and scale and shift are not read
  const float* clip;    // (2), or null: each row has a range of its own, see quantizers/token.py
  double eps;           // the smallest step of these
  Weights weights;
  const float* bias;  // (tiles * lanes), or null
  int64_t act;        // an Activation, of the product with its bias
  Values residual;    // is added to that, times gain; data: or null. Next to each other in a row
  const float* gain;  // (outputs), or null for 1
  void* workspace;    // ssmquant_deployed_project_workspace bytes
  float* y;           // (batch, rows, outputs)
};

// x * gain + v * scale, of rows whose columns are next to each other.
struct BlendCall {
  int64_t path, threads;
  int64_t batch, rows, columns;
  Values x, v;
  const float* gain;   // (columns), or null for 1
  const float* scale;  // (batch, columns)
  float* y;            // (batch, rows, columns)
};

struct Window {  // of a convolution
  int64_t height, width;  // taps
  int64_t down, right;    // pixels between taps
};

// A convolution of codes in an image with a border: (batch, image_height + 2 * above, image_width + 2 * before, padded),
// codes and sums of the border 0. The sums of codes leave the border out, which is no code but zero.
struct ConvCall {
  int64_t path, threads;
  int64_t batch, height, width, outputs;
  int64_t image_height, image_width, above, before;
  int64_t step_down, step_right;  // from one output pixel to the next
  Window window;
  Codes x;
  Quantizer quantizer;  // without low and high
  Weights weights;      // of each tap: (taps, tiles, ...)
  const float* bias;    // (tiles * lanes), or null
  float* y;             // (batch, height, width, outputs)
};

// A depthwise convolution, on values that are quantized while they are read, and an activation.
struct DepthwiseCall {
  int64_t path, threads;
  int64_t batch, height, width, channels;
  Window window;  // spans at most kMostSpan + 1 pixels
  Values x;       // (batch, height, width, channels)
  Quantizer quantizer;
  const float *weights, *bias;  // (taps, tiles * lanes), (tiles * lanes)
  int64_t act;                  // an Activation
  float* y;  // (batch, height, width, channels)
};

constexpr int64_t kMostStates = 256;
constexpr int64_t kMostTiles = 4;  // of channels, that one task of a scan walks through together
constexpr int64_t kMostSpan = 16, kBlockHeight = 8, kBlockWidth = 64;

// A selective scan over the pixels of an image in several orders, results added up at their pixels:
//   delta = softplus(quantized(rank @ weights) + bias),  h = exp(delta * a) * h + delta * u * b,  y = sum(h * c) + skip * u
struct ScanCall {
  int64_t path, threads;
  int64_t batch, pixels, channels, states, directions;
  Codes u;     // (batch, pixels, channels)
  Codes b, c;  // (batch, pixels, directions, states)
  Codes rank;  // (batch, pixels, directions, ranks), with sums
  Quantizer of_u, of_b, of_c, of_rank;
  Quantizer of_delta;  // scale is null for none
  Weights weights;     // of each direction: (directions, tiles, ...)
  const float* a;      // (directions, channels, states)
  const float *bias, *skip;  // (directions, channels), or null
  int64_t softplus;
  const int32_t* order;  // (directions, pixels)
  int64_t* done;         // (batch, tiles), zeros: directions that are added up
  double* workspace;     // as of MomentsCall
  float* moments;        // of delta before it is quantized
  float* y;              // (batch, pixels, channels)
};

// An image's codes, their projection in each direction to the low rank, B and C, the codes of these, and the scans.
struct CoreCall {
  Values x;        // (batch, pixels, 1, channels)
  Quantizer of_x;  // without low and high, as all of them; scale is null if it is of_u
  Weights projection;                  // (directions * rows, channels)
  int64_t rows;                        // of one direction
  int64_t at_rank, at_b, at_c, ranks;  // where they begin among these, and how large the low rank is
  void* workspace;  // ssmquant_deployed_core_workspace bytes
  ScanCall scan;    // whose codes are made here
};

struct Part {  // of the rows of a sample
  int64_t sample, first, count;
};

// Scratch of one task: values (kRows, columns) and codes with sums (kRows, padded).
struct Scratch {
  int64_t columns, padded;
  constexpr int64_t bytes() const {
    return (kRows * (columns * 4 + padded + 4) + kSlack + 63) / 64 * 64;
  }
  float* values(void* at) const { return static_cast<float*>(at); }
  int32_t* sums(void* at) const { return reinterpret_cast<int32_t*>(values(at) + kRows * columns); }
  uint8_t* codes(void* at) const { return reinterpret_cast<uint8_t*>(sums(at) + kRows); }
};

constexpr int64_t padded(int64_t columns) { return (columns + kPad - 1) / kPad * kPad; }

struct DeployedPath {
  const char* name;
  int64_t lanes, unit;  // codes of a weight's row that are multiplied at once: 4 of int8, 2 of int16
  int64_t narrow;       // of what magnitude codes may be int8 although its own form is int16; 0: none
  void (*encode)(const EncodeCall&, const Part&);
  void (*moments)(const MomentsCall&, const Part&, double* moments);
  void (*gate)(const GateCall&, const Part&, double* moments);
  void (*linear)(const LinearCall&, const Part&);
  void (*blend)(const BlendCall&, const Part&);
  void (*project)(const ProjectCall&, const Part&, void* workspace);
  void (*prepare)(const CoreCall&, const Part&, void* workspace);  // all that a scan needs
  void (*conv)(const ConvCall&, int64_t sample, int64_t y);
  void (*depthwise)(const DepthwiseCall&, int64_t sample, int64_t y, int64_t x, int64_t tile);
  void (*delta_moments)(const ScanCall&, const Part&, double* moments);
  void (*scan)(const ScanCall&, int64_t direction, int64_t sample, int64_t tile, int64_t count);
};

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
