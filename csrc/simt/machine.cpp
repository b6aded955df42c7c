#include "simt/machine.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "simt/race.h"

namespace lmkern::simt {
namespace {

Machine* current = nullptr;
std::mutex one_launch;
Schedule schedule = Schedule::kFifo;
std::uint64_t seed = 0;

// The hardware's limits, of compute capability 8.0 and up.
constexpr int kMaxThreads = 1024;
Device emulated;
// Blocks that run at the same time when nothing asks for all of them.
constexpr int kMaxResidentThreads = 16384;

// Stacks are kept from launch to launch.
std::vector<std::unique_ptr<Fiber>> idle_fibers;

std::unique_ptr<Fiber> take_fiber() {
  if (idle_fibers.empty()) return std::make_unique<Fiber>();
  std::unique_ptr<Fiber> fiber = std::move(idle_fibers.back());
  idle_fibers.pop_back();
  return fiber;
}

void run_thread(void* argument) {
  auto* const thread = static_cast<Thread*>(argument);
  Machine& m = machine();
  m.body(m.context);
  Block& block = *thread->block;
  thread->done = true;
  thread->waits_for = "nothing: it has returned";
  --block.live;
  --m.live;
  m.progress = true;
  for (auto& [id, barrier] : block.barriers)
    if (barrier.arrived > 0 && id == 0)
      report(barrier.site, "abandoned barrier: " + name_of(*thread) + " returned while " +
                               std::to_string(barrier.arrived) + " threads wait");
  for (Collective& c : block.collectives[static_cast<std::size_t>(thread->index / 32)])
    if (c.mask >> (thread->index % 32) & 1)
      report(c.site, std::string("abandoned ") + c.name + ": " + name_of(*thread) +
                         " returned while lanes of its mask wait");
  if (!thread->uncommitted.empty() || !thread->groups.empty()) {
    const auto& left = thread->uncommitted.empty() ? thread->groups.front() : thread->uncommitted;
    if (!left.empty())
      report(left.front().site, "cp.async: " + name_of(*thread) + " returned without waiting");
  }
  thread->fiber->suspend();
}

Thread* pick(Machine& m) {
  if (m.ready.empty()) return nullptr;
  std::size_t at = 0;
  if (schedule == Schedule::kLifo) at = m.ready.size() - 1;
  if (schedule == Schedule::kRandom) at = (*m.random)() % m.ready.size();
  Thread* const thread = m.ready[at];
  m.ready.erase(m.ready.begin() + static_cast<std::ptrdiff_t>(at));
  return thread;
}

bool complete_one_copy(Machine& m) {
  if (m.copies.empty()) return false;
  std::size_t at = 0;
  if (schedule == Schedule::kLifo) at = m.copies.size() - 1;
  if (schedule == Schedule::kRandom) at = (*m.random)() % m.copies.size();
  const AsyncCopy copy = m.copies[at];
  m.copies.erase(m.copies.begin() + static_cast<std::ptrdiff_t>(at));
  complete(copy);
  m.progress = true;
  return true;
}

[[noreturn]] void fail() {
  Machine& m = machine();
  throw Error(m.error);
}

void report_deadlock(Machine& m) {
  std::string message = "deadlock; waiting:";
  Site site{};
  std::map<std::string, int> places;
  for (const auto& block : m.blocks)
    for (const auto& thread : block->threads)
      if (!thread->done) {
        if (site.file == nullptr) site = thread->at;
        ++places[std::string(thread->waits_for ? thread->waits_for : "a turn") + " at " +
                 place_of(thread->at)];
      }
  for (const auto& [place, count] : places)
    message += " " + std::to_string(count) + " threads for " + place + ";";
  message.pop_back();
  m.error = place_of(site) + ": " + m.launch.kernel + ": " + message;
}

void run(Machine& m) {
  while (m.live > 0) {
    if (schedule == Schedule::kRandom && !m.copies.empty() && (*m.random)() % 64 == 0)
      complete_one_copy(m);
    Thread* const thread = pick(m);
    if (thread == nullptr) {
      // Those who poll look again only when something has changed, or a copy can still change it.
      if (!m.spinning.empty() && m.progress) {
        m.progress = false;
        for (Thread* t : m.spinning) wake(t);
        m.spinning.clear();
        continue;
      }
      if (complete_one_copy(m)) continue;
      report_deadlock(m);
      fail();
    }
    m.running = thread;
    thread->fiber->resume();
    m.running = nullptr;
    if (!m.error.empty()) fail();
  }
  while (complete_one_copy(m)) {
  }
  if (!m.error.empty()) fail();
}

// Makes the blocks of a cluster and their threads.
void add_cluster(Machine& m, int first) {
  auto cluster = std::make_unique<Cluster>();
  for (int rank = 0; rank < m.launch.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    const unsigned number = static_cast<unsigned>(first + rank);
    block->number = first + rank;
    block->rank = rank;
    block->index = {number % m.launch.grid.x, number / m.launch.grid.x % m.launch.grid.y,
                    number / m.launch.grid.x / m.launch.grid.y};
    block->cluster = cluster.get();
    if (m.launch.shared_bytes > 0) {
      // 0xff is NaN in every floating-point type.
      block->shared.reset(new (std::align_val_t(1024)) char[m.launch.shared_bytes]);
      std::memset(block->shared.get(), 0xff, m.launch.shared_bytes);
      race::add_memory(block->shared.get(), m.launch.shared_bytes, block.get());
    }
    block->live = m.launch.threads;
    block->collectives.resize(static_cast<std::size_t>((m.launch.threads + 31) / 32));
    for (int i = 0; i < m.launch.threads; ++i) {
      auto thread = std::make_unique<Thread>();
      thread->fiber = take_fiber();
      thread->block = block.get();
      thread->index = i;
      thread->fiber->start(run_thread, thread.get());
      m.ready.push_back(thread.get());
      block->threads.push_back(std::move(thread));
    }
    m.live += m.launch.threads;
    cluster->blocks.push_back(block.get());
    m.blocks.push_back(std::move(block));
  }
  m.clusters.push_back(std::move(cluster));
}

void drop_blocks(Machine& m) {
  for (const auto& block : m.blocks)
    if (block->shared) race::remove_memory(block->shared.get());
  for (const auto& block : m.blocks)
    for (const auto& thread : block->threads) idle_fibers.push_back(std::move(thread->fiber));
  m.blocks.clear();
  m.clusters.clear();
  m.ready.clear();
  m.spinning.clear();
  m.mbarriers.clear();
}

}  // namespace

Machine& machine() { return *current; }
Machine* machine_or_null() { return current; }

void set_schedule(Schedule chosen, std::uint64_t from) {
  schedule = chosen;
  seed = from;
}

bool race_mode() { return race::kOn; }

std::string place_of(const Site& site) {
  if (site.file == nullptr) return "?";
  const char* const slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string name_of(const Thread& thread) {
  const Dim3 b = thread.block->index;
  return "thread " + std::to_string(thread.index) + " of block (" + std::to_string(b.x) + ", " +
         std::to_string(b.y) + ", " + std::to_string(b.z) + ")";
}

void report(const Site& site, const std::string& message) {
  Machine& m = machine();
  if (m.error.empty()) m.error = place_of(site) + ": " + m.launch.kernel + ": " + message;
  if (m.running == nullptr) fail();
  m.running->fiber->suspend();  // for ever: the launch is over
  __builtin_trap();
}

void wait(const char* what, Site site) {
  Thread& thread = self();
  thread.waits_for = what;
  thread.at = site;
  thread.fiber->suspend();
}

void wake(Thread* thread) {
  thread->waits_for = nullptr;
  machine().ready.push_back(thread);
}

void spin(Site site) {
  machine().spinning.push_back(&self());
  wait("a value in memory", site);
}

const Device& device() { return emulated; }
void set_device(const Device& device) { emulated = device; }

void launch(const Launch& launch, void (*body)(void*), void* context) {
  const auto check = [&](bool good, const std::string& message) {
    if (!good) throw Error(std::string(launch.kernel) + ": " + message);
  };
  check(launch.threads >= 1 && launch.threads <= kMaxThreads,
        "a block has 1 to 1024 threads, got " + std::to_string(launch.threads));
  check(launch.shared_bytes <= emulated.max_shared_bytes,
        "a block has at most " + std::to_string(emulated.max_shared_bytes) +
            " bytes of shared memory, got " + std::to_string(launch.shared_bytes));
  check(launch.grid.x >= 1 && launch.grid.y >= 1 && launch.grid.z >= 1 &&
            launch.grid.x <= 0x7fffffff && launch.grid.y <= 65535 && launch.grid.z <= 65535,
        "a grid has at least one block and at most 65535 along y and z");
  check(launch.cluster >= 1 && launch.cluster <= emulated.max_cluster &&
            launch.grid.x % static_cast<unsigned>(launch.cluster) == 0,
        "a cluster has 1 to " + std::to_string(emulated.max_cluster) +
            " blocks and divides the grid");
  const std::lock_guard lock(one_launch);
  std::mt19937_64 random(seed);
  Machine m;
  m.launch = launch;
  m.body = body;
  m.context = context;
  m.random = &random;
  current = &m;
  race::forget();
  const std::int64_t blocks = std::int64_t{launch.grid.x} * launch.grid.y * launch.grid.z,
                     step = launch.cluster;
  std::vector<int> order;
  for (std::int64_t b = 0; b < blocks; b += step) order.push_back(static_cast<int>(b));
  if (schedule == Schedule::kLifo) std::reverse(order.begin(), order.end());
  if (schedule == Schedule::kRandom) std::shuffle(order.begin(), order.end(), random);
  // Without a promise that all blocks run at the same time, one cluster after the other: a kernel
  // that needs more than that must deadlock here.
  const std::size_t together = launch.resident ? order.size() : 1;
  try {
    check(!launch.resident || blocks * launch.threads <= kMaxResidentThreads,
          "the emulator holds at most " + std::to_string(kMaxResidentThreads) + " threads at once");
    for (std::size_t at = 0; at < order.size(); at += together) {
      for (std::size_t i = at; i < at + together && i < order.size(); ++i) add_cluster(m, order[i]);
      run(m);
      drop_blocks(m);
    }
  } catch (...) {
    drop_blocks(m);
    current = nullptr;
    throw;
  }
  current = nullptr;
}

GlobalMemory::GlobalMemory(const void* data, std::size_t bytes) : data_(data) {
  if (data != nullptr && bytes > 0) race::add_memory(data, bytes, nullptr);
}
GlobalMemory::~GlobalMemory() { race::remove_memory(data_); }

int thread_index() { return self().index; }
int thread_count() { return machine().launch.threads; }
Dim3 block_index() { return self().block->index; }
Dim3 block_count() { return machine().launch.grid; }
int cluster_rank() { return self().block->rank; }
int cluster_size() { return machine().launch.cluster; }
char* shared_memory() { return self().block->shared.get(); }

void* map_shared(void* local, int rank, Site site) {
  Block& block = *self().block;
  const std::ptrdiff_t offset = static_cast<char*>(local) - block.shared.get();
  if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(machine().launch.shared_bytes))
    report(site, "map_shared: the address is not in this block's shared memory");
  if (rank < 0 || rank >= machine().launch.cluster)
    report(site, "map_shared: rank " + std::to_string(rank) + " is not in the cluster of " +
                     std::to_string(machine().launch.cluster));
  Block& other = *block.cluster->blocks[static_cast<std::size_t>(rank)];
  if (other.live == 0)
    report(site, "map_shared: block " + std::to_string(rank) +
                     " of the cluster has returned, its shared memory is gone");
  return other.shared.get() + offset;
}

void check_aligned(const void* address, std::size_t bytes, Site site) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0)
    report(site, "misaligned access: " + name_of(self()) + " takes " + std::to_string(bytes) +
                     " bytes at an address that is " +
                     std::to_string(reinterpret_cast<std::uintptr_t>(address) % bytes) +
                     " past a multiple of them");
}

void check_read(const void* address, std::size_t bytes, Site site) {
  race::access(address, bytes, race::Kind::kRead, {0, site});
}
void check_write(const void* address, std::size_t bytes, Site site) {
  race::access(address, bytes, race::Kind::kWrite, {0, site});
}

}  // namespace lmkern::simt
