// EmbeddingBags on a GPU (csrc/ops/embedding_bag.h): where bags begin and end. Offsets that do not fit
// lead to bags that do: within [0, N], and empty where they would end before they begin.
#pragma once
#include "cuda/index_errors.h"
#include "cuda/rows.h"
#include "ops/embedding_bag.h"

namespace lmkern::cuda {

struct BagView {
  Integers indices, offsets;  // offsets.data null: bags of `length`
  std::int64_t positions;     // N
  std::int64_t bags;          // B
  std::int64_t given;         // how many offsets there are
  std::int64_t length;
  std::int64_t padding_idx;
  const std::int64_t* kept;  // positions 0 .. n that are no padding; null: all are none
  bool mean;

  BagView(const EmbeddingBags& b, const TensorView& kept_)
      : indices(b.indices),
        offsets(b.offsets),
        positions(b.indices.numel()),
        bags(b.indices.shape[0]),
        given(0),
        length(b.indices.ndim == 2 ? b.indices.shape[1] : 0),
        padding_idx(b.padding_idx),
        kept(kept_.ptr<const std::int64_t>()),
        mean(b.mode == BagMode::kMean) {
    if (!b.offsets.defined()) return;
    given = b.offsets.shape[0];
    bags = given - (b.include_last_offset ? 1 : 0);
  }

  struct Range {
    std::int64_t begin, end;
  };
  // Where a bag begins, as the offsets have it.
  LMKERN_DEVICE std::int64_t offset(std::int64_t bag) const {
    if (offsets.data == nullptr) return bag * length;
    return bag < given ? offsets.at(bag) : positions;
  }
  LMKERN_DEVICE Range range(std::int64_t bag) const {
    Range r{offset(bag), offset(bag + 1)};
    r.begin = r.begin < 0 ? 0 : (r.begin > positions ? positions : r.begin);
    r.end = r.end < r.begin ? r.begin : (r.end > positions ? positions : r.end);
    return r;
  }
  // Reports what is wrong with where a bag begins, and with where the last one ends.
  LMKERN_DEVICE void check_offsets(std::int64_t bag, const IndexErrors& errors) const {
    if (offsets.data == nullptr) return;
    const std::int64_t least = bag == 0 ? 0 : offsets.at(bag - 1), begin = offsets.at(bag);
    if (begin < least || begin > (bag == 0 ? 0 : positions)) errors.report(begin, bag);
    if (bag + 1 < bags || bag + 1 >= given) return;
    const std::int64_t end = offsets.at(bag + 1);
    if (end < begin || end > positions) errors.report(end, bag + 1);
  }

  // A position as its bag sees it.
  struct Term {
    std::int64_t bag;    // -1: none, or padding
    std::int64_t term;   // which of its bag's
    std::int64_t count;  // of its bag's
  };
  LMKERN_DEVICE Term locate(std::int64_t n) const {
    std::int64_t bag = -1;
    if (offsets.data == nullptr) {
      bag = split_index(n, length).row;
    } else {  // the last bag that begins at or before n; empty ones begin where the next one does
      std::int64_t low = 0, high = given;
      while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (offsets.at(middle) <= n)
          low = middle + 1;
        else
          high = middle;
      }
      bag = low - 1;
    }
    if (bag < 0 || bag >= bags || (padding_idx >= 0 && indices.at(n) == padding_idx))
      return {-1, 0, 0};
    const Range r = range(bag);
    if (kept == nullptr) return {bag, n - r.begin, r.end - r.begin};
    const std::int64_t before = r.begin > 0 ? kept[r.begin - 1] : 0;
    return {bag, kept[n] - 1 - before, (r.end > 0 ? kept[r.end - 1] : 0) - before};
  }
  // 1, or for means 1 / the number of terms.
  template <class T>
  LMKERN_DEVICE T factor(std::int64_t count) const {
    return mean ? T(1) / static_cast<T>(count) : T(1);
  }
};

}  // namespace lmkern::cuda
