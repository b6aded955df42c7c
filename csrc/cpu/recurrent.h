// How the work of a recurrent layer is divided among threads; shared by forward and backward.
#pragma once
#include "core/memory.h"
#include "core/parallel.h"
#include "cpu/gemm.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

// Two ways to divide a time step. By rows of the batch: threads never wait for each other, but each
// streams the whole of W_hh. By hidden units: each streams only its share, so that it stays in the
// core's own cache, at the price of a barrier per step, because h_t is needed whole by everyone.
struct RecurrentPlan {
  int threads;
  bool by_rows;
  std::int64_t rows, panels;

  // weight_bytes: the packed W_hh; step_flops: of one time step.
  LMKERN_INLINE RecurrentPlan(std::int64_t steps, std::int64_t batch, std::int64_t panel_count,
                              std::int64_t weight_bytes, std::int64_t step_flops)
      : rows(batch), panels(panel_count) {
    constexpr std::int64_t kCacheBytes = 1 << 20;    // of a core, with room for the activations
    constexpr std::int64_t kForkFlops = 400'000;     // a parallel region costs about 4 us
    constexpr std::int64_t kBarrierFlops = 150'000;  // a barrier about 0.5 us on each core
    threads = max_threads();
    by_rows = weight_bytes <= kCacheBytes && batch >= 3 * threads;
    const std::int64_t items = by_rows ? batch : panels;
    if (threads > items) threads = static_cast<int>(items < 1 ? 1 : items);
    if (steps * step_flops < kForkFlops || (!by_rows && step_flops < kBarrierFlops)) threads = 1;
  }

  LMKERN_INLINE Range rows_of(int thread, int count) const {
    return by_rows ? thread_range(rows, 1, thread, count) : Range{0, rows};
  }
  LMKERN_INLINE Range panels_of(int thread, int count) const {
    return by_rows ? Range{0, panels} : thread_range(panels, 1, thread, count);
  }
};

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
