// The selective scan of a deployed model: one direction of one tile of channels. See deployed_cpu.h.
#pragma once

#include <new>

#include "deployed_cpu_pieces.h"

namespace {

// Step sizes before bias and softplus, of the channels of a tile in one direction.
struct Delta {
  const ScanCall& call;
  const Weight* weights;
  V scale, shift, total;
  const uint8_t* codes;  // of the sample, in this direction
  const int32_t* sums;
  bool shifted;

  Delta(const ScanCall& call, int64_t direction, int64_t sample, int64_t tile) : call(call) {
    const int64_t tiles = (call.channels + W - 1) / W, units = call.weights.units;
    const int64_t at = direction * tiles + tile;
    const int64_t rows = sample * call.rank.batch + direction * call.rank.group;
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
    const int64_t row = pixel * call.rank.row;
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

constexpr int kBlock = 16;  // states whose states are in registers at once, at most

// Decays of a block of states: exponentials of step * rate, of all states or of those that the others follow from.
enum class Decays { kLadder, kShared, kOwn };

// A block of states whose decays are the same for all channels, and what exponentials they need.
struct Shared {
  bool ladder;  // evenly spaced: decay n is the first one times the n-th power of another
  int rates;
  float rate[kBlock];  // over ln 2

  // `a`: of the states of the block.
  Shared(const float* a, int states) : ladder(states > 2) {
    const float gap = (a[states - 1] - a[0]) / float(states > 1 ? states - 1 : 1);
    // What a rate is off by is multiplied by the sum of step sizes over some time constants of its state.
    for (int n = 1; n < states; ++n) ladder &= std::fabs(a[0] + float(n) * gap - a[n]) <= 1e-5f * std::fabs(a[n]);
    rates = ladder ? 2 : states;
    for (int n = 0; n < rates; ++n) rate[n] = (ladder && n == 1 ? gap : a[n]) * float(kLog2e);
  }
};

constexpr int kMostUnits = 8;  // of a low rank, that tables are looked up by

// Some steps of a tile, (kSteps, W) each.
struct Piece {
  float dt[kSteps * W], x[kSteps * W], y[kSteps * W];
  float decays[kBlock][kSteps * W];  // exponentials that a block's channels have in common
  float b[kSteps * kMostStates], c[kSteps * kMostStates];  // (kSteps, padded states)
  int32_t pixel[kSteps];
  // The low rank of all tiles: units of codes, and their sums.
  alignas(64) int32_t words[kMostUnits][kSteps];
  alignas(64) float sums[kSteps];
  bool numbers;  // there is no NaN among them
};

// h = decay * h + x * b, y += h * c over the steps of a piece, for a block of states. `rate`: (states, W), where each
// channel has its own.
template <int states, Decays form>
void advance(Piece& p, int steps, const float* b, const float* c, int64_t apart, const float* rate, float* h) {
  // Whose decays are known at once. Those of a ladder are as many as registers are left for, so that chains are short.
  constexpr int most = form == Decays::kLadder && W < 16 ? 2 : 8, some = states < most ? states : most;
  V state[states];
#pragma GCC unroll 16
  for (int n = 0; n < states; ++n) state[n] = load(h + n * W);
  for (int t = 0; t < steps; ++t, b += apart, c += apart) {
    const V step = load(p.dt + t * W), x = load(p.x + t * W);
    V y[2] = {load(p.y + t * W), V{}}, decay[some], further{};
    if constexpr (form == Decays::kLadder) {  // powers by squaring: short chains
      decay[0] = load(p.decays[0] + t * W);
      V power = load(p.decays[1] + t * W);
#pragma GCC unroll 4
      for (int k = 1; k < some; k *= 2) {
#pragma GCC unroll 8
        for (int n = k; n < 2 * k && n < some; ++n) decay[n] = decay[n - k] * power;
        power = power * power;
      }
      further = power;  // of as many states as `some`
    }
#pragma GCC unroll 16
    for (int n = 0; n < states; ++n) {
      if constexpr (form == Decays::kLadder) {
        if (n >= some) decay[n % some] = decay[n % some] * further;
      } else if constexpr (form == Decays::kShared) {
        decay[n % some] = load(p.decays[n] + t * W);
      } else if (n % 4 == 0) {
        constexpr int most = states < 4 ? states : 4;
        V next[most];
#pragma GCC unroll 4
        for (int j = 0; j < most; ++j) next[j] = step * load(rate + (n + j < states ? n + j : n) * W);
        exp2<most>(next, 0.0f);
#pragma GCC unroll 4
        for (int j = 0; j < most; ++j) decay[(n + j) % some] = next[j];
      }
      state[n] = decay[n % some] * state[n] + x * b[n];
      y[n % 2] = y[n % 2] + state[n] * c[n];
    }
    store(p.y + t * W, y[0] + y[1]);
  }
#pragma GCC unroll 16
  for (int n = 0; n < states; ++n) store(h + n * W, state[n]);
}

template <int n>
SSMQUANT_INLINE V power_of(V x) {
  if constexpr (n == 1) return x;
  else if constexpr (n % 2) return x * power_of<n - 1>(x);
  else return power_of<n / 2>(x * x);
}

template <int states>
void advance(Piece& p, int steps, Decays form, const float* b, const float* c, int64_t apart, const float* rate,
             float* h) {
  if (form == Decays::kLadder) return advance<states, Decays::kLadder>(p, steps, b, c, apart, rate, h);
  if (form == Decays::kShared) return advance<states, Decays::kShared>(p, steps, b, c, apart, rate, h);
  advance<states, Decays::kOwn>(p, steps, b, c, apart, rate, h);
}

inline int block_of(int64_t states) {
#if defined(__AVX512F__)
  return states >= 16 ? 16 : states >= 10 ? 10 : states >= 8 ? 8 : states >= 4 ? 4 : states >= 2 ? 2 : 1;
#else
  return states >= 8 ? 8 : states >= 4 ? 4 : states >= 2 ? 2 : 1;
#endif
}

// Step sizes of at most 16 levels as tables: of dt, and of exponentials that decays follow from, for each channel and
// level. Time is in the lanes then, so that one instruction, or three, look up W steps of a channel.
struct Tables {
#if defined(__AVX2__)
  static constexpr int levels = kLevels, most = 2;
  int count = 0;  // of exponentials; there are no tables if it is 0
  float dt[W * levels], decay[most][W * levels];
  float scale[W], shift[W], constant[W];  // of what becomes codes

  // `rate`: (count, W), over ln 2.
  void fill(const Delta& delta, const Grid& q, V bias, bool softplus_, const float* rate, int rates) {
    count = rates;
    for (int i = 0; i < levels; ++i) {
      V step[1] = {q.value(float(i) - V{}) + bias};
      if (softplus_) softplus<false, 1>(step, nullptr);
      for (int c = 0; c < W; ++c) dt[c * levels + i] = step[0][c];
      for (int k = 0; k < rates; ++k) {
        V e[1] = {step[0] * load(rate + k * W)};
        exp2<1>(e, 0.0f);
        for (int c = 0; c < W; ++c) decay[k][c * levels + i] = e[0][c];
      }
    }
    store(scale, delta.scale * q.over);
    store(shift, delta.shift * q.over);
    store(constant, (delta.total + q.shift) * q.over - q.qmin);
  }

  // What `look_up` needs of a piece's low rank, once for all tiles.
  static void gather(const Delta& delta, Piece& p, int steps) {
    const int64_t units = delta.call.weights.units;
    p.numbers = true;
    for (int t = 0; t < steps; ++t) {
      const int64_t row = p.pixel[t] * delta.call.rank.row;
      p.numbers &= delta.sums[row] != kNotANumber;
      p.sums[t] = float(delta.sums[row]);
      const uint8_t* from = delta.codes + row * delta.call.rank.padded;
      for (int64_t k = 0; k < units; ++k) p.words[k][t] = word(from + k * kUnit);
    }
    for (int t = steps; t % W != 0; ++t) {
      p.sums[t] = 0;
      for (int64_t k = 0; k < units; ++k) p.words[k][t] = 0;
    }
  }

  // Of a piece without NaN that was gathered.
  void look_up(const Delta& delta, const Grid& q, Piece& p, int steps) const {
    const int64_t units = delta.call.weights.units;
    const bool few = q.qmax - q.qmin < 8;
    const int32_t* weights = reinterpret_cast<const int32_t*>(delta.weights);
    for (int t = 0; t < steps; t += W) {
      V rows[1 + most][W];
      for (int64_t c = 0; c < W; ++c) {
        I product{};
        for (int64_t k = 0; k < units; ++k) {
          product = dot_words(product, *reinterpret_cast<const I*>(p.words[k] + t), weights[k * W + c]);
        }
        V u = floats(product) * scale[c] + constant[c];
        if (delta.shifted) u = u - load(p.sums + t) * shift[c];
        u = at_most(q.qmax - q.qmin, at_least(0.0f, u));
        const Levels level(u);
        rows[0][c] = level.of(dt + c * levels, few);
        for (int k = 0; k < count; ++k) rows[1 + k][c] = level.of(decay[k] + c * levels, few);
      }
      for (int k = 0; k <= count; ++k) {
        transpose_rows<float>(rows[k]);
        float* to = (k == 0 ? p.dt : p.decays[k - 1]) + t * W;
        for (int i = 0; i < W; ++i) store(to + i * W, rows[k][i]);
      }
    }
  }
#else
  static constexpr int levels = 0, most = 0, count = 0;
  void fill(const Delta&, const Grid&, V, bool, const float*, int) {}
  static void gather(const Delta&, Piece&, int) {}
  void look_up(const Delta&, const Grid&, Piece&, int) const {}
#endif
};

// One tile of a scan, with its states.
struct Tile {
  const ScanCall& call;
  const Delta delta;
  const Grid of_u, of_delta;
  const int64_t left;  // channels from its first one on
  const float* a;      // (channels, states)
  const Shared plan;   // of all states, if they are no more than a block
  const uint8_t* u;
  float* y;
  V bias, skip;
  bool quantized, shared;
  bool ladder = false;     // all states are one, whose two exponentials serve all blocks
  bool looked_up = false;  // the exponentials of the piece are there
  Tables tables;
  float h[kMostStates * W], rates[kMostStates * W];

  Tile(const ScanCall& call, int64_t direction, int64_t sample, int64_t tile)
      : call(call),
        delta(call, direction, sample, tile),
        of_u(call.of_u, sample),
        of_delta(call.of_delta.scale ? call.of_delta : call.of_rank, sample),
        left(call.channels - tile * W),
        a(call.a + (direction * call.channels + tile * W) * call.states),
        plan(a, call.states <= kBlock ? int(call.states) : 1),
        u(call.u.data + sample * call.u.batch * call.u.padded + tile * W),
        y(call.y + sample * call.pixels * call.channels + tile * W),
        quantized(call.of_delta.scale != nullptr) {
    const int64_t channel = direction * call.channels + tile * W, N = call.states;
    bias = call.bias ? load_some(call.bias + channel, left) : V{};
    skip = call.skip ? load_some(call.skip + channel, left) : V{};
    shared = N > 1;
    for (int64_t i = 1; i < (left < W ? left : W) && shared; ++i) {
      for (int64_t n = 0; n < N; ++n) shared &= a[i * N + n] == a[n];
    }
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t i = 0; i < W; ++i) {
        h[n * W + i] = 0;
        rates[n * W + i] = i < left ? a[i * N + n] * float(kLog2e) : 0.0f;
      }
    }
    ladder = shared && N <= kBlock && plan.ladder;
    if (!quantized || of_delta.qmax - of_delta.qmin >= float(Tables::levels) || call.weights.units > kMostUnits) return;
    if (N <= Tables::most) {
      tables.fill(delta, of_delta, bias, call.softplus != 0, rates, int(N));
    } else if (ladder) {
      float two[2 * W];
      for (int i = 0; i < 2 * W; ++i) two[i] = plan.rate[i / W];
      tables.fill(delta, of_delta, bias, call.softplus != 0, two, 2);
    }
  }

  // dt, dt * u and skip * u of a piece.
  void read(Piece& p, int steps) {
    looked_up = tables.count > 0 && p.numbers;
    looked_up ? tables.look_up(delta, of_delta, p, steps) : compute_steps(p, steps);
    for (int t = 0; t < steps; ++t) {
      const V value = of_u.value(load_codes(u + p.pixel[t] * call.u.padded));
      store(p.x + t * W, load(p.dt + t * W) * value);
      store(p.y + t * W, skip * value);
    }
  }

  void compute_steps(Piece& p, int steps) const {
    for (int t = 0; t < steps; ++t) {
      V step = delta.at(p.pixel[t]);
      if (quantized) step = of_delta.value_of_level(of_delta.level(step));
      store(p.dt + t * W, step + bias);
    }
    if (steps & 1) store(p.dt + steps * W, V{});
    for (int t = 0; call.softplus && t < steps; t += 2) {
      V pair[2] = {load(p.dt + t * W), load(p.dt + (t + 1) * W)};
      softplus<false, 2>(pair, nullptr);
      store(p.dt + t * W, pair[0]);
      store(p.dt + (t + 1) * W, pair[1]);
    }
  }

  // Exponentials that decays of some states follow from.
  static void exponentials(const Shared& plan, Piece& p, int steps) {
    for (int k = 0; k < plan.rates; ++k) {
      for (int t = 0; t < steps; t += 2) {
        V pair[2] = {load(p.dt + t * W) * plan.rate[k], load(p.dt + (t + 1) * W) * plan.rate[k]};
        exp2<2>(pair, 0.0f);
        store(p.decays[k] + t * W, pair[0]);
        store(p.decays[k] + (t + 1) * W, pair[1]);
      }
    }
  }

  // The next `states` states.
  template <int states>
  void advance_block(Piece& p, int steps, Decays form, int64_t n) {
    advance<states>(p, steps, form, p.b + n, p.c + n, call.b.padded, rates + n * W, h + n * W);
    if (!ladder || n + states >= call.states) return;
    for (int t = 0; t < steps; ++t) {  // from the first decay of this block to that of the next
      store(p.decays[0] + t * W, load(p.decays[0] + t * W) * power_of<states>(load(p.decays[1] + t * W)));
    }
  }

  void walk(Piece& p, int steps) {
    if (ladder && !looked_up) exponentials(plan, p, steps);
    for (int64_t n = 0; n < call.states;) {
      const int block = block_of(call.states - n);
      const bool each = looked_up && call.states <= Tables::most;  // an exponential of each state is there
      Decays form = each ? Decays::kShared : ladder ? Decays::kLadder : Decays::kOwn;
      if (form == Decays::kOwn && shared) {
        const Shared own(a + n, block);
        exponentials(own, p, steps);
        form = own.ladder ? Decays::kLadder : Decays::kShared;
      }
      switch (block) {
#if defined(__AVX512F__)
        case 16: advance_block<16>(p, steps, form, n); break;
        case 10: advance_block<10>(p, steps, form, n); break;
#endif
        case 8: advance_block<8>(p, steps, form, n); break;
        case 4: advance_block<4>(p, steps, form, n); break;
        case 2: advance_block<2>(p, steps, form, n); break;
        default: advance_block<1>(p, steps, form, n);
      }
      n += block;
    }
  }

  void write(const Piece& p, int steps, bool add) const {
    for (int t = 0; t < steps; ++t) {
      float* to = y + p.pixel[t] * call.channels;
      const V value = load(p.y + t * W);
      store_some(to, add ? load_some(to, left) + value : value, left);
    }
  }
};

// Codes of the states of some pixels as values, (kSteps, padded).
inline void read_states(const Codes& codes, const Grid& q, int64_t first, const int32_t* pixel, int steps, float* to) {
  for (int t = 0; t < steps; ++t) {
    const uint8_t* from = codes.data + (first + pixel[t] * codes.row) * codes.padded;
    for (int64_t i = 0; i < codes.padded; i += W) store(to + t * codes.padded + i, q.value(load_codes(from + i)));
  }
}

void scan(const ScanCall& call, int64_t direction, int64_t sample, int64_t first_tile, int64_t count) {
  const FlushDenormals flush;
  const int64_t L = call.pixels;
  const int32_t* order = call.order + direction * L;
  const Grid of_b(call.of_b, sample), of_c(call.of_c, sample);
  const auto start = [&](const Codes& codes) { return sample * codes.batch + direction * codes.group; };
  alignas(64) char memory[kMostTiles * sizeof(Tile)];
  Tile* const tiles = reinterpret_cast<Tile*>(memory);
  for (int64_t i = 0; i < count; ++i) new (tiles + i) Tile(call, direction, sample, first_tile + i);
  alignas(64) Piece p;
  for (int64_t first = 0; first < L; first += kSteps) {
    const int steps = int(L - first < kSteps ? L - first : kSteps);
    std::memcpy(p.pixel, order + first, size_t(steps) * sizeof(int32_t));
    for (int64_t t = first + kSteps; t < first + 2 * kSteps && t < L; ++t) {  // of the next piece
      const int64_t next = order[t];
      __builtin_prefetch(tiles->u + next * call.u.padded);
      for (int64_t i = 0; i < count; ++i) __builtin_prefetch(tiles[i].y + next * call.channels, 1);
      __builtin_prefetch(call.b.data + (start(call.b) + next * call.b.row) * call.b.padded);
      __builtin_prefetch(call.c.data + (start(call.c) + next * call.c.row) * call.c.padded);
      __builtin_prefetch(tiles->delta.codes + next * call.rank.row * call.rank.padded);
    }
    read_states(call.b, of_b, start(call.b), p.pixel, steps, p.b);
    read_states(call.c, of_c, start(call.c), p.pixel, steps, p.c);
    bool tables = false;
    for (int64_t i = 0; i < count; ++i) tables |= tiles[i].tables.count > 0;
    if (tables) Tables::gather(tiles->delta, p, steps);
    for (int64_t i = 0; i < count; ++i) {
      tiles[i].read(p, steps);
      tiles[i].walk(p, steps);
      tiles[i].write(p, steps, direction > 0);
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
