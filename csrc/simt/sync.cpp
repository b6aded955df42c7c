// Barriers, warp operations and atomics: who waits for whom, and what they learn from each other.
#include "simt/machine.h"
#include "simt/race.h"

namespace lmkern::simt {
namespace {

// The running thread arrives at a barrier of `expected` threads, and goes on when all have.
void arrive_and_wait(Barrier& barrier, int expected, const char* what, Site site) {
  Thread& thread = self();
  race::publish(barrier.clock);
  if (barrier.arrived == 0) barrier.site = site;
  if (++barrier.arrived < expected) {
    barrier.waiting.push_back(&thread);
    wait(what, site);
    return;
  }
  machine().progress = true;
  for (Thread* other : barrier.waiting) {
    wake(other);
    // They run later, but learn now: the clock is used again.
    Thread* const running = machine().running;
    machine().running = other;
    race::learn(barrier.clock);
    machine().running = running;
  }
  race::learn(barrier.clock);
  barrier.waiting.clear();
  barrier.arrived = 0;
  barrier.clock.clear();
}

bool same(const Site& a, const Site& b) { return a.line == b.line && a.file == b.file; }

}  // namespace

void block_barrier(Site site) {
  Thread& thread = self();
  Block& block = *thread.block;
  Barrier& barrier = block.barriers[0];
  const int threads = machine().launch.threads;
  if (block.live < threads)
    report(site, "abandoned barrier: " + name_of(thread) + " waits, but " +
                     std::to_string(threads - block.live) + " threads of the block have returned");
  if (barrier.arrived > 0 && !same(barrier.site, site))
    report(site, "divergent barrier: " + name_of(thread) + " waits here, others at " +
                     place_of(barrier.site));
  arrive_and_wait(barrier, threads, "the block's barrier", site);
}

void named_barrier(int id, int threads, Site site) {
  if (id < 1 || id > 15)
    report(site,
           "named barrier: the id must be 1 to 15 (0 is the block's), got " + std::to_string(id));
  if (threads % 32 != 0 || threads <= 0)
    report(site, "named barrier: the number of threads must be a multiple of 32, got " +
                     std::to_string(threads));
  Barrier& barrier = self().block->barriers[id];
  arrive_and_wait(barrier, threads, "a named barrier", site);
}

void cluster_arrive(Site site) {
  Thread& thread = self();
  if (thread.arrived_at_cluster)
    report(site, "cluster barrier: " + name_of(thread) + " arrives twice without waiting");
  thread.arrived_at_cluster = true;
  Cluster& cluster = *thread.block->cluster;
  Barrier& barrier = cluster.barrier;
  race::publish(barrier.clock);
  if (barrier.arrived == 0) barrier.site = site;
  const int expected = machine().launch.threads * machine().launch.cluster;
  if (++barrier.arrived < expected) return;
  machine().progress = true;
  barrier.arrived = 0;
  for (Block* block : cluster.blocks)
    for (const auto& member : block->threads) {
      Thread* const running = machine().running;
      machine().running = member.get();
      member->cluster_clock = barrier.clock;
      machine().running = running;
    }
  barrier.clock.clear();
  ++cluster.phase;
  for (Thread* other : barrier.waiting) wake(other);
  barrier.waiting.clear();
}

void cluster_wait(Site site) {
  Thread& thread = self();
  if (!thread.arrived_at_cluster)
    report(site, "cluster barrier: " + name_of(thread) + " waits without having arrived");
  thread.arrived_at_cluster = false;
  Cluster& cluster = *thread.block->cluster;
  if (cluster.phase == thread.cluster_phase) {
    cluster.barrier.waiting.push_back(&thread);
    wait("the cluster's barrier", site);
  }
  ++thread.cluster_phase;
  race::learn(thread.cluster_clock);
}

void collective(const char* name, std::uint32_t mask, Combine combine, void* operand, Site site) {
  Thread& thread = self();
  const int lane = thread.index % 32, warp = thread.index / 32;
  const int lanes = machine().launch.threads - warp * 32;
  if (!(mask >> lane & 1))
    report(site, std::string(name) + ": the mask does not name lane " + std::to_string(lane) +
                     ", which calls it");
  if (lanes < 32 && (mask >> lanes) != 0)
    report(site, std::string(name) + ": the mask names lanes that do not exist: the warp has " +
                     std::to_string(lanes));
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && thread.block->threads[static_cast<std::size_t>(warp * 32 + i)]->done)
      report(site, std::string("abandoned ") + name + ": lane " + std::to_string(i) +
                       " of the mask has returned");
  auto& open = thread.block->collectives[static_cast<std::size_t>(warp)];
  Collective* mine = nullptr;
  for (Collective& c : open) {
    // One of another mask: those lanes may come here later. If not, it is a deadlock.
    if (c.mask != mask) continue;
    if (c.combine != combine || !same(c.site, site))
      report(site, std::string(name) + ": lane " + std::to_string(lane) +
                       " comes here, but other lanes of its mask wait at " + place_of(c.site) +
                       " for " + c.name);
    mine = &c;
  }
  if (mine == nullptr) {
    open.push_back({});
    mine = &open.back();
    mine->name = name;
    mine->combine = combine;
    mine->mask = mask;
    mine->site = site;
  }
  mine->operands[lane] = operand;
  mine->arrived |= 1u << lane;
  mine->lanes[lane] = &thread;
  if (mine->arrived != mask) {
    wait(name, site);
    return;
  }
  const Collective complete = *mine;
  open.erase(open.begin() + (mine - open.data()));
  machine().progress = true;
  machine().combining = true;
  complete.combine(complete.operands, mask);
  machine().combining = false;
  for (Thread* other : complete.lanes)
    if (other != nullptr && other != &thread) wake(other);
}

namespace {
// __syncwarp is the one warp operation that orders memory.
void join_lanes(void* const (&operands)[32], std::uint32_t) {
  Clock clock;
  Thread* const running = machine().running;
  for (void* lane : operands) {
    if (lane == nullptr) continue;
    machine().running = static_cast<Thread*>(lane);
    race::publish(clock);
  }
  for (void* lane : operands) {
    if (lane == nullptr) continue;
    machine().running = static_cast<Thread*>(lane);
    race::learn(clock);
  }
  machine().running = running;
}
}  // namespace

void warp_barrier(std::uint32_t mask, Site site) {
  collective("warp barrier", mask, join_lanes, &self(), site);
}

namespace {
// Around an atomic operation: what the thread publishes, and what it learns.
void before_atomic(const void* address, std::size_t bytes, bool writes, Order order, Site site) {
  check_aligned(address, bytes, site);
  race::access(address, bytes, writes ? race::Kind::kAtomicWrite : race::Kind::kAtomicRead,
               {0, site});
  if (order == Order::kRelease || order == Order::kAcquireRelease)
    race::publish(machine().atomics[address]);
  if (writes) machine().progress = true;
}
void after_atomic(const void* address, Order order) {
  if (order == Order::kAcquire || order == Order::kAcquireRelease)
    race::learn(machine().atomics[address]);
}
}  // namespace

std::uint32_t atomic_load(const std::uint32_t* address, Order order, Site site) {
  before_atomic(address, 4, false, order, site);
  const std::uint32_t value = *address;
  after_atomic(address, order);
  return value;
}

void atomic_store(std::uint32_t* address, std::uint32_t value, Order order, Site site) {
  before_atomic(address, 4, true, order, site);
  *address = value;
}

std::uint32_t atomic_add(std::uint32_t* address, std::uint32_t value, Order order, Site site) {
  before_atomic(address, 4, true, order, site);
  const std::uint32_t before = *address;
  *address = before + value;
  after_atomic(address, order);
  return before;
}

std::uint32_t atomic_max(std::uint32_t* address, std::uint32_t value, Site site) {
  before_atomic(address, 4, true, Order::kRelaxed, site);
  const std::uint32_t before = *address;
  if (value > before) *address = value;
  return before;
}

void atomic_min(unsigned long long* address, unsigned long long value, Site site) {
  before_atomic(address, 8, true, Order::kRelaxed, site);
  if (value < *address) *address = value;
}

}  // namespace lmkern::simt
