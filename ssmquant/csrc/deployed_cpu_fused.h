// Chains of the other kernels over some rows, whose values and codes stay in a cache. See deployed_cpu.h.
#pragma once

#include "deployed_cpu_encode.h"
#include "deployed_cpu_linear.h"

namespace {

// norm(x) * silu(z) of one row.
SSMQUANT_INLINE void gate_row(const Norm& norm, const float* x, const float* z, int64_t columns, float* y) {
  const Normal normal(norm, x, columns);
  for (int64_t c = 0; c < columns; c += W) {
    const int64_t some = columns - c;
    store_some(y + c, normal.at(load_some(x + c, some), c, some) * silu(load_some(z + c, some)), some);
  }
}

// norm(x) of one row, any stride where there is no norm.
SSMQUANT_INLINE void norm_row(const Norm& norm, const float* x, int64_t stride, int64_t columns, float* y) {
  if (norm.kind == kNoNorm && stride != 1) {
    for (int64_t c = 0; c < columns; ++c) y[c] = x[c * stride];
    return;
  }
  const Normal normal(norm, x, columns);
  for (int64_t c = 0; c < columns; c += W) {
    store_some(y + c, normal.at(load_some(x + c, columns - c), c, columns - c), columns - c);
  }
}

void gate(const GateCall& call, const Part& part, double* to) {
  no_moments(to);
  float* const out = call.y + (part.sample * call.rows + part.first) * call.columns;
  for (int64_t r = 0; r < part.count; ++r) {
    const float* x = call.x.data + part.sample * call.x.batch + (part.first + r) * call.x.row;
    const float* z = call.z.data + part.sample * call.z.batch + (part.first + r) * call.z.row;
    gate_row(call.norm, x, z, call.columns, out + r * call.columns);
  }
  if (call.moments != nullptr) add_moments(out, part.count * call.columns, to);
}

SSMQUANT_INLINE const float* row_of(const Values& x, const Part& part) {
  return x.data + part.sample * x.batch + part.first * x.row;
}

// The codes of some rows, next to each other.
SSMQUANT_INLINE void encode_rows(const Values& x, const Part& part, const Norm& norm, const Quantizer& quantizer,
                                 int64_t columns, const Codes& codes) {
  EncodeCall call{};
  call.groups = 1, call.columns = columns;
  call.x = x, call.x.data = row_of(x, part);
  call.norm = norm, call.quantizer = quantizer;
  call.codes = codes;
  encode(call, {0, 0, part.count});
}

SSMQUANT_INLINE void linear_rows(const Codes& codes, int64_t count, const Quantizer& quantizer, const Weights& weights,
                                 const float* bias, int64_t act, int64_t outputs, float* y) {
  LinearCall call{};
  call.outputs = outputs, call.x = codes, call.quantizer = quantizer, call.weights = weights;
  call.bias = bias, call.act = act, call.y = y;
  Linear{call, Grid(quantizer, 0), 0, count, nullptr, nullptr}.on_codes();
}

// The least and the greatest of some values; of a NaN among them there is no telling.
SSMQUANT_INLINE void extremes(const float* x, int64_t count, float* least, float* most) {
  V low = x[0] - V{}, high = low;
  int64_t c = 0;
  for (; c + W <= count; c += W) {
    const V v = load(x + c);
    low = at_most(low, v), high = at_least(high, v);
  }
  float down = low[0], up = high[0];
  for (int i = 1; i < W; ++i) {
    down = low[i] < down ? low[i] : down;
    up = high[i] > up ? high[i] : up;
  }
  for (; c < count; ++c) {
    down = x[c] < down ? x[c] : down;
    up = x[c] > up ? x[c] : up;
  }
  *least = down, *most = up;
}

// `project` of rows that have ranges of their own.
SSMQUANT_INLINE void project_by_row(const ProjectCall& call, const Part& part, float* values, const Codes& codes,
                                    float* y) {
  float scales[kRows], shifts[kRows];
  const float *x = row_of(call.x, part), *z = call.z.data == nullptr ? nullptr : row_of(call.z, part);
  EncodeCall encoding{};
  encoding.columns = call.inputs, encoding.x.column = 1, encoding.codes = codes;
  for (int64_t r = 0; r < part.count; ++r) {
    if (z != nullptr) {
      gate_row(call.norm, x + r * call.x.row, z + r * call.z.row, call.inputs, values);
    } else {
      norm_row(call.norm, x + r * call.x.row, call.x.column, call.inputs, values);
    }
    float least, most;
    extremes(values, call.inputs, &least, &most);
    const Grid q(least, most, call.clip, float(call.eps), call.quantizer);
    scales[r] = q.scale, shifts[r] = q.shift;
    encode_row(encoding, values, q, r);
  }
  LinearCall product{};
  product.outputs = call.outputs, product.x = codes, product.weights = call.weights;
  product.quantizer.qmax = call.quantizer.qmax;
  product.bias = call.bias, product.act = call.act, product.y = y;
  Linear{product, Grid(), 0, part.count, scales, shifts}.on_codes();
}

void project(const ProjectCall& call, const Part& part, void* workspace) {
  const bool gated = call.z.data != nullptr;
  const Scratch scratch{gated || call.clip != nullptr ? call.inputs : 0, padded(call.inputs)};
  const Codes codes{scratch.codes(workspace), scratch.sums(workspace), scratch.padded, 0, 1, 1};
  float* const y = call.y + (part.sample * call.rows + part.first) * call.outputs;
  if (call.clip != nullptr) {
    project_by_row(call, part, scratch.values(workspace), codes, y);
  } else if (gated) {
    float* const values = scratch.values(workspace);
    const float *x = row_of(call.x, part), *z = row_of(call.z, part);
    for (int64_t r = 0; r < part.count; ++r) {
      gate_row(call.norm, x + r * call.x.row, z + r * call.z.row, call.inputs, values + r * call.inputs);
    }
    encode_rows({values, 0, call.inputs, 0, 1}, {0, 0, part.count}, Norm{}, call.quantizer, call.inputs, codes);
  } else {
    encode_rows(call.x, part, call.norm, call.quantizer, call.inputs, codes);
  }
  if (call.clip == nullptr) {
    linear_rows(codes, part.count, call.quantizer, call.weights, call.bias, call.act, call.outputs, y);
  }
  if (call.residual.data == nullptr) return;
  const float* x = row_of(call.residual, part);
  for (int64_t r = 0; r < part.count; ++r) {
    float* const to = y + r * call.outputs;
    for (int64_t c = 0; c < call.outputs; c += W) {
      const int64_t some = call.outputs - c;
      V value = load_some(x + r * call.residual.row + c, some);
      if (call.gain != nullptr) value = value * load_some(call.gain + c, some);
      store_some(to + c, value + load_some(to + c, some), some);
    }
  }
}

void blend(const BlendCall& call, const Part& part) {
  const float *x = row_of(call.x, part), *v = row_of(call.v, part), *scale = call.scale + part.sample * call.columns;
  float* const y = call.y + (part.sample * call.rows + part.first) * call.columns;
  for (int64_t r = 0; r < part.count; ++r) {
    for (int64_t c = 0; c < call.columns; c += W) {
      const int64_t some = call.columns - c;
      V value = load_some(x + r * call.x.row + c, some);
      if (call.gain != nullptr) value = value * load_some(call.gain + c, some);
      value = value + load_some(v + r * call.v.row + c, some) * load_some(scale + c, some);
      store_some(y + r * call.columns + c, value, some);
    }
  }
}

// Codes of some columns of each direction.
SSMQUANT_INLINE void encode_directions(const CoreCall& call, const Part& part, const float* made, int64_t at,
                                       int64_t columns, const Quantizer& quantizer, const Codes& to) {
  EncodeCall all{};
  all.groups = call.scan.directions, all.columns = columns;
  all.x = {made + at, 0, call.scan.directions * call.rows, call.rows, 1};
  all.quantizer = quantizer;
  all.codes = to;
  const int64_t first = part.sample * to.batch + part.first * to.row;
  all.codes.data += first * to.padded, all.codes.sums += first;
  encode(all, {0, 0, part.count});
}

void prepare(const CoreCall& call, const Part& part, void* workspace) {
  const ScanCall& scan = call.scan;
  const int64_t outputs = scan.directions * call.rows;
  const Scratch scratch{outputs, padded(scan.channels)};
  Codes u = scan.u;
  const int64_t first = part.sample * u.batch + part.first * u.row;
  u.data += first * u.padded, u.sums += first;
  encode_rows(call.x, part, Norm{}, scan.of_u, scan.channels, u);
  const bool same = call.of_x.scale == nullptr;
  const Codes x{scratch.codes(workspace), scratch.sums(workspace), scratch.padded, 0, 1, 1};
  if (!same) encode_rows(call.x, part, Norm{}, call.of_x, scan.channels, x);
  float* const made = scratch.values(workspace);
  linear_rows(same ? u : x, part.count, same ? scan.of_u : call.of_x, call.projection, nullptr, kNoActivation, outputs,
              made);
  encode_directions(call, part, made, call.at_rank, call.ranks, scan.of_rank, scan.rank);
  encode_directions(call, part, made, call.at_b, scan.states, scan.of_b, scan.b);
  encode_directions(call, part, made, call.at_c, scan.states, scan.of_c, scan.c);
}

}  // namespace
