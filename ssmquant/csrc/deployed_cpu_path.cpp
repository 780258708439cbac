// Tasks of the CPU kernels of deployed models, for one instruction set. SSMQUANT_PATH is its name; see deployed_cpu.h.

#include "deployed_cpu_pieces.h"
#include "deployed_cpu_scan.h"

namespace {

// Rows from `first` on, W of them, as they are in memory: next to each other in each column.
void encode_columns(const EncodeCall& call, const float* x, const Grid& q, int64_t rows, uint8_t* codes, V* sums,
                    bool* wrong) {
  for (int64_t c = 0; c < call.columns; c += W) {
    V values[W];
    for (int64_t i = 0; i < W; ++i) {
      values[i] = c + i < call.columns ? load_some(x + (c + i) * call.x.column, rows) : V{};
    }
    transpose_rows<float>(values);
    const int64_t some = call.columns - c < W ? call.columns - c : W;
    for (int64_t r = 0; r < rows; ++r) {
      V index = q.index(values[r]);
      for (int64_t i = 0; i < some; ++i) wrong[r] |= index[i] != index[i];
      for (int64_t i = some; i < W; ++i) index[i] = 0;
      store_codes(codes + r * call.codes.padded + c, index);
      sums[r] = sums[r] + index;
    }
  }
}

void encode(const EncodeCall& call, const Part& part) {
  const Grid q(call.quantizer, part.sample);
  const int64_t padded = call.codes.padded;
  const auto finish = [&](int64_t at, V sum, bool wrong) {
    if (call.codes.sums == nullptr) return;
    float total = 0;
    for (int i = 0; i < W; ++i) total += sum[i];
    call.codes.sums[at] = wrong ? kNotANumber : int32_t(total);
  };
  for (int64_t g = 0; g < call.groups; ++g) {
    const float* base = call.x.data + part.sample * call.x.batch + g * call.x.group;
    const int64_t to = part.sample * call.rows * call.groups + g;
    if (call.x.row == 1 && call.x.column != 1 && call.groups == 1) {
      for (int64_t r = part.first; r < part.first + part.count; r += W) {
        const int64_t rows = part.first + part.count - r < W ? part.first + part.count - r : W;
        V sums[W] = {};
        bool wrong[W] = {};
        uint8_t* codes = call.codes.data + (to + r) * padded;
        encode_columns(call, base + r, q, rows, codes, sums, wrong);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t c = (call.columns + W - 1) / W * W; c < padded; ++c) codes[i * padded + c] = 0;
          finish(to + r + i, sums[i], wrong[i]);
        }
      }
      continue;
    }
    for (int64_t r = part.first; r < part.first + part.count; ++r) {
      const float* x = base + r * call.x.row;
      uint8_t* codes = call.codes.data + (to + r * call.groups) * padded;
      V sum{};
      I wrong{};
      int64_t c = 0;
      for (; c < call.columns; c += W) {
        const int64_t some = call.columns - c;
        V value{};
        if (call.x.column == 1) {
          value = load_some(x + c, some);
        } else {
          for (int i = 0; i < W && i < some; ++i) value[i] = x[(c + i) * call.x.column];
        }
        V index = q.index(value);
        wrong |= index != index;
        for (int64_t i = some; i < W; ++i) index[i] = 0;
        store_codes(codes + c, index);
        sum = sum + index;
      }
      for (; c < padded; ++c) codes[c] = 0;
      bool any = false;
      for (int i = 0; i < W; ++i) any |= wrong[i] != 0;
      finish(to + r * call.groups, sum, any);
    }
  }
}

void moments(const MomentsCall& call, const Part& part, double* to) {
  no_moments(to);
  constexpr int64_t kSome = 2048;
  float values[kSome];
  int64_t count = 0;
  for (int64_t r = part.first; r < part.first + part.count; ++r) {
    for (int64_t g = 0; g < call.groups; ++g) {
      const float* x = call.x.data + part.sample * call.x.batch + r * call.x.row + g * call.x.group;
      for (int64_t c = 0; c < call.columns; ++c) {
        values[count++] = x[c * call.x.column];
        if (count == kSome) {
          add_moments(values, count, to);
          count = 0;
        }
      }
    }
  }
  add_moments(values, count, to);
}

// ---- linear --------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kMostRows = 6;
#else
constexpr int kMostRows = 2;
#endif
constexpr int kMostTiles = 4;

struct Linear {
  const LinearCall& call;
  const Grid q;
  int64_t units;

  // `rows` rows of codes and `tiles` tiles of outputs.
  template <int rows, int tiles>
  void block(int64_t row, int64_t tile) const {
    const uint8_t* x = call.x.data + row * call.x.padded;
    const Weight* w = static_cast<const Weight*>(call.weights.codes) + tile * units * kWeights;
    I total[rows][tiles] = {};
    for (int64_t k = 0; k < units; ++k) {
      I codes[rows];
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) codes[r] = unit(x + r * call.x.padded + k * kUnit);
#pragma GCC unroll 8
      for (int t = 0; t < tiles; ++t) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) total[r][t] = dot(total[r][t], codes[r], w + (t * units + k) * kWeights);
      }
    }
    const float offset = q.qmin * q.scale - q.shift;  // the value of code 0
#pragma GCC unroll 8
    for (int t = 0; t < tiles; ++t) {
      const int64_t at = (tile + t) * W;
      const V scale = load(call.weights.scale + at) * q.scale, shift = load(call.weights.shift + at) * q.scale;
      V constant = load(call.weights.total + at) * offset;
      if (call.bias != nullptr) constant = constant + load(call.bias + at);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const int32_t sum = call.x.sums[row + r];
        const V y = floats(total[r][t]) * scale - shift * float(sum) + constant;
        store_some(call.y + (row + r) * call.outputs + at, sum == kNotANumber ? y + NAN : y, call.outputs - at);
      }
    }
  }

  template <int tiles>
  void rows(const Part& part, int64_t tile) const {
    int64_t row = part.sample * call.rows + part.first;
    const int64_t end = row + part.count;
    for (; row + kMostRows <= end; row += kMostRows) block<kMostRows, tiles>(row, tile);
    for (; row < end; ++row) block<1, tiles>(row, tile);
  }
};

void linear(const LinearCall& call, const Part& part) {
  const Linear l{call, Grid(call.quantizer, part.sample), call.x.padded / kUnit};
  const int64_t tiles = (call.outputs + W - 1) / W;
  int64_t tile = 0;
  for (; tile + kMostTiles <= tiles; tile += kMostTiles) l.rows<kMostTiles>(part, tile);
  for (; tile + 2 <= tiles; tile += 2) l.rows<2>(part, tile);
  for (; tile < tiles; ++tile) l.rows<1>(part, tile);
}

}  // namespace

extern const DeployedPath SSMQUANT_JOIN(ssmquant_deployed_, SSMQUANT_PATH);
const DeployedPath SSMQUANT_JOIN(ssmquant_deployed_, SSMQUANT_PATH) = {
    SSMQUANT_TEXT(SSMQUANT_PATH), W, kUnit, encode, moments, linear, delta_moments, scan,
};
