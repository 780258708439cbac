// The CPU kernels of deployed models: tasks and threads. C ABI, see deployed_cpu.h.

#include "deployed_cpu.h"

#include <sched.h>

#include <algorithm>
#include <cmath>

#include "cpu_threads.h"

extern const DeployedPath ssmquant_deployed_portable;
#if defined(__x86_64__)
extern const DeployedPath ssmquant_deployed_avx2, ssmquant_deployed_avx512, ssmquant_deployed_vnni;
#endif

namespace {

#if defined(__x86_64__)
const Paths<DeployedPath> kPaths(&ssmquant_deployed_vnni, SSMQUANT_PATHS(ssmquant_deployed_));
#else
const Paths<DeployedPath> kPaths(nullptr, SSMQUANT_PATHS(ssmquant_deployed_));
#endif

// What is worth another thread, and what an element takes, in tenths of a nanosecond.
constexpr int64_t kThreadWork = 100000;
namespace cost {
constexpr int64_t encode = 4, moments = 4, gate = 10, blend = 3, tap = 1, act = 5, delta = 6, state = 2;
}
constexpr int64_t kProducts = 16;  // multiplications of codes in that time

template <typename Call>
int64_t useful_threads(const Call& call, int64_t work) {
  return parts(std::min(call.threads, kMostThreads), work / kThreadWork);
}

int64_t tasks_of(int64_t batch, int64_t rows) { return batch * divide_up(rows, kRows); }

Part part_of(int64_t rows, int64_t task) {
  const int64_t tasks = divide_up(rows, kRows), first = task % tasks * kRows;
  return {task / tasks, first, std::min(kRows, rows - first)};
}

// Adds up, in order, what the tasks of each sample have found (Chan et al.).
void join(const double* parts, int64_t batch, int64_t tasks, float* moments) {
  for (int64_t sample = 0; sample < batch; ++sample) {
    double count = 0, mean = 0, squares = 0, low = INFINITY, high = -INFINITY;
    for (int64_t i = 0; i < tasks; ++i, parts += kMoments) {
      const double apart = parts[1] - mean, all = count + parts[0];
      mean += apart * (parts[0] / all);
      squares += parts[2] + apart * apart * (count * parts[0] / all);
      count = all;
      low = std::min(low, parts[3]);
      high = std::max(high, parts[4]);
    }
    float* to = moments + 4 * sample;
    to[0] = float(mean);
    // Of equal values rounding may leave less than nothing; a NaN stays one.
    to[1] = float(std::sqrt(std::max(squares, 0.0) / std::max(count - 1, 1.0)));
    to[2] = float(low);
    to[3] = float(high);
  }
}

}  // namespace

// How many instruction sets this machine can run, best first; of each its name, the lanes of a vector of float32, and
// how many codes of a weight's row are multiplied at once; up to which magnitude they may be packed as int8 all the same.
SSMQUANT_EXPORT int64_t ssmquant_deployed_paths() { return kPaths.count; }
SSMQUANT_EXPORT const char* ssmquant_deployed_path(int64_t index) { return kPaths.found[index]->name; }
SSMQUANT_EXPORT int64_t ssmquant_deployed_lanes(int64_t index) { return kPaths.found[index]->lanes; }
SSMQUANT_EXPORT int64_t ssmquant_deployed_unit(int64_t index) { return kPaths.found[index]->unit; }
SSMQUANT_EXPORT int64_t ssmquant_deployed_narrow(int64_t index) { return kPaths.found[index]->narrow; }

// How many tasks look at the rows of one sample.
SSMQUANT_EXPORT int64_t ssmquant_deployed_tasks(int64_t rows) { return divide_up(rows, kRows); }

SSMQUANT_EXPORT void ssmquant_deployed_encode(const EncodeCall* call) {
  const auto run = kPaths.found[call->path]->encode;
  const int64_t work = call->batch * call->rows * call->groups * call->columns * cost::encode;
  share(useful_threads(*call, work), tasks_of(call->batch, call->rows),
        [&](int64_t i, int64_t) { run(*call, part_of(call->rows, i)); });
}

SSMQUANT_EXPORT void ssmquant_deployed_moments(const MomentsCall* call) {
  const auto run = kPaths.found[call->path]->moments;
  const int64_t work = call->batch * call->rows * call->groups * call->columns * cost::moments;
  share(useful_threads(*call, work), tasks_of(call->batch, call->rows), [&](int64_t i, int64_t) {
    run(*call, part_of(call->rows, i), call->workspace + i * kMoments);
  });
  join(call->workspace, call->batch, divide_up(call->rows, kRows), call->moments);
}

SSMQUANT_EXPORT void ssmquant_deployed_gate(const GateCall* call) {
  const auto run = kPaths.found[call->path]->gate;
  const int64_t work = call->batch * call->rows * call->columns * cost::gate;
  share(useful_threads(*call, work), tasks_of(call->batch, call->rows), [&](int64_t i, int64_t) {
    run(*call, part_of(call->rows, i), call->workspace + i * kMoments);
  });
  if (call->moments != nullptr) join(call->workspace, call->batch, divide_up(call->rows, kRows), call->moments);
}

SSMQUANT_EXPORT void ssmquant_deployed_ranges(const RangesCall* call) {
  const double n = double(call->count), all = n * double(call->copies);
  const float wider = float(std::sqrt(std::max(n - 1, 1.0) * double(call->copies) / std::max(all - 1, 1.0)));
  for (int64_t i = 0; i < call->samples; ++i) {
    const float* m = call->moments + 4 * i;
    const float std = m[1] * wider;
    const float beta = call->v[0] * m[0] + call->v[1] * std + call->v[2] * m[2] + call->v[3] * m[3];
    const float alpha = std::fabs(call->w[0] * std::fabs(m[0] + beta) + call->w[1] * std + call->w[2] * (m[2] + beta) +
                                  call->w[3] * (m[3] + beta));
    const float ceiling = (m[3] - m[2]) / float(call->levels);
    // Comparisons that a NaN fails, so that it stays one.
    float scale = ceiling < alpha ? ceiling : alpha;
    scale = ceiling == ceiling ? scale : ceiling;
    scale = scale < float(call->eps) ? float(call->eps) : scale;
    float* to = call->ranges + i;
    to[0] = scale, to[call->samples] = beta, to[2 * call->samples] = m[2], to[3 * call->samples] = m[3];
  }
}

SSMQUANT_EXPORT void ssmquant_deployed_linear(const LinearCall* call) {
  const auto run = kPaths.found[call->path]->linear;
  const int64_t act = call->act == kNoActivation ? 0 : cost::act;
  const int64_t work = call->batch * call->rows * call->outputs * (call->x.padded / kProducts + 1 + act);
  share(useful_threads(*call, work), tasks_of(call->batch, call->rows),
        [&](int64_t i, int64_t) { run(*call, part_of(call->rows, i)); });
}

SSMQUANT_EXPORT void ssmquant_deployed_blend(const BlendCall* call) {
  const auto run = kPaths.found[call->path]->blend;
  share(useful_threads(*call, call->batch * call->rows * call->columns * cost::blend),
        tasks_of(call->batch, call->rows), [&](int64_t i, int64_t) { run(*call, part_of(call->rows, i)); });
}

// Bytes of scratch that a call needs.
static Scratch project_scratch(const ProjectCall* call) {
  return {call->z.data != nullptr || call->clip != nullptr ? call->inputs : 0, padded(call->inputs)};
}

SSMQUANT_EXPORT int64_t ssmquant_deployed_project_workspace(const ProjectCall* call) {
  const Scratch scratch = project_scratch(call);
  return scratch.bytes() * std::min(call->threads, kMostThreads);
}

SSMQUANT_EXPORT void ssmquant_deployed_project(const ProjectCall* call) {
  const auto run = kPaths.found[call->path]->project;
  const Scratch scratch = project_scratch(call);
  const int64_t act = call->act == kNoActivation ? 0 : cost::act;
  const int64_t each = call->inputs * (call->z.data != nullptr ? cost::gate + cost::encode : cost::encode) +
                       call->outputs * (padded(call->inputs) / kProducts + 1 + act);
  share(useful_threads(*call, call->batch * call->rows * each), tasks_of(call->batch, call->rows),
        [&](int64_t i, int64_t thread) {
          run(*call, part_of(call->rows, i), static_cast<char*>(call->workspace) + thread * scratch.bytes());
        });
}

SSMQUANT_EXPORT void ssmquant_deployed_conv(const ConvCall* call) {
  const auto run = kPaths.found[call->path]->conv;
  const int64_t rows = call->batch * call->height, taps = call->window.height * call->window.width;
  const int64_t work = rows * call->width * call->outputs * taps * (call->x.padded / kProducts + 1);
  share(useful_threads(*call, work), rows, [&](int64_t i, int64_t) { run(*call, i / call->height, i % call->height); });
}

SSMQUANT_EXPORT void ssmquant_deployed_depthwise(const DepthwiseCall* call) {
  const DeployedPath& path = *kPaths.found[call->path];
  const int64_t tiles = divide_up(call->channels, path.lanes);
  const int64_t down = divide_up(call->height, kBlockHeight), right = divide_up(call->width, kBlockWidth);
  const int64_t taps = call->window.height * call->window.width;
  const int64_t work = call->batch * call->height * call->width * call->channels * (cost::encode + taps * cost::tap);
  share(useful_threads(*call, work), call->batch * down * right * tiles, [&](int64_t i, int64_t) {
    const int64_t block = i / tiles;
    path.depthwise(*call, block / right / down, block / right % down * kBlockHeight, block % right * kBlockWidth,
                   i % tiles);
  });
}

SSMQUANT_EXPORT void ssmquant_deployed_delta_moments(const ScanCall* call) {
  const auto run = kPaths.found[call->path]->delta_moments;
  const int64_t work = call->batch * call->pixels * call->directions * call->channels * cost::delta;
  share(useful_threads(*call, work), tasks_of(call->batch, call->pixels), [&](int64_t i, int64_t) {
    run(*call, part_of(call->pixels, i), call->workspace + i * kMoments);
  });
  join(call->workspace, call->batch, divide_up(call->pixels, kRows), call->moments);
}

SSMQUANT_EXPORT void ssmquant_deployed_scan(const ScanCall* call) {
  const DeployedPath& path = *kPaths.found[call->path];
  const int64_t tiles = divide_up(call->channels, path.lanes);
  const int64_t work = call->batch * tiles * path.lanes * call->pixels * call->directions * (call->states + 4) * cost::state;
  const int64_t threads = useful_threads(*call, work);
  // Tiles of one task read B, C and the low rank once for all. Results do not depend on how many there are.
  const int64_t count = parts(call->batch * tiles / threads, kMostTiles);
  const int64_t blocks = divide_up(tiles, count), each = call->batch * blocks;
  share(threads, call->directions * each, [&](int64_t i, int64_t) {
    // Directions are added up in their order. Tasks start in the order of their numbers, so the one before has started.
    const int64_t direction = i / each, mine = i % each, first = mine % blocks * count;
    int64_t* const done = call->done + mine;
    while (__atomic_load_n(done, __ATOMIC_ACQUIRE) != direction) sched_yield();
    path.scan(*call, direction, mine / blocks, first, std::min(count, tiles - first));
    __atomic_store_n(done, direction + 1, __ATOMIC_RELEASE);
  });
}

SSMQUANT_EXPORT int64_t ssmquant_deployed_core_workspace(const CoreCall* call) {
  const Scratch scratch{call->scan.directions * call->rows, padded(call->scan.channels)};
  return scratch.bytes() * std::min(call->scan.threads, kMostThreads);
}

SSMQUANT_EXPORT void ssmquant_deployed_core(const CoreCall* call) {
  const ScanCall& scan = call->scan;
  const auto run = kPaths.found[scan.path]->prepare;
  const Scratch scratch{scan.directions * call->rows, padded(scan.channels)};
  const int64_t each = scan.channels * cost::encode * 2 +
                       scan.directions * call->rows * (padded(scan.channels) / kProducts + 1 + cost::encode);
  share(useful_threads(scan, scan.batch * scan.pixels * each), tasks_of(scan.batch, scan.pixels),
        [&](int64_t i, int64_t thread) {
          run(*call, part_of(scan.pixels, i), static_cast<char*>(call->workspace) + thread * scratch.bytes());
        });
  ssmquant_deployed_scan(&scan);
}
