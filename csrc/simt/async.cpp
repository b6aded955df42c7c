// Copies that run beside the threads: cp.async with its groups, bulk copies, and the mbarriers they
// complete on.
#include <cstring>

#include "simt/machine.h"
#include "simt/race.h"

namespace lmkern::simt {
namespace {

// NaN, until the copy is waited for.
void poison(const AsyncCopy& copy) { std::memset(copy.to, 0xff, copy.bytes); }

void perform(const AsyncCopy& copy) {
  const void* const from = copy.from != nullptr ? copy.from : copy.value;
  std::memcpy(copy.to, from, copy.valid);
  std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
}

Mbarrier& find(std::uint64_t* barrier, const char* operation, Site site) {
  const auto found = machine().mbarriers.find(barrier);
  if (found == machine().mbarriers.end())
    report(site, std::string(operation) + ": no mbarrier was initialised here");
  return found->second;
}

// A phase is complete when all arrivals and all bytes have come.
void advance(Mbarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.pending = b.count;
  ++b.phase;
  b.before = b.now;
  b.now.clear();
  machine().progress = true;
}

void arrive(Mbarrier& b, std::uint32_t bytes, Site site) {
  race::publish(b.now);
  if (b.pending == 0)
    report(site, "mbarrier: more arrivals in this phase than the " + std::to_string(b.count) +
                     " it was initialised for");
  b.bytes += bytes;
  --b.pending;
  advance(b);
}

// The block whose shared memory holds the address.
Block* owner(const void* address) {
  for (const auto& block : machine().blocks) {
    const char* const begin = block->shared.get();
    if (address >= begin && address < begin + machine().launch.shared_bytes) return block.get();
  }
  return nullptr;
}

void issue(AsyncCopy copy) {
  Block& block = *self().block;
  race::take_over(copy, {0, copy.site});
  poison(copy);
  race::publish(copy.clock);
  copy.epoch = block.agent_epoch++;
  copy.clock.set(block.number, machine().launch.threads, machine().launch.threads + 1, copy.epoch);
  machine().copies.push_back(std::move(copy));
}

}  // namespace

void copy_async(void* shared, const void* global, int bytes, int valid_bytes, Site site) {
  if (bytes != 4 && bytes != 8 && bytes != 16)
    report(site, "cp.async copies 4, 8 or 16 bytes, got " + std::to_string(bytes));
  if (valid_bytes < 0 || valid_bytes > bytes)
    report(site, "cp.async: between 0 and " + std::to_string(bytes) + " bytes can be valid, got " +
                     std::to_string(valid_bytes));
  check_aligned(shared, static_cast<std::size_t>(bytes), site);
  check_aligned(global, static_cast<std::size_t>(bytes), site);
  if (owner(shared) != self().block)
    report(site, "cp.async: the target is not in this block's shared memory");
  AsyncCopy copy;
  copy.to = shared;
  copy.from = global;
  copy.bytes = static_cast<std::uint32_t>(bytes);
  copy.valid = static_cast<std::uint32_t>(valid_bytes);
  copy.issuer = &self();
  copy.site = site;
  if (valid_bytes > 0) check_read(global, copy.valid, site);
  race::take_over(copy, {0, site});
  poison(copy);
  self().uncommitted.push_back(copy);
}

void copy_commit() {
  Thread& thread = self();
  thread.groups.push_back(std::move(thread.uncommitted));
  thread.uncommitted.clear();
}

void copy_wait(int groups_left, Site) {
  Thread& thread = self();
  while (static_cast<int>(thread.groups.size()) > groups_left) {
    for (const AsyncCopy& copy : thread.groups.front()) {
      perform(copy);
      race::give_back(copy, thread.block->number, thread.index, thread.epoch);
    }
    thread.groups.pop_front();
  }
}

void mbarrier_init(std::uint64_t* barrier, int arrivals, Site site) {
  check_aligned(barrier, 8, site);
  if (arrivals < 1) report(site, "mbarrier: the count must be positive");
  if (owner(barrier) != self().block)
    report(site, "mbarrier: it must lie in this block's shared memory");
  race::access(barrier, 8, race::Kind::kWrite, {0, site});
  *barrier = 0;
  Mbarrier b;
  b.count = b.pending = arrivals;
  b.block = self().block;
  machine().mbarriers[barrier] = b;
}

void mbarrier_arrive(std::uint64_t* barrier, std::uint32_t expected_bytes, Site site) {
  Mbarrier& b = find(barrier, "mbarrier arrive", site);
  // That the initialisation is over must be known, by a barrier.
  race::access(barrier, 8, race::Kind::kAtomicWrite, {0, site});
  arrive(b, expected_bytes, site);
}

void mbarrier_arrive_remote(std::uint64_t* barrier, int rank, Site site) {
  auto* const remote = static_cast<std::uint64_t*>(map_shared(barrier, rank, site));
  mbarrier_arrive(remote, 0, site);
}

void mbarrier_wait(std::uint64_t* barrier, int parity, Site site) {
  Mbarrier& b = find(barrier, "mbarrier wait", site);
  if (b.block != self().block)
    report(site, "mbarrier wait: it lies in another block's shared memory");
  race::access(barrier, 8, race::Kind::kAtomicRead, {0, site});
  while ((b.phase & 1) == static_cast<std::uint64_t>(parity & 1)) {
    machine().spinning.push_back(&self());
    wait("an mbarrier", site);
  }
  race::learn(b.before);
}

void bulk_copy(void* to, const void* from, std::uint32_t bytes, std::uint64_t* barrier, Site site) {
  if (bytes % 16 != 0)
    report(site, "cp.async.bulk copies multiples of 16 bytes, got " + std::to_string(bytes));
  check_aligned(to, 16, site);
  check_aligned(from, 16, site);
  if (owner(to) == nullptr || owner(to) != owner(barrier))
    report(site, "cp.async.bulk: target and mbarrier must lie in one block's shared memory");
  find(barrier, "cp.async.bulk", site);
  AsyncCopy copy;
  copy.to = to;
  copy.from = from;
  copy.bytes = copy.valid = bytes;
  copy.barrier = barrier;
  copy.issuer = &self();
  copy.site = site;
  if (bytes > 0) {
    check_read(from, bytes, site);
    issue(std::move(copy));
  }
}

void store_async(void* remote, const void* value, int bytes, std::uint64_t* barrier, Site site) {
  check_aligned(remote, static_cast<std::size_t>(bytes), site);
  if (owner(remote) == nullptr || owner(remote) != owner(barrier))
    report(site, "st.async: target and mbarrier must lie in one block's shared memory");
  find(barrier, "st.async", site);
  AsyncCopy copy;
  copy.to = remote;
  copy.bytes = copy.valid = static_cast<std::uint32_t>(bytes);
  std::memcpy(copy.value, value, static_cast<std::size_t>(bytes));
  copy.barrier = barrier;
  copy.issuer = &self();
  copy.site = site;
  issue(std::move(copy));
}

void complete(const AsyncCopy& copy) {
  const Block* const target = owner(copy.to);
  if (target->live == 0)
    report(copy.site, "asynchronous copy: its target's block has returned without waiting for it");
  perform(copy);
  race::give_back(copy, copy.issuer->block->number, machine().launch.threads, copy.epoch);
  const auto found = machine().mbarriers.find(copy.barrier);
  if (found == machine().mbarriers.end()) return;
  Mbarrier& b = found->second;
  b.bytes -= copy.bytes;
  b.now.join(copy.clock);
  advance(b);
}

void bulk_store(void* global, const void* shared, std::uint32_t bytes, Site site) {
  if (bytes % 16 != 0)
    report(site, "cp.async.bulk copies multiples of 16 bytes, got " + std::to_string(bytes));
  check_aligned(global, 16, site);
  check_aligned(shared, 16, site);
  if (owner(shared) != self().block)
    report(site, "cp.async.bulk: the source is not in this block's shared memory");
  check_read(shared, bytes, site);
  check_write(global, bytes, site);
  AsyncCopy copy;
  copy.to = global;
  copy.from = shared;
  copy.bytes = copy.valid = bytes;
  copy.issuer = &self();
  copy.site = site;
  self().bulk_uncommitted.push_back(copy);
}

void bulk_commit() {
  Thread& thread = self();
  thread.bulk_groups.push_back(std::move(thread.bulk_uncommitted));
  thread.bulk_uncommitted.clear();
}

void bulk_wait(int groups_left, Site) {
  Thread& thread = self();
  while (static_cast<int>(thread.bulk_groups.size()) > groups_left) {
    for (const AsyncCopy& copy : thread.bulk_groups.front()) perform(copy);
    thread.bulk_groups.pop_front();
  }
}

}  // namespace lmkern::simt
