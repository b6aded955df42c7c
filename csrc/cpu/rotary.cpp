// Rotary position embedding (csrc/ops/rotary.h).
//
// Parallel  threads own positions: cos and sin of one serve all of its heads.
// Traffic   q and k in, their turned selves out: the bound.
// Limits    none.
#include "ops/rotary.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "cpu/vec.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

// Lanes 0, 2, 4, ... (Odd = 0) or 1, 3, 5, ... of a, then of b.
template <int Odd, class V, int... Lane>
LMKERN_INLINE V unzip(V a, V b, std::integer_sequence<int, Lane...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (2 * Lane + Odd)...);
#else
  using Mask = decltype(a < b);
  return __builtin_shuffle(a, b, Mask{(2 * Lane + Odd)...});
#endif
}

template <class S>
struct Rotary {
  using T = Accumulate<S>;
  using V = Vec<T>;
  static constexpr std::int64_t kLane = kLanes<T>;

  const RotaryArgs& a;
  const std::int64_t batch = a.q.shape[0], length = a.q.shape[2], depth = a.q.shape[3];
  const std::int64_t pairs = a.cos.shape[2];

  static LMKERN_INLINE std::int64_t at_most(std::int64_t n, std::int64_t most) {
    return n < most ? n : most;
  }

  void row(const S* from, const T* cos, const T* sin, S* to) const {
    const T sign = a.inverse ? T(-1) : T(1);
    for (std::int64_t r = 0; r < pairs; r += kLane) {
      const std::int64_t n = at_most(pairs - r, kLane);
      const V c = load_n(cos + r, n), s = load_n(sin + r, n) * sign;
      if (a.interleaved) {
        using Lanes = std::make_integer_sequence<int, static_cast<int>(kLane)>;
        const std::int64_t low = at_most(2 * n, kLane), high = 2 * n - low;
        const V first = load_n(from + 2 * r, low), second = load_n(from + 2 * r + low, high);
        const V x = unzip<0>(first, second, Lanes{}), y = unzip<1>(first, second, Lanes{});
        const V turned_x = x * c - y * s, turned_y = y * c + x * s;
        store_n(to + 2 * r, interleave<0>(turned_x, turned_y, Lanes{}), low);
        store_n(to + 2 * r + low, interleave<1>(turned_x, turned_y, Lanes{}), high);
      } else {
        const V x = load_n(from + r, n), y = load_n(from + pairs + r, n);
        store_n(to + r, x * c - y * s, n);
        store_n(to + pairs + r, y * c + x * s, n);
      }
    }
    for (std::int64_t d = 2 * pairs; d < depth; ++d) to[d] = from[d];
  }

  void heads(const TensorView& from, const TensorView& to, std::int64_t b, std::int64_t i) const {
    const std::int64_t table = ((a.cos.shape[0] == 1 ? 0 : b) * length + i) * pairs;
    for (std::int64_t h = 0; h < from.shape[1]; ++h)
      row(from.ptr<const S>() + b * from.strides[0] + h * from.strides[1] + i * from.strides[2],
          a.cos.ptr<const T>() + table, a.sin.ptr<const T>() + table,
          to.ptr<S>() + b * to.strides[0] + h * to.strides[1] + i * to.strides[2]);
  }

  void run() const {
    constexpr std::int64_t kForkElements = 50'000;
    const std::int64_t elements = a.q.numel() + (a.k.defined() ? a.k.numel() : 0);
    parallel(elements < kForkElements ? 1 : max_threads(), [&](int thread, int of) {
      const Range own = thread_range(batch * length, 1, thread, of);
      for (std::int64_t i = own.begin; i < own.end; ++i) {
        heads(a.q, a.q_out, i / length, i % length);
        if (a.k.defined()) heads(a.k, a.k_out, i / length, i % length);
      }
    });
  }
};

}  // namespace

void rotary_embedding(const RotaryArgs& a) {
  dispatch_float_types(a.q.dtype, [&](auto tag) { Rotary<typename decltype(tag)::type>{a}.run(); });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
