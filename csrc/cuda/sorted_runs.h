// Sums of runs of equal rows in a sorted list of positions: the gradients of lookups.
//
//   target[rows[i], :] = scale * sum over all i with that row of terms(order[i])
//
// One write for each row, no atomics, an order of addition that depends on the list alone, and no run
// so long that it becomes serial, in two kernels:
//   sum_runs      The list is cut into chunks. A thread has one piece of columns of one chunk: the runs
//                 that begin there, each to its end if that is in this chunk or the next. Of longer
//                 runs each chunk's part goes to the workspace: partial 0 of a chunk is of a run that
//                 began before, partial 1 of one that begins in it.
//   add_partials  A block adds the partials of the long runs that begin in its chunks: each of its
//                 warps some neighbouring ones, then those sums in their order.
//
// A Terms<S, kVec> says what is added: a Terms::Term has load(terms, position, column) and add(sum), which
// mean kVec elements from `column` on; kInFlight of them are loaded before the first is added; kMinBlocks
// leaves registers for that.
#pragma once
#include "cuda/device/barrier.h"
#include "cuda/device/shuffle.h"
#include "cuda/rows.h"
#include "cuda/stream.h"

namespace lmkern::cuda {

inline constexpr int kRunThreads = 256;
inline constexpr int kRunWarps = kRunThreads / 32;
inline constexpr int kPartialsInFlight = 4;
inline constexpr int kChunksOfABlock = 16;  // of add_partials

// Short chunks for short lists, which would not fill the GPU; long ones have fewer partials.
inline std::int64_t chunk_length(std::int64_t count) {
  return count <= 1 << 13 ? 8 : (count <= 1 << 16 ? 16 : (count <= 1 << 18 ? 32 : 64));
}

template <class S>
struct SortedRuns {
  using T = Accumulate<S>;
  const std::int32_t* rows;   // [count] ascending
  const std::int64_t* order;  // [count]
  std::int64_t count, chunk, chunks;
  std::int64_t width, columns;  // columns: pieces of a row
  std::int64_t targets;         // rows of target; others have no gradient
  S* target;
  T* partials;  // [chunks, 2, width]
  bool mean;    // divided by the number of terms
  T scale;

  LMKERN_DEVICE bool has_target(std::int32_t row) const { return row >= 0 && row < targets; }
  LMKERN_DEVICE std::int64_t end_of(std::int64_t c) const {
    return (c + 1) * chunk < count ? (c + 1) * chunk : count;
  }
  // Whether the last run of chunk c begins in it and does not end in the next.
  LMKERN_DEVICE bool begins_long_run(std::int64_t c) const {
    const std::int64_t begin = c * chunk, next_end = (c + 2) * chunk;
    if (next_end >= count) return false;
    const std::int32_t row = rows[begin + chunk - 1];
    return rows[next_end] == row && (begin == 0 || rows[begin - 1] != row) && has_target(row);
  }

  template <int kVec>
  LMKERN_DEVICE void write(const Piece<T, kVec>& sum, std::int32_t row, std::int64_t column,
                           std::int64_t terms) const {
    const T factor = mean ? scale / static_cast<T>(terms) : scale;
    Piece<S, kVec> piece;
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i) piece.at[i] = from_accumulate<S>(sum.at[i] * factor);
    piece.store(target + row * width + column);
  }
};

template <class T, int kVec>
LMKERN_DEVICE void set_zero(Piece<T, kVec>& piece) {
  LMKERN_UNROLL
  for (int i = 0; i < kVec; ++i) piece.at[i] = T(0);
}
template <class T, int kVec>
LMKERN_DEVICE void add_to(Piece<T, kVec>& sum, const Piece<T, kVec>& term) {
  LMKERN_UNROLL
  for (int i = 0; i < kVec; ++i) sum.at[i] += term.at[i];
}

// registers: 128, spills: 0
template <class S, int kVec, template <class, int> class Terms>
LMKERN_KERNEL(kRunThreads, (Terms<S, kVec>::kMinBlocks))
sum_runs(SortedRuns<S> r, Terms<S, kVec> terms) {
  using T = Accumulate<S>;
  constexpr int kInFlight = Terms<S, kVec>::kInFlight;
  const RowThread me =
      split_index(std::int64_t{block_x()} * kRunThreads + thread_index(), r.columns);
  if (me.row >= r.chunks) return;
  const std::int64_t column = me.column * kVec, begin = me.row * r.chunk, end = r.end_of(me.row);
  const std::int32_t first_row = r.rows[begin], last_row = r.rows[end - 1];
  const bool goes_on = end < r.count && r.rows[end] == last_row;

  // The run that began before belongs to the chunk before, if it begins there and ends here.
  std::int64_t first = begin;
  bool head = begin > 0 && r.rows[begin - 1] == first_row;
  const bool all_head = head && first_row == last_row;
  if (head) {
    const std::int64_t before = begin - r.chunk;
    const bool began_earlier = before > 0 && r.rows[before - 1] == first_row;
    if (!began_earlier && !(all_head && goes_on)) {
      head = false;
      while (first < end && r.rows[first] == first_row) ++first;
    }
  }
  // The run that begins here and goes on.
  std::int64_t stop = end;
  const bool tail = r.begins_long_run(me.row);
  if (goes_on && !all_head && !tail) {
    const std::int64_t next_end = r.end_of(me.row + 1);
    while (stop < next_end && r.rows[stop] == last_row) ++stop;
  }
  if (first >= stop) return;

  Piece<T, kVec> sum;
  set_zero(sum);
  std::int32_t current = r.rows[first];
  std::int64_t run_begin = first;
  const auto finish = [&](std::int64_t run_end, bool is_tail) {
    if (!r.has_target(current)) return;
    if (head || is_tail)
      sum.store(r.partials + (2 * me.row + (head ? 0 : 1)) * r.width + column);
    else
      r.write(sum, current, column, run_end - run_begin);
  };
  for (std::int64_t i = first; i < stop; i += kInFlight) {
    typename Terms<S, kVec>::Term term[kInFlight];
    std::int32_t row[kInFlight];
    std::int64_t n[kInFlight];  // read with the rows, not after them
    LMKERN_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      const bool inside = i + k < stop;
      row[k] = inside ? r.rows[i + k] : -1;
      n[k] = inside ? r.order[i + k] : 0;
    }
    LMKERN_UNROLL
    for (int k = 0; k < kInFlight; ++k)
      if (i + k < stop && r.has_target(row[k])) term[k].load(terms, n[k], column);
    LMKERN_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      if (i + k >= stop) continue;
      if (row[k] != current) {
        finish(i + k, false);
        head = false;
        set_zero(sum);
        current = row[k];
        run_begin = i + k;
      }
      if (r.has_target(row[k])) term[k].add(sum);
    }
  }
  finish(stop, tail);
}

// Positions of the run of `row` that begins in chunk `from` and ends in chunk `to`.
template <class S>
LMKERN_DEVICE std::int64_t run_length(const SortedRuns<S>& r, std::int32_t row, std::int64_t from,
                                      std::int64_t to) {
  std::int64_t begin = r.end_of(from) - 1, end = to * r.chunk;
  while (begin > from * r.chunk && r.rows[begin - 1] == row) --begin;
  while (end < r.end_of(to) && r.rows[end] == row) ++end;
  return end - begin;
}

// registers: 80, spills: 0
template <class S, int kVec>
LMKERN_KERNEL(kRunThreads, 3)
add_partials(SortedRuns<S> r) {
  using T = Accumulate<S>;
  T* const shared = shared_memory<T>();  // [kRunWarps, 32 kVec]
  const RowThread block = split_index(block_x(), (r.columns + 31) / 32);
  const std::int64_t first_chunk = block.row * kChunksOfABlock;
  const int lane = lane_index(), warp = warp_index();
  const std::int64_t piece = block.column * 32 + lane, column = piece * kVec;
  const bool active = piece < r.columns;
  std::uint32_t found = vote(lane < kChunksOfABlock && first_chunk + lane < r.chunks &&
                             r.begins_long_run(first_chunk + lane));
  for (std::int64_t c = first_chunk; found != 0; ++c, found >>= 1) {
    if ((found & 1) == 0) continue;
    // The last chunk that begins with this run: steps that double, then halve.
    const std::int32_t row = r.rows[r.end_of(c) - 1];
    std::int64_t last = c + 2, step = 1;
    const auto reaches = [&](std::int64_t to) {
      return to < r.chunks && r.rows[to * r.chunk] == row;
    };
    for (; reaches(last + step); step *= 2) last += step;
    for (; step > 0; step /= 2)
      if (reaches(last + step)) last += step;

    const std::int64_t parts = last - c + 1;
    const auto part = [&](std::int64_t k) {
      return r.partials + (2 * (c + k) + (k == 0 ? 1 : 0)) * r.width + column;
    };
    Piece<T, kVec> sum;
    set_zero(sum);
    if (active) {
      const std::int64_t end = parts * (warp + 1) / kRunWarps;
      for (std::int64_t k = parts * warp / kRunWarps; k < end; k += kPartialsInFlight) {
        Piece<T, kVec> terms[kPartialsInFlight];
        LMKERN_UNROLL
        for (int j = 0; j < kPartialsInFlight; ++j)
          if (k + j < end) terms[j].load(part(k + j));
        LMKERN_UNROLL
        for (int j = 0; j < kPartialsInFlight; ++j)
          if (k + j < end) add_to(sum, terms[j]);
      }
    }
    sum.store(shared + (warp * 32 + lane) * kVec);
    block_barrier();
    if (warp == 0 && active) {
      for (int other = 1; other < kRunWarps; ++other) {
        Piece<T, kVec> term;
        term.load(shared + (other * 32 + lane) * kVec);
        add_to(sum, term);
      }
      r.write(sum, row, column, r.mean ? run_length(r, row, c, last) : 1);
    }
    block_barrier();
  }
}

// Bytes of the partials.
inline std::int64_t partial_bytes(std::int64_t count, std::int64_t width, bool is_double) {
  const std::int64_t chunk = chunk_length(count), chunks = (count + chunk - 1) / chunk;
  return chunks < 3 ? 0 : chunks * 2 * width * (is_double ? 8 : 4);  // no run is longer than two
}

// `rows`, `order`: of `count` sorted positions. `partials`: of partial_bytes, at a multiple of 16.
template <class S, int kVec, template <class, int> class Terms>
void launch_sum_runs(const TensorView& rows, const TensorView& order, const TensorView& d_weight,
                     void* partials, bool mean, double scale, const Terms<S, kVec>& terms) {
  const std::int64_t count = rows.shape[0], width = d_weight.shape[1], columns = width / kVec;
  if (count == 0 || width == 0 || d_weight.shape[0] == 0) return;
  const std::int64_t chunk = chunk_length(count), chunks = (count + chunk - 1) / chunk;
  const SortedRuns<S> runs{rows.ptr<const std::int32_t>(),
                           order.ptr<const std::int64_t>(),
                           count,
                           chunk,
                           chunks,
                           width,
                           columns,
                           d_weight.shape[0],
                           d_weight.ptr<S>(),
                           static_cast<Accumulate<S>*>(partials),
                           mean,
                           static_cast<Accumulate<S>>(scale)};
  launch<sum_runs<S, kVec, Terms>>(
      Grid{.x = blocks_for(chunks * columns, kRunThreads), .threads = kRunThreads},
      current_stream(), runs, terms);
  if (chunks < 3) return;
  launch<add_partials<S, kVec>>(
      Grid{.x = static_cast<unsigned>((chunks + kChunksOfABlock - 1) / kChunksOfABlock *
                                      ((columns + 31) / 32)),
           .threads = kRunThreads,
           .shared_bytes = kRunThreads * kVec * sizeof(Accumulate<S>)},
      current_stream(), runs);
}

}  // namespace lmkern::cuda
