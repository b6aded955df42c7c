#include "simt/race.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <unordered_map>

namespace lmkern::simt::race {

#if !defined(LMKERN_SIMT_RACE)

void access(const void*, std::size_t, Kind, const Place&) {}
void add_memory(const void*, std::size_t, const Block*) {}
void remove_memory(const void*) {}
void forget() {}
void publish(Clock&) {}
void learn(const Clock&) {}
void take_over(const AsyncCopy&, const Place&) {}
void give_back(const AsyncCopy&, int, int, std::uint32_t) {}
std::string locate(std::uintptr_t) { return "?"; }

#else

namespace {

// Memory is followed in pieces of two bytes: nothing that two threads write is smaller.
constexpr std::uintptr_t kCellBytes = 2, kPageBytes = 4096;

struct Event {
  int block = -1, slot = 0;  // slot: the thread, or its number of threads for the copy engine
  std::uint32_t epoch = 0;
  bool atomic = false;
  Place place;
};

// Reads of one warp in one epoch; of reads that are over when another happens, only that is kept.
struct Reads {
  int block, warp;
  std::uint32_t epoch, lanes;
  bool atomic;
  Place place;
};

struct Cell {
  Event write;
  std::vector<Reads> reads;
  bool written = false, owned = false;  // owned by an asynchronous copy
  Place owner;
};

struct Page {
  Cell cells[kPageBytes / kCellBytes];
};

struct Region {
  std::uintptr_t begin, end;
  const Block* block;  // of shared memory
};

std::vector<Region> regions;
std::unordered_map<std::uintptr_t, std::unique_ptr<Page> > pages;
std::uintptr_t last_page = 0;
Page* last = nullptr;

Cell& cell_at(std::uintptr_t address) {
  const std::uintptr_t page = address / kPageBytes;
  if (last == nullptr || page != last_page) {
    auto& found = pages[page];
    if (!found) found = std::make_unique<Page>();
    last = found.get();
    last_page = page;
  }
  return last->cells[address % kPageBytes / kCellBytes];
}

std::string say(const Place& place) {
  return place.code != 0 ? locate(place.code) : place_of(place.site);
}

[[noreturn]] void report_at(const Place& place, const std::string& message) {
  Machine& m = machine();
  if (m.error.empty()) m.error = say(place) + ": " + m.launch.kernel + ": " + message;
  report({}, "");
}

const Region* region_of(std::uintptr_t begin, std::uintptr_t end) {
  // The latest first: a launch adds shared memory after global.
  for (auto region = regions.rbegin(); region != regions.rend(); ++region)
    if (begin >= region->begin && end <= region->end) return &*region;
  return nullptr;
}

// Constants and code of this module.
bool is_static(std::uintptr_t address) {
  struct Search {
    std::uintptr_t address;
    bool found;
  } search{address, false};
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* data) {
        auto* const s = static_cast<Search*>(data);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          const std::uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
          if (segment.p_type == PT_LOAD && s->address >= begin &&
              s->address < begin + segment.p_memsz)
            s->found = true;
        }
        return s->found ? 1 : 0;
      },
      &search);
  return search.found;
}

[[noreturn]] void report_out_of_bounds(std::uintptr_t begin, std::size_t bytes, Kind kind,
                                       const Place& place) {
  const Region* nearest = nullptr;
  std::uintptr_t distance = ~std::uintptr_t{0};
  for (const Region& region : regions) {
    const std::uintptr_t d = begin >= region.end    ? begin - region.end
                             : begin < region.begin ? region.begin - begin
                                                    : 0;
    if (d < distance) {
      distance = d;
      nearest = &region;
    }
  }
  std::string message =
      "out of bounds: " + name_of(self()) +
      (kind == Kind::kRead || kind == Kind::kAtomicRead ? " reads " : " writes ") +
      std::to_string(bytes) + " bytes outside all known memory";
  if (nearest != nullptr)
    message += ", " + std::to_string(distance) +
               (begin >= nearest->end    ? " bytes after the end of "
                : begin < nearest->begin ? " bytes before the begin of "
                                         : " bytes across the end of ") +
               (nearest->block != nullptr ? "shared memory of " : "global memory of ") +
               std::to_string(nearest->end - nearest->begin) + " bytes";
  report_at(place, message);
}

bool over(const Thread& me, int block, int slot, std::uint32_t epoch) {
  if (block == me.block->number && slot == me.index) return true;
  return me.clock.at(block, slot) >= epoch;
}

bool over(const Thread& me, const Reads& reads) {
  for (int lane = 0; lane < 32; ++lane)
    if ((reads.lanes >> lane & 1) && !over(me, reads.block, reads.warp * 32 + lane, reads.epoch))
      return false;
  return true;
}

std::string who(int block, int slot) {
  if (slot == machine().launch.threads)
    return "an asynchronous copy of block " + std::to_string(block);
  return "thread " + std::to_string(slot) + " of block " + std::to_string(block);
}

void check_cell(Cell& cell, bool shared, bool writes, bool atomic, const Place& place) {
  const Thread& me = self();
  const char* const mine = writes ? "writes" : "reads";
  if (cell.owned)
    report_at(place, name_of(me) + " " + mine +
                         " memory that an asynchronous copy still owns, begun at " +
                         say(cell.owner));
  const Event& w = cell.write;
  if (w.block >= 0 && !(atomic && w.atomic) && !over(me, w.block, w.slot, w.epoch))
    report_at(place, "race: " + name_of(me) + " " + mine + " what " + who(w.block, w.slot) +
                         " writes at " + say(w.place) + ", and nothing orders the two");
  if (!writes) {
    if (shared && !cell.written)
      report_at(place,
                "uninitialised: " + name_of(me) + " reads shared memory that nobody has written");
    return;
  }
  for (const Reads& r : cell.reads)
    if (!(atomic && r.atomic) && !over(me, r)) {
      int lane = 0;
      while (!(r.lanes >> lane & 1) || over(me, r.block, r.warp * 32 + lane, r.epoch)) ++lane;
      report_at(place, "race: " + name_of(me) + " writes what " + who(r.block, r.warp * 32 + lane) +
                           " reads at " + say(r.place) + ", and nothing orders the two");
    }
}

void note_read(Cell& cell, bool atomic, const Place& place) {
  const Thread& me = self();
  const int block = me.block->number, warp = me.index / 32;
  const std::uint32_t lane = 1u << (me.index % 32);
  for (Reads& r : cell.reads)
    if (r.block == block && r.warp == warp && r.epoch == me.epoch && r.atomic == atomic) {
      r.lanes |= lane;
      return;
    }
  if (cell.reads.size() >= 4)
    cell.reads.erase(
        std::remove_if(cell.reads.begin(), cell.reads.end(),
                       [&](const Reads& r) { return r.atomic == atomic && over(me, r); }),
        cell.reads.end());
  cell.reads.push_back({block, warp, me.epoch, lane, atomic, place});
}

}  // namespace

void access(const void* address, std::size_t bytes, Kind kind, const Place& place) {
  if (bytes == 0 || machine_or_null() == nullptr || machine().running == nullptr ||
      machine().combining)
    return;
  Thread& me = self();
  if (me.fiber->holds(address)) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(address), end = begin + bytes;
  const Region* const region = region_of(begin, end);
  if (region == nullptr) {
    if (is_static(begin)) return;
    report_out_of_bounds(begin, bytes, kind, place);
  }
  const bool writes = kind == Kind::kWrite || kind == Kind::kAtomicWrite;
  const bool atomic = kind == Kind::kAtomicRead || kind == Kind::kAtomicWrite;
  for (std::uintptr_t at = begin / kCellBytes * kCellBytes; at < end; at += kCellBytes) {
    Cell& cell = cell_at(at);
    check_cell(cell, region->block != nullptr, writes, atomic, place);
    if (writes) {
      cell.write = {me.block->number, me.index, me.epoch, atomic, place};
      cell.written = true;
      cell.reads.clear();
    } else {
      note_read(cell, atomic, place);
    }
  }
}

void add_memory(const void* data, std::size_t bytes, const Block* block) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  regions.push_back({begin, begin + bytes, block});
  if (block == nullptr) return;
  // Another block's memory may have lain here.
  for (std::uintptr_t at = begin / kPageBytes; at <= (begin + bytes - 1) / kPageBytes; ++at) {
    const auto page = pages.find(at);
    if (page == pages.end()) continue;
    for (std::uintptr_t i = 0; i < kPageBytes / kCellBytes; ++i) {
      const std::uintptr_t address = at * kPageBytes + i * kCellBytes;
      if (address >= begin && address < begin + bytes) page->second->cells[i] = Cell{};
    }
  }
}

void remove_memory(const void* data) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  for (auto region = regions.rbegin(); region != regions.rend(); ++region)
    if (region->begin == begin) {
      regions.erase(std::next(region).base());
      return;
    }
}

void forget() {
  pages.clear();
  last = nullptr;
}

void publish(Clock& clock) {
  Thread& me = self();
  clock.join(me.clock);
  clock.set(me.block->number, me.index, machine().launch.threads + 1, me.epoch++);
}

void learn(const Clock& clock) { self().clock.join(clock); }

void take_over(const AsyncCopy& copy, const Place& place) {
  access(copy.to, copy.bytes, Kind::kWrite, place);
  const auto begin = reinterpret_cast<std::uintptr_t>(copy.to);
  for (std::uintptr_t at = begin; at < begin + copy.bytes; at += kCellBytes) {
    cell_at(at).owned = true;
    cell_at(at).owner = place;
  }
}

void give_back(const AsyncCopy& copy, int block, int slot, std::uint32_t epoch) {
  const auto begin = reinterpret_cast<std::uintptr_t>(copy.to);
  for (std::uintptr_t at = begin; at < begin + copy.bytes; at += kCellBytes) {
    Cell& cell = cell_at(at);
    cell.owned = false;
    cell.written = true;
    cell.reads.clear();
    cell.write = {block, slot, epoch, false, {0, copy.site}};
  }
}

std::string locate(std::uintptr_t code) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(code), &info) == 0 || info.dli_fname == nullptr) return "?";
  char command[1024];
  std::snprintf(
      command, sizeof command, "addr2line -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
      static_cast<std::size_t>(code - 1 - reinterpret_cast<std::uintptr_t>(info.dli_fbase)));
  FILE* const pipe = popen(command, "r");
  if (pipe == nullptr) return "?";
  char line[512] = "?";
  if (std::fgets(line, sizeof line, pipe) == nullptr) line[0] = '?';
  pclose(pipe);
  std::string place = line;
  while (!place.empty() && (place.back() == '\n' || place.back() == ' ')) place.pop_back();
  const std::size_t discriminator = place.find(" (discriminator");
  return discriminator == std::string::npos ? place : place.substr(0, discriminator);
}

#endif

}  // namespace lmkern::simt::race
