// Dropout (csrc/ops/dropout.h).
//
// Parallel  threads own ranges of elements, in whole calls of Philox.
// Traffic   N in and N out; Philox takes about as long as float32 from memory.
// Limits    none.
#include "ops/dropout.h"

#include "core/dispatch.h"
#include "core/parallel.h"
#include "cpu/dropout.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

template <class S>
void run(const DropoutArgs& a) {
  using T = Accumulate<S>;
  constexpr std::int64_t kForkElements =
      1 << 14;  // below, a parallel region costs more than it saves
  constexpr std::int64_t kLane = kLanes<T>, kBlock = Dropout<T>::kBlock;
  const Dropout<T> dropout(a.p, a.seed);
  const std::int64_t n = a.input.numel();
  const S* const input = a.input.ptr<const S>();
  S* const out = a.out.ptr<S>();
  parallel(n < kForkElements ? 1 : max_threads(), [&](int thread, int threads) {
    const Range own = thread_range(n, kBlock, thread, threads);
    for (std::int64_t i = own.begin; i < own.end; i += kBlock) {
      alignas(64) T keep[kBlock];
      dropout.row(i, kBlock, keep);
      const std::int64_t end = i + kBlock < own.end ? i + kBlock : own.end;
      std::int64_t d = i;
      for (; d + kLane <= end; d += kLane) store(out + d, load(input + d) * load(keep + (d - i)));
      if (d < end) store_n(out + d, load_n(input + d, end - d) * load(keep + (d - i)), end - d);
    }
  });
}

}  // namespace

void dropout(const DropoutArgs& a) {
  dispatch_float_types(a.input.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a); });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
