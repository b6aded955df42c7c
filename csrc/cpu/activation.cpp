// Activations (csrc/ops/activation.h).
//
// Parallel  forward over elements; backward, too, but with a bias over blocks of rows, each with a
//           sum of its own, which all threads then add up, column by column.
// Traffic   forward D in and D out a row, gated 2D in; backward 2D in and D out, gated 3D and 2D. From
//           memory that is the bound: the exponential takes about 40 instructions a vector.
// Limits    with a bias, a backward pass over fewer rows than threads keeps some of them idle.
#include "ops/activation.h"
#include "core/dispatch.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "cpu/vec_math.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kForkElements = 1
                                       << 14;  // below, a parallel region costs more than it saves

int threads_for(std::int64_t elements) { return elements < kForkElements ? 1 : max_threads(); }

// w(-x) and w'(x) of f(x) = x w(x), for 0 <= x <= kFar. Since w(x) + w(-x) = 1, they say it all.
// Beyond kFar, where w(-x) < 1e-33, f and f' are at their limits.
template <class T>
struct Gelu {
  static constexpr T kFar = MathTables<T>::kNormalMax;
  static LMKERN_INLINE Vec<T> tail(Vec<T> x, Vec<T>& slope) {
    return VecMath<T>::normal_tail(x, slope);
  }
};

// σ(-u) and its derivative by u, for u >= 0.
template <class T>
LMKERN_INLINE Vec<T> sigmoid_tail(Vec<T> u, Vec<T>& slope) {
  const Vec<T> e = VecMath<T>::exp_normal(-u), upper = divide(splat<T>(T(1)), e + T(1));
  const Vec<T> tail = e * upper;
  slope = tail * upper;
  return tail;
}

template <class T>
struct GeluTanh {
  static constexpr T kFar = sizeof(T) == sizeof(float) ? T(9.7) : T(21);  // 2u = 81, 693
  static LMKERN_INLINE Vec<T> tail(Vec<T> x, Vec<T>& slope) {
    constexpr T linear = T(1.5957691216057307117), cubic = linear * T(0.044715);  // 2 sqrt(2/π)
    const Vec<T> square = x * x;
    const Vec<T> value = sigmoid_tail<T>(x * (square * cubic + linear), slope);
    slope *= square * (3 * cubic) + linear;
    return value;
  }
};

template <class T>
struct Silu {
  static constexpr T kFar = sizeof(T) == sizeof(float) ? T(80) : T(700);
  static LMKERN_INLINE Vec<T> tail(Vec<T> x, Vec<T>& slope) { return sigmoid_tail<T>(x, slope); }
};

// f(x) and f'(x). A NaN stays one.
template <class T, template <class> class F>
LMKERN_INLINE Vec<T> activate(Vec<T> x, Vec<T>& slope) {
  const Vec<T> far = splat<T>(F<T>::kFar), near = min(far, VecMath<T>::abs(x));
  Vec<T> density, tail = F<T>::tail(near, density), below = tail - near * density;
  // Zeros rather than 1e-35: products with those would be denormal, and slow.
  tail = near == far ? Vec<T>{} : tail;
  below = near == far ? Vec<T>{} : below;
  slope = x < Vec<T>{} ? below : T(1) - below;
  return max(Vec<T>{}, x) - near * tail;
}

template <class S>
struct Rows {
  S* data = nullptr;
  std::int64_t stride = 0;
  LMKERN_INLINE S* row(std::int64_t n) const { return data + n * stride; }
};

template <class S>
Rows<S> rows_of(const TensorView& view) {
  const std::int64_t width = view.ndim == 0 ? 1 : view.shape[view.ndim - 1];
  return {view.ptr<S>(), view.ndim == 2 ? view.strides[0] : width};
}

// The two operands of a gated activation, one of a plain one (then `up` is nothing): their values,
// biases, or gradients.
template <class S>
struct Operands {
  Rows<S> gate, up;

  static Operands of(const ActivationProblem& p, const TensorView& whole, const TensorView& up) {
    const Rows<S> input = rows_of<S>(whole);
    if (!p.gated) return {input, {}};
    if (p.up.defined()) return {input, rows_of<S>(up)};
    const std::int64_t half = whole.ndim == 0 ? 0 : whole.shape[whole.ndim - 1] / 2;
    const Rows<S> second = {input.data == nullptr ? nullptr : input.data + half, input.stride};
    return p.gate_first ? Operands{input, second} : Operands{second, input};
  }
};

// The processor's own prefetching stops at the end of a page, and starts anew too late for a loop of
// this length: without these, 4096 x 3072 from memory take 6 ms in place of 3.
constexpr std::uintptr_t kAheadBytes = 2048;
LMKERN_INLINE void prefetch(const void* p) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) + kAheadBytes));
}
LMKERN_INLINE void prefetch_to_write(const void* p) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) + kAheadBytes), 1);
}

// Calls step(d, n) for the vectors of [begin, end), n = kLane but for the last.
template <std::int64_t kLane, class Step>
LMKERN_INLINE void vectors(std::int64_t begin, std::int64_t end, const Step& step) {
  std::int64_t d = begin;
  for (; d + kLane <= end; d += kLane) step(d, kLane);
  if (d < end) step(d, end - d);
}

template <class S, template <class> class F, bool kGated>
struct Pass {
  using T = Accumulate<S>;
  using V = Vec<T>;
  static constexpr std::int64_t kLane = kLanes<T>;

  const ActivationProblem& p;
  std::int64_t rows, width;  // of the output
  const Operands<const S> x = Operands<const S>::of(p, p.input, p.up);
  const Operands<const S> bias = Operands<const S>::of(p, p.bias, {});

  static LMKERN_INLINE V operand(const S* from, const S* bias, std::int64_t d, std::int64_t n) {
    prefetch(from + d);
    const V value = load_n(from + d, n);
    return bias == nullptr ? value : value + load_n(bias + d, n);
  }

  // Calls span(row, begin, end) for all of the output. A matrix without gaps and bias is one row.
  template <class Span>
  void each(bool gapless, const Span& span) const {
    const std::int64_t total = rows * width, length = gapless ? total : width;
    parallel(threads_for(total), [&](int thread, int threads) {
      const Range own = thread_range(total, 64, thread, threads);
      for (std::int64_t i = own.begin; i < own.end;) {
        const std::int64_t row = i / length, begin = i - row * length;
        const std::int64_t end = own.end - i < length - begin ? begin + own.end - i : length;
        span(row, begin, end);
        i += end - begin;
      }
    });
  }
  bool gapless(Rows<const S> other) const {
    return !p.bias.defined() && x.gate.stride == width && other.stride == width &&
           (!kGated || x.up.stride == width);
  }

  void forward(Rows<S> out) const {
    each(gapless(x.gate), [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
      const S *const gate = x.gate.row(row), *const up = x.up.row(row);
      const S *const gate_bias = bias.gate.data, *const up_bias = bias.up.data;
      S* const to = out.row(row);
      vectors<kLane>(begin, end,
                     [=](std::int64_t d, std::int64_t n) __attribute__((always_inline)) {
                       V slope, y = activate<T, F>(operand(gate, gate_bias, d, n), slope);
                       if constexpr (kGated) y *= operand(up, up_bias, d, n);
                       prefetch_to_write(to + d);
                       store_n(to + d, y, n);
                     });
    });
  }

  struct Sums {
    V gate{}, up{};
  };

  // The gradients of one row.
  struct Gradient {
    const S *gate, *up, *gate_bias, *up_bias, *d_out;
    S *d_gate, *d_up;

    // Writes those of one vector, and adds them to `sums`.
    LMKERN_INLINE void write(std::int64_t d, std::int64_t n, Sums& sums) const {
      V slope;
      const V y = activate<T, F>(operand(gate, gate_bias, d, n), slope);
      prefetch(d_out + d);
      const V d_y = load_n(d_out + d, n);
      V to_gate = d_y * slope;
      if constexpr (kGated) {
        const V to_up = d_y * y;
        to_gate *= operand(up, up_bias, d, n);
        prefetch_to_write(d_up + d);
        store_n(d_up + d, to_up, n);
        sums.up += to_up;
      }
      prefetch_to_write(d_gate + d);
      store_n(d_gate + d, to_gate, n);
      sums.gate += to_gate;
    }
  };
  LMKERN_INLINE Gradient gradient(Rows<const S> d_out, const Operands<S>& d_x,
                                  std::int64_t row) const {
    return {x.gate.row(row), x.up.row(row),     bias.gate.data, bias.up.data,
            d_out.row(row),  d_x.gate.row(row), d_x.up.row(row)};
  }

  void backward(Rows<const S> d_out, const Operands<S>& d_x) const {
    each(gapless(d_out), [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
      const Gradient at = gradient(d_out, d_x, row);
      vectors<kLane>(begin, end,
                     [=](std::int64_t d, std::int64_t n) __attribute__((always_inline)) {
                       Sums unused;
                       at.write(d, n, unused);
                     });
    });
  }

  void backward(Rows<const S> d_out, const Operands<S>& d_x, const Operands<S>& d_bias) const {
    constexpr std::int64_t kBlocks = 64, kParts = kGated ? 2 : 1;
    const std::int64_t block_rows = (rows + kBlocks - 1) / kBlocks;
    const std::int64_t blocks = rows == 0 ? 0 : (rows + block_rows - 1) / block_rows;
    const std::int64_t padded = (width + kLane - 1) / kLane * kLane;
    T* const sums = static_cast<T*>(thread_scratch(blocks * kParts * padded * sizeof(T)));
    Barrier barrier;
    parallel(threads_for(rows * width), [&](int thread, int threads) {
      const Range own = thread_range(blocks, 1, thread, threads);
      for (std::int64_t block = own.begin; block < own.end; ++block) {
        const std::int64_t first = block * block_rows;
        const std::int64_t last = first + block_rows < rows ? first + block_rows : rows;
        T* const sum = sums + block * kParts * padded;
        for (std::int64_t row = first; row < last; ++row) {
          const Gradient at = gradient(d_out, d_x, row);
          const bool add = row > first;
          vectors<kLane>(0, width,
                         [=](std::int64_t d, std::int64_t n) __attribute__((always_inline)) {
                           Sums so_far;
                           if (add) so_far.gate = load(sum + d);
                           if (add && kGated) so_far.up = load(sum + padded + d);
                           at.write(d, n, so_far);
                           store(sum + d, so_far.gate);
                           if constexpr (kGated) store(sum + padded + d, so_far.up);
                         });
        }
      }
      barrier.wait(threads);
      const Range columns = thread_range(width, kLane, thread, threads);
      vectors<kLane>(columns.begin, columns.end, [&](std::int64_t d, std::int64_t n) {
        Sums total;
        for (std::int64_t block = 0; block < blocks; ++block) {
          const T* const sum = sums + block * kParts * padded + d;
          total.gate += load(sum);
          if constexpr (kGated) total.up += load(sum + padded);
        }
        store_n(d_bias.gate.data + d, total.gate, n);
        if constexpr (kGated) store_n(d_bias.up.data + d, total.up, n);
      });
    });
  }
};

template <class S, template <class> class F, class Run>
void with_gate(const ActivationProblem& p, std::int64_t rows, std::int64_t width, const Run& run) {
  if (p.gated)
    run(TypeTag<S>{}, Pass<S, F, true>{p, rows, width});
  else
    run(TypeTag<S>{}, Pass<S, F, false>{p, rows, width});
}

// Calls run(Pass) with the one for this problem; `out` is [..., D].
template <class Run>
void dispatch(const ActivationProblem& p, const TensorView& out, const Run& run) {
  const std::int64_t width = out.ndim == 0 ? 1 : out.shape[out.ndim - 1];
  const std::int64_t rows = width == 0 ? 0 : out.numel() / width;
  dispatch_float_types(p.input.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    switch (p.function) {
      case Activation::kGelu: return with_gate<S, Gelu>(p, rows, width, run);
      case Activation::kGeluTanh: return with_gate<S, GeluTanh>(p, rows, width, run);
      case Activation::kSilu: return with_gate<S, Silu>(p, rows, width, run);
    }
  });
}

}  // namespace

void activation_forward(const ActivationForwardArgs& a) {
  dispatch(a.problem, a.out, [&](auto storage, const auto& pass) {
    pass.forward(rows_of<typename decltype(storage)::type>(a.out));
  });
}

void activation_backward(const ActivationBackwardArgs& a) {
  const ActivationProblem& p = a.problem;
  dispatch(p, a.d_out, [&](auto storage, const auto& pass) {
    using S = typename decltype(storage)::type;
    const Rows<const S> d_out = rows_of<const S>(a.d_out);
    const auto d_x = Operands<S>::of(p, a.d_input, a.d_up);
    if (p.bias.defined())
      pass.backward(d_out, d_x, Operands<S>::of(p, a.d_bias, {}));
    else
      pass.backward(d_out, d_x);
  });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
