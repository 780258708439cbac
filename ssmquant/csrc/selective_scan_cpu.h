// What the two halves of the CPU selective scan share: the call, and how it is cut into tasks.
//
// selective_scan_cpu.cpp is the library's interface: it plans, starts threads, and adds up what tasks leave behind.
// selective_scan_cpu_path.cpp computes tasks; it is compiled once for each instruction set ("path").
//
// A tile is as many channels of one group as a vector has lanes; channels are lanes, time is walked step by step, a
// piece of kPiece steps at a time. A task is a range of samples, some tiles of a group, and a chunk of time, which is
// all of it unless there are too few channels to share out. Tasks depend on shapes and the path alone, and each owns
// what it writes, hence no result depends on the number of threads or on which of them was first.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#pragma GCC visibility push(hidden)
#endif

constexpr int64_t kPiece = 32;

// Mirrored by ssmquant/ops/selective_scan/cpu.py. Strides count elements. All members have eight bytes.
struct Operand {
  const void* data;
  int64_t dtype;
  int64_t batch, group, row, time;  // row: channel, or state for B and C
};

struct Result {  // contiguous
  void* data;
  int64_t dtype;
};

struct Call {
  int64_t path, threads;
  int64_t wide;  // the state is float64, not float32; "state dtype" below
  int64_t softplus, save;
  int64_t batch, channels, states, length, groups;
  int64_t constant_b, constant_c;
  Operand u, delta, b, c;
  // (D, N), or (D,) or null, contiguous in the state dtype; b and c only where constant
  const void *matrix_a, *matrix_b, *matrix_c, *skip, *bias;
  void* saved;  // (pieces, B, N, D), states before each piece, in the state dtype
  void* workspace;
  // forward
  Result y;
  void* last;  // (B, D, N)
  // backward
  Operand g;
  const void* g_last;  // (B, D, N), contiguous in the state dtype, or null for zeros
  Result gu, gdelta, gb, gc;
  void *ga, *gskip, *gbias;  // contiguous in the state dtype; gskip and gbias may be null
};

// Sizes and offsets count elements of the state dtype.
struct Plan {
  int64_t lanes;
  int64_t inner, tiles_in_group, tiles;
  int64_t pieces;
  int64_t ranges, blocks, chunks, tasks;  // of samples, of the tiles of a group, of time
  int64_t tiles_in_task;                  // at most
  int64_t a, skip, bias;                  // per tile: A / ln 2 (N, lanes), D and bias (lanes)
  int64_t b, c;                           // per tile (N, lanes) where constant, else packed: (B, G, pieces, N, kPiece)
  int64_t packed_size;                    // of one of those in packed form
  int64_t states, totals;                 // per chunk, sample, tile: see Pass
  int64_t sums, sums_size;                // per range, chunk, tile: gradients of what does not depend on time
  int64_t parts_b, parts_c;               // gradients of B and C, unless constant: per block, packed
  int64_t scratch, scratch_size;          // per thread
  int64_t size;
};

enum class Pass {
  kWhole,  // start from nothing (gradients: from g_last)
  kEnds,   // leave in `states` what a chunk makes of a zero state, in `totals` the sum of its step sizes
  kMain,   // start from `states`
};

using Run = void (*)(const Call&, const Plan&, Pass, int64_t task, int64_t thread);

struct Path {
  const char* name;
  int64_t bytes;                      // of a vector
  Run pack[2], forward[2], backward[2];  // float32, float64
};

struct Task {
  int64_t range, chunk, group, block;
  int64_t first_sample, last_sample;
  int64_t first_piece, last_piece;
  int64_t first_tile, count;  // tiles counted through all groups
};

static inline Task task_of(const Call& call, const Plan& plan, int64_t index) {
  Task t;
  t.block = index % plan.blocks;
  index /= plan.blocks;
  t.group = index % call.groups;
  index /= call.groups;
  t.chunk = index % plan.chunks;
  t.range = index / plan.chunks;
  t.first_sample = t.range * call.batch / plan.ranges;
  t.last_sample = (t.range + 1) * call.batch / plan.ranges;
  t.first_piece = t.chunk * plan.pieces / plan.chunks;
  t.last_piece = (t.chunk + 1) * plan.pieces / plan.chunks;
  const int64_t begin = t.block * plan.tiles_in_group / plan.blocks;
  t.first_tile = t.group * plan.tiles_in_group + begin;
  t.count = (t.block + 1) * plan.tiles_in_group / plan.blocks - begin;
  return t;
}

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
