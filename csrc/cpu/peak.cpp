// The FMA ceiling of this instruction set: independent multiply-add chains that never leave
// registers. Benchmarks state their results as a fraction of it, measured in the same run.
#include <omp.h>

#include "core/parallel.h"
#include "cpu/vec.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

double peak_flops(int threads, std::int64_t iterations) {
  constexpr int kChains = kAccumulators;  // latency 4 at two per cycle needs 8
  volatile float sink = 0;
  double seconds = 0;
  parallel(threads, [&](int thread, int) {
    Vec<float> acc[kChains];  // different values, or the compiler computes one chain for all
    for (int c = 0; c < kChains; ++c) acc[c] = splat<float>(static_cast<float>(c));
    const Vec<float> x = splat<float>(0.999f), y = splat<float>(0.001f);
    const double start = omp_get_wtime();
    for (std::int64_t i = 0; i < iterations; ++i) {
      LMKERN_UNROLL
      for (int c = 0; c < kChains; ++c) acc[c] = acc[c] * x + y;
    }
    const double elapsed = omp_get_wtime() - start;
    float total = 0;
    for (int c = 0; c < kChains; ++c) total += acc[c][0];
    if (thread == 0) {
      sink = total;
      seconds = elapsed;
    }
  });
  (void)sink;
  return 2.0 * kChains * kLanes<float> * static_cast<double>(iterations) * threads / seconds;
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
