// Tasks of the CPU kernels of deployed models, for one instruction set. SSMQUANT_PATH is its name; see deployed_cpu.h.

#include "deployed_cpu_conv.h"
#include "deployed_cpu_fused.h"
#include "deployed_cpu_scan.h"

namespace {

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

}  // namespace

extern const DeployedPath SSMQUANT_JOIN(ssmquant_deployed_, SSMQUANT_PATH);
const DeployedPath SSMQUANT_JOIN(ssmquant_deployed_, SSMQUANT_PATH) = {
    SSMQUANT_TEXT(SSMQUANT_PATH), W, kUnit, kNarrow, encode, moments, gate, linear, blend, project, prepare, conv, depthwise, delta_moments, scan,
};
