// Tasks of the CPU kernels of deployed models, for one instruction set. SSMQUANT_PATH is its name; see deployed_cpu.h.

#include "deployed_cpu_conv.h"
#include "deployed_cpu_linear.h"
#include "deployed_cpu_pieces.h"
#include "deployed_cpu_scan.h"

namespace {

// A row of codes, whose sum is that of the lanes of `sum`.
SSMQUANT_INLINE void finish(const Codes& codes, int64_t at, int64_t written, V sum) {
  uint8_t* row = codes.data + at * codes.padded;
  for (int64_t c = written; c < codes.padded; ++c) row[c] = 0;
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
    if (call.x.column == 1) {
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
  const bool by_column = call.x.column != 1;
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

void moments(const MomentsCall& call, const Part& part, double* to) {
  no_moments(to);
  constexpr int64_t kSome = 2048;
  float values[kSome];
  int64_t count = 0;
  const auto add = [&](const float* x, int64_t stride, int64_t n) {
    for (int64_t i = 0; i < n;) {
      const int64_t some = n - i < kSome - count ? n - i : kSome - count;
      if (stride == 1) {
        std::memcpy(values + count, x + i, size_t(some) * sizeof(float));
      } else {
        for (int64_t j = 0; j < some; ++j) values[count + j] = x[(i + j) * stride];
      }
      count += some, i += some;
      if (count == kSome) {
        add_moments(values, count, to);
        count = 0;
      }
    }
  };
  const float* base = call.x.data + part.sample * call.x.batch + part.first * call.x.row;
  if (call.x.column != 1 && call.x.row == 1) {
    for (int64_t g = 0; g < call.groups; ++g) {
      for (int64_t c = 0; c < call.columns; ++c) add(base + g * call.x.group + c * call.x.column, 1, part.count);
    }
  } else {
    for (int64_t r = 0; r < part.count; ++r) {
      for (int64_t g = 0; g < call.groups; ++g) {
        add(base + r * call.x.row + g * call.x.group, call.x.column, call.columns);
      }
    }
  }
  add_moments(values, count, to);
}

void gate(const GateCall& call, const Part& part, double* to) {
  no_moments(to);
  float* const out = call.y + (part.sample * call.rows + part.first) * call.columns;
  for (int64_t r = 0; r < part.count; ++r) {
    const float* x = call.x.data + part.sample * call.x.batch + (part.first + r) * call.x.row;
    const float* z = call.z.data + part.sample * call.z.batch + (part.first + r) * call.z.row;
    const Normal normal(call.norm, x, call.columns);
    for (int64_t c = 0; c < call.columns; c += W) {
      const int64_t some = call.columns - c;
      const V y = normal.at(load_some(x + c, some), c, some) * silu(load_some(z + c, some));
      store_some(out + r * call.columns + c, y, some);
    }
  }
  if (call.moments != nullptr) add_moments(out, part.count * call.columns, to);
}

}  // namespace

extern const DeployedPath SSMQUANT_JOIN(ssmquant_deployed_, SSMQUANT_PATH);
const DeployedPath SSMQUANT_JOIN(ssmquant_deployed_, SSMQUANT_PATH) = {
    SSMQUANT_TEXT(SSMQUANT_PATH), W, kUnit, encode, moments, gate, linear, conv, depthwise, delta_moments, scan,
};
