// Vector clocks: which events of other threads a thread knows to be over.
//
// Each thread counts epochs; an event of thread u in epoch e is over for a thread whose clock has
// u at e or later. A clock keeps a segment for each block it has heard of, shared with the other
// clocks that know the same, so that a barrier costs one segment and not one for each thread.
// Source: Flanagan & Freund 2009 (FastTrack); Lamport 1978.
#pragma once
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace lmkern::simt {

class Clock {
 public:
  // The epoch up to which `slot` of `block` is known.
  std::uint32_t at(int block, int slot) const {
    for (const auto& [b, segment] : segments_)
      if (b == block) return (*segment)[static_cast<std::size_t>(slot)];
    return 0;
  }

  void set(int block, int slot, int slots, std::uint32_t epoch) {
    for (auto& [b, segment] : segments_) {
      if (b != block) continue;
      if ((*segment)[static_cast<std::size_t>(slot)] == epoch) return;
      if (segment.use_count() > 1) segment = std::make_shared<Segment>(*segment);
      (*segment)[static_cast<std::size_t>(slot)] = epoch;
      return;
    }
    auto segment = std::make_shared<Segment>(static_cast<std::size_t>(slots), 0u);
    (*segment)[static_cast<std::size_t>(slot)] = epoch;
    segments_.emplace_back(block, std::move(segment));
  }

  void join(const Clock& other) {
    for (const auto& [block, theirs] : other.segments_) {
      bool known = false;
      for (auto& [b, ours] : segments_) {
        if (b != block) continue;
        known = true;
        if (ours == theirs) break;
        auto both = std::make_shared<Segment>(*ours);
        for (std::size_t i = 0; i < both->size(); ++i)
          if ((*theirs)[i] > (*both)[i]) (*both)[i] = (*theirs)[i];
        ours = *both == *theirs ? theirs : std::move(both);
      }
      if (!known) segments_.emplace_back(block, theirs);
    }
  }

  void clear() { segments_.clear(); }

 private:
  using Segment = std::vector<std::uint32_t>;
  std::vector<std::pair<int, std::shared_ptr<Segment>>> segments_;
};

}  // namespace lmkern::simt
