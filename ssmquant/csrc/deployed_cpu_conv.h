// Convolutions of a deployed model: dense ones on codes, depthwise ones on values. See deployed_cpu.h.
#pragma once

#include "deployed_cpu_linear.h"

namespace {

struct Conv {
  const ConvCall& call;
  const Grid q;
  const int64_t units, at_once, tiles_all, tall, wide;  // how far the last tap is from the first

  explicit Conv(const ConvCall& call, int64_t sample)
      : call(call),
        q(call.quantizer, sample),
        units(call.weights.units),
        at_once(pairs_at_once(call.weights, call.quantizer.qmax - call.quantizer.qmin)),
        tiles_all((call.outputs + W - 1) / W),
        tall((call.window.height - 1) * call.window.down),
        wide((call.window.width - 1) * call.window.right) {}

  // Whether tap (i, j) of an output pixel, whose first one is (top, left) in the image, lies in that.
  bool inside(int64_t top, int64_t left, int64_t i, int64_t j) const {
    const int64_t v = top + i * call.window.down, u = left + j * call.window.right;
    return v >= 0 && v < call.image_height && u >= 0 && u < call.image_width;
  }

  // Output pixels (y, x .. x + rows - 1).
  template <int rows, int tiles>
  void block(int64_t sample, int64_t y, int64_t x, int64_t tile) const {
    I total[rows][tiles] = {};
    float sums[rows] = {};
    for (int64_t i = 0; i < call.window.height; ++i) {
      for (int64_t j = 0; j < call.window.width; ++j) {
        const int64_t at = sample * call.x.batch + (y * call.step_down + i * call.window.down) * call.x.row +
                           x * call.step_right + j * call.window.right;
        const int64_t tap = i * call.window.width + j;
        const char* w = static_cast<const char*>(call.weights.codes) + (tap * tiles_all + tile) * units * kUnitBytes;
        multiply<rows, tiles>(call.x.data + at * call.x.padded, call.step_right * call.x.padded, w, units, at_once, total);
        for (int r = 0; r < rows; ++r) sums[r] += sum_of(call.x.sums[at + r * call.step_right]);
      }
    }
    const float offset = q.qmin * q.scale - q.shift;
    const int64_t top = y * call.step_down - call.above;
    const bool rows_inside = top >= 0 && top + tall < call.image_height;
    for (int t = 0; t < tiles; ++t) {
      const int64_t at = (tile + t) * W;
      const V scale = load(call.weights.scale + at) * q.scale, shift = load(call.weights.shift + at) * q.scale;
      const V bias = call.bias != nullptr ? load(call.bias + at) : V{};
      V all{};
      for (int64_t tap = 0; tap < call.window.height * call.window.width; ++tap) {
        all = all + load(call.weights.total + tap * tiles_all * W + at);
      }
      for (int r = 0; r < rows; ++r) {
        V weights = all;
        const int64_t left = (x + r) * call.step_right - call.before;
        if (!rows_inside || left < 0 || left + wide >= call.image_width) {
          weights = V{};
          for (int64_t tap = 0; tap < call.window.height * call.window.width; ++tap) {
            if (inside(top, left, tap / call.window.width, tap % call.window.width)) {
              weights = weights + load(call.weights.total + tap * tiles_all * W + at);
            }
          }
        }
        const V value = floats(total[r][t]) * scale - shift * sums[r] + (weights * offset + bias);
        float* to = call.y + ((sample * call.height + y) * call.width + x + r) * call.outputs + at;
        store_some(to, value, call.outputs - at);
      }
    }
  }
};

void conv(const ConvCall& call, int64_t sample, int64_t y) {
  const Conv c(call, sample);
  for_tiles(call.outputs, [&](auto tiles, int64_t tile) {
    for_rows(call.width, [&](auto rows, int64_t x) {
      c.block<decltype(rows)::value, decltype(tiles)::value>(sample, y, x, tile);
    });
  });
}

// ---- depthwise -----------------------------------------------------------------------------------------------------

// A block of pixels with what its windows reach beyond it, as values: (rows, columns, W).
struct Block {
  static constexpr int64_t columns = kBlockWidth + kMostSpan;
  alignas(64) float values[(kBlockHeight + kMostSpan) * columns * W];
};

// `taps`: known beforehand, or 0.
template <int taps>
void convolve(const DepthwiseCall& call, const Block& block, int64_t rows, int64_t columns, int64_t channel, float* y) {
  const int64_t left = call.channels - channel, padded = (call.channels + W - 1) / W * W;
  const int64_t all = call.window.height * call.window.width;
  constexpr int kMostTaps = (kMostSpan + 1) * (kMostSpan + 1);
  V weight[taps ? taps : kMostTaps];
  int64_t at[taps ? taps : kMostTaps];
  for (int64_t k = 0; k < (taps ? taps : all); ++k) {
    weight[k] = load(call.weights + k * padded + channel);
    at[k] = (k / call.window.width * call.window.down * Block::columns + k % call.window.width * call.window.right) * W;
  }
  const V bias = load(call.bias + channel);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const float* from = block.values + (r * Block::columns + c) * W;
      V even = bias, odd{};
      if constexpr (taps > 0) {
#pragma GCC unroll 16
        for (int k = 0; k + 1 < taps; k += 2) {
          even = even + load(from + at[k]) * weight[k];
          odd = odd + load(from + at[k + 1]) * weight[k + 1];
        }
        if constexpr (taps % 2) even = even + load(from + at[taps - 1]) * weight[taps - 1];
      } else {
        for (int64_t k = 0; k < all; ++k) even = even + load(from + at[k]) * weight[k];
      }
      V sum = even + odd;
      activated<1>(call.act, &sum);
      store_some(y + (r * call.width + c) * call.channels, sum, left);
    }
  }
}

void depthwise(const DepthwiseCall& call, int64_t sample, int64_t y, int64_t x, int64_t tile) {
  const Grid q(call.quantizer, sample);
  const int64_t channel = tile * W, left = call.channels - channel;
  const int64_t above = (call.window.height - 1) * call.window.down / 2;
  const int64_t before = (call.window.width - 1) * call.window.right / 2;
  const int64_t rows = call.height - y < kBlockHeight ? call.height - y : kBlockHeight;
  const int64_t columns = call.width - x < kBlockWidth ? call.width - x : kBlockWidth;
  const float* base = call.x.data + sample * call.x.batch + channel * call.x.column;
  Block block;
  for (int64_t r = 0; r < rows + 2 * above; ++r) {
    const int64_t v = y + r - above;
    float* to = block.values + r * Block::columns * W;
    const float* from = base + v * call.x.row;
    if (v < 0 || v >= call.height) {
      std::memset(to, 0, size_t((columns + 2 * before) * W) * sizeof(float));
      continue;
    }
    for (int64_t c = 0; c < columns + 2 * before;) {
      const int64_t u = x + c - before;
      if (u < 0 || u >= call.width) {
        store(to + c++ * W, V{});
      } else if (call.x.column == 1) {
        store(to + c++ * W, q.value_of_level(q.level(load_some(from + u * call.x.group, left))));
      } else {
        const int64_t most = columns + 2 * before - c, there = call.width - u;
        const int64_t n = most < there ? (most < W ? most : W) : (there < W ? there : W);
        V values[W] = {};
        for (int64_t i = 0; i < W && i < left; ++i) {
          const float* row = from + u * call.x.group + i * call.x.column;
          if (call.x.group == 1) {
            values[i] = load_some(row, n);
          } else {
            for (int64_t j = 0; j < n; ++j) values[i][j] = row[j * call.x.group];
          }
        }
        transpose_rows<float>(values);
        for (int64_t j = 0; j < n; ++j) store(to + (c + j) * W, q.value_of_level(q.level(values[j])));
        c += n;
      }
    }
  }
  float* to = call.y + ((sample * call.height + y) * call.width + x) * call.channels + channel;
  if (call.window.height * call.window.width == 9) return convolve<9>(call, block, rows, columns, channel, to);
  convolve<0>(call, block, rows, columns, channel, to);
}

}  // namespace
