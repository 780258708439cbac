// Values to codes, row by row. See deployed_cpu.h.
#pragma once

#include "deployed_cpu_pieces.h"

namespace {

// A row of codes, whose sum is that of the lanes of `sum`.
SSMQUANT_INLINE void finish(const Codes& codes, int64_t at, int64_t written, V sum) {
  uint8_t* row = codes.data + at * codes.padded;
  for (int64_t c = written; c < codes.padded; c += W) store_codes(row + c, V{});  // a multiple of W is left
  const float total = lane_sum(sum);
  codes.sums[at] = total == total ? int32_t(total) : kNotANumber;
}

// W rows or fewer that are next to each other in each column, `apart` codes from row to row.
void encode_columns(const EncodeCall& call, const float* x, const Grid& q, int64_t rows, int64_t at, int64_t apart) {
  V sums[W] = {};
  int64_t c = 0;
  for (; c < call.columns; c += W) {
    const int64_t some = call.columns - c < W ? call.columns - c : W;
    V values[W];
    for (int64_t i = 0; i < W; ++i) values[i] = i < some ? load_some(x + (c + i) * call.x.column, rows) : V{};
    transpose_rows<float>(values);
    for (int64_t r = 0; r < rows; ++r) {
      const V index = first_of(q.index(values[r]), some);
      store_codes(call.codes.data + (at + r * apart) * call.codes.padded + c, index);
      sums[r] = sums[r] + index;
    }
  }
  for (int64_t r = 0; r < rows; ++r) finish(call.codes, at + r * apart, c, sums[r]);
}

void encode_row(const EncodeCall& call, const float* x, const Grid& q, int64_t at) {
  uint8_t* codes = call.codes.data + at * call.codes.padded;
  const Normal normal(call.norm, x, call.columns);
  V sum{};
  int64_t c = 0;
  for (; c < call.columns; c += W) {
    const int64_t some = call.columns - c;
    V value{};
    if (call.x.column == 1 || call.norm.kind != kNoNorm) {  // the stride of a single column may be any
      value = normal.at(load_some(x + c, some), c, some);
    } else {
      for (int i = 0; i < W && i < some; ++i) value[i] = x[(c + i) * call.x.column];
    }
    const V index = first_of(q.index(value), some);
    store_codes(codes + c, index);
    sum = sum + index;
  }
  finish(call.codes, at, c, sum);
}

void encode(const EncodeCall& call, const Part& part) {
  const Grid q(call.quantizer, part.sample);
  const float* base = call.x.data + part.sample * call.x.batch;
  const int64_t to = part.sample * call.codes.batch, end = part.first + part.count;
  const bool by_column = call.x.column != 1 && call.norm.kind == kNoNorm;
  if (by_column && call.x.row == 1 && call.groups == 1) {
    for (int64_t r = part.first; r < end; r += W) {
      encode_columns(call, base + r, q, end - r < W ? end - r : W, to + r * call.codes.row, call.codes.row);
    }
    return;
  }
  for (int64_t r = part.first; r < end; ++r) {
    const float* x = base + r * call.x.row;
    const int64_t at = to + r * call.codes.row;
    if (by_column && call.x.group == 1) {
      for (int64_t g = 0; g < call.groups; g += W) {
        const int64_t rows = call.groups - g < W ? call.groups - g : W;
        encode_columns(call, x + g, q, rows, at + g * call.codes.group, call.codes.group);
      }
    } else {
      for (int64_t g = 0; g < call.groups; ++g) encode_row(call, x + g * call.x.group, q, at + g * call.codes.group);
    }
  }
}

}  // namespace
