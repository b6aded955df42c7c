// Optimizer steps on rows (csrc/ops/embedding_optimizer.h).
//
// Parallel  over the touched rows, which are distinct, in blocks handed out dynamically, since a hot
//           row has many gradients.
// Traffic   one pass: reads the N rows of the gradient, reads and writes each touched row of the
//           weight and of the state. With n of the N distinct, (N + 2 n) D elements for sgd,
//           (N + 4 n) D for adagrad, (N + 6 n) D for adam; nothing of other rows moves.
// Limits    bound by memory. Sorting rows that are not in order is serial: about 10 ns for each.
#include "ops/embedding_optimizer.h"
#include "core/dispatch.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "cpu/vec.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kForkElements = 1
                                       << 15;  // below, a parallel region costs more than it saves
constexpr std::int64_t kBlockRows = 16;

// Gradient n belongs to row `row`.
struct Entry {
  std::int64_t row, n;
};

bool strictly_ascending(const std::int64_t* rows, std::int64_t count) {
  bool ascending = true;
  for (std::int64_t n = 1; n < count; ++n) ascending &= rows[n - 1] < rows[n];
  return ascending;
}

// Stable, so that n ascends within a row: radix sort by bytes, of which rows below `extent` have few.
// Returns the one of the two buffers with the result.
Entry* sort_by_row(const std::int64_t* rows, std::int64_t count, std::int64_t extent, Entry* from,
                   Entry* to) {
  for (std::int64_t n = 0; n < count; ++n) from[n] = {rows[n], n};
  for (int shift = 0; shift < 63 && (extent - 1) >> shift > 0; shift += 8) {
    std::int64_t starts[257] = {};
    for (std::int64_t i = 0; i < count; ++i) ++starts[((from[i].row >> shift) & 255) + 1];
    for (int digit = 0; digit < 256; ++digit) starts[digit + 1] += starts[digit];
    for (std::int64_t i = 0; i < count; ++i) to[starts[(from[i].row >> shift) & 255]++] = from[i];
    Entry* const sorted = to;
    to = from;
    from = sorted;
  }
  return from;
}

// starts[k]: where the k-th distinct row begins, and where the last one ends. Returns how many.
std::int64_t find_groups(const Entry* entries, std::int64_t count, std::int64_t* starts) {
  std::int64_t groups = 0;
  for (std::int64_t i = 0; i < count; ++i)
    if (i == 0 || entries[i].row != entries[i - 1].row) starts[groups++] = i;
  starts[groups] = count;
  return groups;
}

// sum[:] += K rows of the gradient, one after the other.
template <int K, class S>
void add_gradients(const S* gradient, std::int64_t width, const Entry* entries,
                   Accumulate<S>* sum) {
  using T = Accumulate<S>;
  const S* rows[K];
  for (int k = 0; k < K; ++k) rows[k] = gradient + entries[k].n * width;
  std::int64_t d = 0;
  for (; d + kLanes<T> <= width; d += kLanes<T>) {
    Vec<T> total = load(sum + d);
    LMKERN_UNROLL
    for (int k = 0; k < K; ++k) total += load(rows[k] + d);
    store(sum + d, total);
  }
  for (; d < width; ++d)
    for (int k = 0; k < K; ++k) sum[d] += to_accumulate(rows[k][d]);
}

template <class S>
void sum_gradients(const S* gradient, std::int64_t width, const Entry* entries, std::int64_t count,
                   Accumulate<S>* sum) {
  constexpr int kRows = 4;  // as many streams from memory at a time
  __builtin_memset(sum, 0, width * sizeof(*sum));
  std::int64_t i = 0;
  for (; i + kRows <= count; i += kRows) add_gradients<kRows>(gradient, width, entries + i, sum);
  for (; i < count; ++i) add_gradients<1>(gradient, width, entries + i, sum);
}

// A touched row of the weight, with its gradient: as it came, or summed.
template <class S, class Gradient>
struct Row {
  std::int64_t index;
  const Gradient* gradient;
  S* weight;
  Accumulate<S> growth;  // f - 1

  // Infinities survive a step without decay.
  LMKERN_INLINE Vec<Accumulate<S>> decayed_weight(std::int64_t d, std::int64_t n) const {
    const Vec<Accumulate<S>> w = load_n(weight + d, n);
    return growth == 0 ? w : w + w * growth;
  }
};

// update(row) for each touched row.
template <class S, class Update>
void for_rows(const OptimizerTable& a, const Update& update) {
  using T = Accumulate<S>;
  const std::int64_t width = a.weight.shape[1], stride = a.weight.strides[0];
  const auto* const rows = a.rows.ptr<const std::int64_t>();
  const S* const gradient = a.gradient.ptr<const S>();
  auto* const touched = a.touched.ptr<double>();
  std::int64_t count = a.rows.defined() ? a.rows.shape[0] : a.weight.shape[0];
  const int most_threads = count * width < kForkElements ? 1 : max_threads();

  const Entry* entries = nullptr;  // absent: the k-th row has gradient k
  std::int64_t* starts = nullptr;
  T* sums = nullptr;  // a row for each thread
  if (a.rows.defined() && !strictly_ascending(rows, count)) {
    Entry *from, *to;
    Scratch::place([&](Scratch& scratch) {
      from = scratch.take<Entry>(count);
      to = scratch.take<Entry>(count);
      starts = scratch.take<std::int64_t>(count + 1);
      sums = scratch.take<T>(most_threads * width);
    });
    entries = sort_by_row(rows, count, a.weight.shape[0], from, to);
    count = find_groups(entries, count, starts);
  }

  WorkQueue queue((count + kBlockRows - 1) / kBlockRows);
  parallel(most_threads, [&](int thread, int) {
    T* const sum = sums + thread * width;
    for (std::int64_t block; queue.next(&block);) {
      const std::int64_t end = (block + 1) * kBlockRows < count ? (block + 1) * kBlockRows : count;
      for (std::int64_t k = block * kBlockRows; k < end; ++k) {
        const Entry* const group = entries != nullptr ? entries + starts[k] : nullptr;
        const Entry first = group != nullptr ? *group : Entry{rows != nullptr ? rows[k] : k, k};
        double factor = a.decay;
        if (touched != nullptr) {
          factor /= touched[first.row];
          touched[first.row] = a.decay;
        }
        S* const weight = a.weight.ptr<S>() + first.row * stride;
        const T growth = static_cast<T>(factor - 1);
        if (group != nullptr && starts[k + 1] - starts[k] > 1) {
          sum_gradients(gradient, width, group, starts[k + 1] - starts[k], sum);
          update(Row<S, T>{first.row, sum, weight, growth});
        } else {
          const S* const own = gradient != nullptr ? gradient + first.n * width : nullptr;
          update(Row<S, S>{first.row, own, weight, growth});
        }
      }
    }
  });
}

// f(d, n): the n lanes from element d on, for each vector of a row.
template <class T, class F>
LMKERN_INLINE void for_vectors(std::int64_t width, const F& f) {
  std::int64_t d = 0;
  for (; d + kLanes<T> <= width; d += kLanes<T>) f(d, kLanes<T>);
  if (d < width) f(d, width - d);
}
// The arguments of such an f.
#define LMKERN_LANES (std::int64_t d, std::int64_t n) __attribute__((always_inline))

template <class S>
void sgd(const OptimizerTable& a) {
  using T = Accumulate<S>;
  const std::int64_t width = a.weight.shape[1];
  const T step = static_cast<T>(a.step_size * a.gradient_scale);
  const bool only_decay = !a.gradient.defined();
  for_rows<S>(a, [&](const auto& row) {
    if (!only_decay)
      for_vectors<T>(width, [&] LMKERN_LANES {
        store_n(row.weight + d, row.decayed_weight(d, n) - step * load_n(row.gradient + d, n), n);
      });
    else if (row.growth != 0)
      for_vectors<T>(width,
                     [&] LMKERN_LANES { store_n(row.weight + d, row.decayed_weight(d, n), n); });
  });
}

template <class S>
void adagrad(const EmbeddingAdagradArgs& a) {
  using T = Accumulate<S>;
  const std::int64_t width = a.table.weight.shape[1];
  const T scale = static_cast<T>(a.table.gradient_scale), step = static_cast<T>(a.table.step_size);
  const T weight_decay = static_cast<T>(a.weight_decay), eps = static_cast<T>(a.eps);
  const auto gradient = [&](const auto& row, std::int64_t d,
                            std::int64_t n) __attribute__((always_inline)) {
    const Vec<T> g = load_n(row.gradient + d, n) * scale;
    return weight_decay == 0 ? g : g + weight_decay * load_n(row.weight + d, n);
  };
  const auto by_element = [&](const auto& row) {
    T* const sum = a.sum.ptr<T>() + row.index * width;
    for_vectors<T>(width, [&] LMKERN_LANES {
      const Vec<T> g = gradient(row, d, n), s = load_n(sum + d, n) + g * g;
      store_n(sum + d, s, n);
      store_n(row.weight + d, row.decayed_weight(d, n) - step * (g / (sqrt(s) + eps)), n);
    });
  };
  const auto by_row = [&](const auto& row) {
    Vec<T> squares{};
    for_vectors<T>(width, [&] LMKERN_LANES {
      const Vec<T> g = gradient(row, d, n);
      squares += g * g;
    });
    T* const sum = a.sum.ptr<T>() + row.index;
    *sum += sum_lanes(squares) / static_cast<T>(width);
    const T rate = step / (sqrt(splat(*sum))[0] + eps);
    for_vectors<T>(width, [&] LMKERN_LANES {
      const Vec<T> g = gradient(row, d, n);
      store_n(row.weight + d, row.decayed_weight(d, n) - rate * g, n);
    });
  };
  if (a.sum.ndim == 1)
    for_rows<S>(a.table, by_row);
  else
    for_rows<S>(a.table, by_element);
}

template <class S>
void adam(const EmbeddingAdamArgs& a) {
  using T = Accumulate<S>;
  const std::int64_t width = a.table.weight.shape[1];
  const T scale = static_cast<T>(a.table.gradient_scale), step = static_cast<T>(a.table.step_size);
  const T eps = static_cast<T>(a.eps), keep = static_cast<T>(a.beta2);
  const T blend1 = static_cast<T>(1 - a.beta1), blend2 = static_cast<T>(1 - a.beta2);
  for_rows<S>(a.table, [&](const auto& row) {
    T* const exp_avg = a.exp_avg.ptr<T>() + row.index * width;
    T* const exp_avg_sq = a.exp_avg_sq.ptr<T>() + row.index * width;
    for_vectors<T>(width, [&] LMKERN_LANES {
      const Vec<T> g = load_n(row.gradient + d, n) * scale;
      Vec<T> m = load_n(exp_avg + d, n), v = load_n(exp_avg_sq + d, n);
      m += blend1 * (g - m);
      v = keep * v + blend2 * g * g;
      store_n(exp_avg + d, m, n);
      store_n(exp_avg_sq + d, v, n);
      store_n(row.weight + d, row.decayed_weight(d, n) - step * (m / (sqrt(v) + eps)), n);
    });
  });
}

#undef LMKERN_LANES

}  // namespace

void embedding_sgd(const EmbeddingSgdArgs& a) {
  dispatch_float_types(a.table.weight.dtype,
                       [&](auto s) { sgd<typename decltype(s)::type>(a.table); });
}

void embedding_adagrad(const EmbeddingAdagradArgs& a) {
  dispatch_float_types(a.table.weight.dtype,
                       [&](auto s) { adagrad<typename decltype(s)::type>(a); });
}

void embedding_adam(const EmbeddingAdamArgs& a) {
  dispatch_float_types(a.table.weight.dtype, [&](auto s) { adam<typename decltype(s)::type>(a); });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
