// The selective scan of a deployed model: one direction of one tile of channels. See deployed_cpu.h.
#pragma once

#include <type_traits>

#include "deployed_cpu_pieces.h"

namespace {

// Step sizes before bias and softplus, of the channels of a tile in one direction.
struct Delta {
  const ScanCall& call;
  const Weight* weights;
  V scale, shift, total;
  const uint8_t* codes;  // of the sample
  const int32_t* sums;
  int64_t direction;
  bool shifted;

  Delta(const ScanCall& call, int64_t direction, int64_t sample, int64_t tile) : call(call), direction(direction) {
    const int64_t tiles = (call.channels + W - 1) / W, units = call.weights.units;
    const int64_t at = direction * tiles + tile, rows = sample * call.rank.batch;
    weights = static_cast<const Weight*>(call.weights.codes) + at * units * kWeights;
    const Grid q(call.of_rank, sample);
    scale = load(call.weights.scale + at * W) * q.scale;
    shift = load(call.weights.shift + at * W) * q.scale;
    total = load(call.weights.total + at * W) * (q.qmin * q.scale - q.shift);
    codes = call.rank.data + rows * call.rank.padded;
    sums = call.rank.sums + rows;
    shifted = false;
    for (int i = 0; i < W; ++i) shifted |= shift[i] != 0;
  }

  SSMQUANT_INLINE V at(int64_t pixel) const {
    const int64_t row = pixel * call.directions + direction;
    const uint8_t* from = codes + row * call.rank.padded;
    I product{};
    for (int64_t k = 0; k < call.weights.units; ++k) {
      product = dot(product, unit(from + k * kUnit), weights + k * kWeights);
    }
    V raw = floats(product) * scale + total;
    if (shifted) raw = raw - shift * float(sums[row]);
    return sums[row] == kNotANumber ? raw + NAN : raw;
  }
};

// What a state decays by in a step: its own exponential, or the one of the state before it times a power of another.
struct Decay {
  int rate;    // of its own exponential, or -1
  int factor;  // else: which power
};

constexpr int kPowers = 4, kMostStates = 16;  // of a block

// A block of states whose decays are the same for all channels.
struct Ladder {
  int rates = 0;
  float rate[kMostStates];  // over ln 2
  int step = -1;            // the rate whose powers are factors
  int powers = 0;
  Decay of[kMostStates];

  // `a`: of the states of a block.
  Ladder(const float* a, int states) {
    float gap = 0;  // the smallest one
    for (int n = 1; n < states; ++n) {
      const float d = a[n] - a[n - 1];
      if (d < 0 && (gap == 0 || d > gap)) gap = d;
    }
    for (int n = 0; n < states; ++n) {
      of[n] = {-1, 0};
      if (n > 0 && gap < 0) {
        const float times = (a[n] - a[n - 1]) / gap, whole = std::nearbyint(times);
        // What a rate is off by is multiplied by the sum of step sizes over some time constants of the state.
        if (whole >= 1 && whole <= kPowers && std::fabs(times - whole) * -gap <= 1e-5f * -a[n]) {
          of[n].factor = int(whole);
          powers = of[n].factor > powers ? of[n].factor : powers;
          continue;
        }
      }
      of[n].rate = rates;
      rate[rates++] = a[n] * float(kLog2e);
    }
    if (powers > 0) {
      step = rates;
      rate[rates++] = gap * float(kLog2e);
    }
  }
};

// Some steps of a tile, (kSteps, W) each.
struct Piece {
  float dt[kSteps * W], x[kSteps * W], y[kSteps * W];
  float decays[kMostStates + 1][kSteps * W];  // exponentials of the rates of a ladder
  float b[kSteps * kMostStates], c[kSteps * kMostStates];
  int32_t pixel[kSteps];
};

// h = decay * h + x * b, y += h * c over the steps of a piece, for a block of states. `rate`: (states, W), for a
// ladder unused.
template <int states, bool ladder>
void advance(Piece& p, int steps, const Ladder& plan, const float* rate, float* h) {
  V state[states];
#pragma GCC unroll 16
  for (int n = 0; n < states; ++n) state[n] = load(h + n * W);
  float powers[(kPowers + 1) * W];
  for (int t = 0; t < steps; ++t) {
    const V step = load(p.dt + t * W), x = load(p.x + t * W);
    const float *const b = p.b + t * kMostStates, *const c = p.c + t * kMostStates;
    V y = load(p.y + t * W), decay{};
    if constexpr (ladder) {
      if (plan.step >= 0) {
        const V one = load(p.decays[plan.step] + t * W);
        V power = one;
        store(powers + W, power);
        for (int k = 2; k <= plan.powers; ++k) {
          power = power * one;
          store(powers + k * W, power);
        }
      }
#pragma GCC unroll 16
      for (int n = 0; n < states; ++n) {
        const Decay d = plan.of[n];
        decay = d.rate >= 0 ? load(p.decays[d.rate] + t * W) : decay * load(powers + d.factor * W);
        state[n] = decay * state[n] + x * b[n];
        y = y + state[n] * c[n];
      }
    } else {
      constexpr int some = states % 4 == 0 ? 4 : states % 2 == 0 ? 2 : 1;
#pragma GCC unroll 16
      for (int n = 0; n < states; n += some) {
        V decays[some];
#pragma GCC unroll 4
        for (int j = 0; j < some; ++j) decays[j] = step * load(rate + (n + j) * W);
        exp2<some>(decays, 0.0f);
#pragma GCC unroll 4
        for (int j = 0; j < some; ++j) {
          state[n + j] = decays[j] * state[n + j] + x * b[n + j];
          y = y + state[n + j] * c[n + j];
        }
      }
    }
    store(p.y + t * W, y);
  }
#pragma GCC unroll 16
  for (int n = 0; n < states; ++n) store(h + n * W, state[n]);
}

template <int states>
void advance(Piece& p, int steps, bool shared, const Ladder& plan, const float* rate, float* h) {
  shared ? advance<states, true>(p, steps, plan, rate, h) : advance<states, false>(p, steps, plan, rate, h);
}

inline int block_of(int64_t states) {
#if defined(__AVX512F__)
  return states >= 16 ? 16 : states >= 10 ? 10 : states >= 8 ? 8 : states >= 4 ? 4 : states >= 2 ? 2 : 1;
#else
  return states >= 8 ? 8 : states >= 4 ? 4 : states >= 2 ? 2 : 1;
#endif
}

// Codes of some states of each pixel as values, (kSteps, kMostStates).
inline void read_states(const Codes& codes, const Grid& q, int64_t row, int64_t rows_apart, const int32_t* pixel,
                        int steps, int64_t first, int count, float* to) {
  for (int t = 0; t < steps; ++t) {
    const uint8_t* from = codes.data + (row + pixel[t] * rows_apart) * codes.padded + first;
    for (int i = 0; i < count; i += W) store(to + t * kMostStates + i, q.value(load_codes(from + i)));
  }
}

void scan(const ScanCall& call, int64_t direction, int64_t sample, int64_t tile) {
  const FlushDenormals flush;
  const int64_t L = call.pixels, N = call.states, K = call.directions;
  const int64_t channel = tile * W, left = call.channels - channel;
  const int32_t* order = call.order + direction * L;
  const Delta delta(call, direction, sample, tile);
  const Grid of_u(call.of_u, sample), of_b(call.of_b, sample), of_c(call.of_c, sample);
  const bool quantized = call.of_delta.scale != nullptr;
  const Grid of_delta(quantized ? call.of_delta : call.of_rank, sample);
  const auto mine = [&](const float* x) {
    return x ? load_some(x + direction * call.channels + channel, left) : V{};
  };
  const V bias = mine(call.bias), skip = mine(call.skip);
  const uint8_t* u = call.u.data + sample * L * call.u.padded + channel;
  float* y = call.y + sample * L * call.channels + channel;

  // The same for all channels?
  const float* a = call.a + (direction * call.channels + channel) * N;
  bool shared = N > 1;
  for (int64_t i = 1; i < (left < W ? left : W) && shared; ++i) {
    for (int64_t n = 0; n < N; ++n) shared &= a[i * N + n] == a[n];
  }
  constexpr int64_t kMost = 256;
  float h[kMost * W] = {}, rates[kMost * W];
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t i = 0; i < W; ++i) rates[n * W + i] = i < left ? a[i * N + n] * float(kLog2e) : 0.0f;
  }

  alignas(64) Piece p;
  for (int64_t first = 0; first < L; first += kSteps) {
    const int steps = int(L - first < kSteps ? L - first : kSteps);
    std::memcpy(p.pixel, order + first, size_t(steps) * sizeof(int32_t));
    for (int64_t t = first + kSteps; t < first + 2 * kSteps && t < L; ++t) {  // of the next piece
      __builtin_prefetch(u + order[t] * call.u.padded);
      __builtin_prefetch(y + order[t] * call.channels, 1);
      __builtin_prefetch(call.b.data + ((sample * L + order[t]) * K + direction) * call.b.padded);
      __builtin_prefetch(call.c.data + ((sample * L + order[t]) * K + direction) * call.c.padded);
      __builtin_prefetch(delta.codes + (order[t] * K + direction) * call.rank.padded);
    }
    for (int t = 0; t < steps; ++t) {
      V step = delta.at(p.pixel[t]);
      if (quantized) step = of_delta.value_of_level(of_delta.level(step));
      store(p.dt + t * W, step + bias);
    }
    for (int t = steps; t & 1; ++t) store(p.dt + t * W, V{});
    if (call.softplus) {
      for (int t = 0; t < steps; t += 2) {
        V pair[2] = {load(p.dt + t * W), load(p.dt + (t + 1) * W)};
        softplus<false, 2>(pair, nullptr);
        store(p.dt + t * W, pair[0]);
        store(p.dt + (t + 1) * W, pair[1]);
      }
    }
    for (int t = 0; t < steps; ++t) {
      const V value = of_u.value(load_codes(u + p.pixel[t] * call.u.padded));
      store(p.x + t * W, load(p.dt + t * W) * value);
      store(p.y + t * W, skip * value);
    }
    const int64_t row = sample * L * K + direction;
    for (int64_t n = 0; n < N;) {
      const int block = block_of(N - n);
      read_states(call.b, of_b, row, K, p.pixel, steps, n, block, p.b);
      read_states(call.c, of_c, row, K, p.pixel, steps, n, block, p.c);
      const Ladder plan(a + n, block);
      if (shared) {
        for (int k = 0; k < plan.rates; ++k) {
          for (int t = 0; t < steps; t += 2) {
            V pair[2] = {load(p.dt + t * W) * plan.rate[k], load(p.dt + (t + 1) * W) * plan.rate[k]};
            exp2<2>(pair, 0.0f);
            store(p.decays[k] + t * W, pair[0]);
            store(p.decays[k] + (t + 1) * W, pair[1]);
          }
        }
      }
      const float* rate = rates + n * W;
      float* state = h + n * W;
      switch (block) {
#if defined(__AVX512F__)
        case 16: advance<16>(p, steps, shared, plan, rate, state); break;
        case 10: advance<10>(p, steps, shared, plan, rate, state); break;
#endif
        case 8: advance<8>(p, steps, shared, plan, rate, state); break;
        case 4: advance<4>(p, steps, shared, plan, rate, state); break;
        case 2: advance<2>(p, steps, shared, plan, rate, state); break;
        default: advance<1>(p, steps, shared, plan, rate, state);
      }
      n += block;
    }
    for (int t = 0; t < steps; ++t) {
      float* to = y + p.pixel[t] * call.channels;
      const V value = load(p.y + t * W);
      store_some(to, direction == 0 ? value : load_some(to, left) + value, left);
    }
  }
}

void delta_moments(const ScanCall& call, const Part& part, double* moments) {
  no_moments(moments);
  const int64_t tiles = (call.channels + W - 1) / W;
  float values[kRows * W];
  for (int64_t k = 0; k < call.directions; ++k) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Delta delta(call, k, part.sample, tile);
      const int64_t lanes = call.channels - tile * W < W ? call.channels - tile * W : W;
      for (int64_t i = 0; i < part.count; ++i) store_some(values + i * lanes, delta.at(part.first + i), lanes);
      add_moments(values, part.count * lanes, moments);
    }
  }
}

}  // namespace
