// The emulator's insides: what a launch consists of, and who may run.
#pragma once
#include <deque>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "simt/clock.h"
#include "simt/fiber.h"
#include "simt/simt.h"

namespace lmkern::simt {

struct Block;
struct Thread;

// A read or write in race mode. `where` is a code address, or that of a Site that lives for ever.
struct Place {
  std::uintptr_t code = 0;
  Site site{};
};

struct Barrier {
  int arrived = 0;
  Site site{};  // of the first to arrive
  std::vector<Thread*> waiting;
  Clock clock;
};

// A warp operation for which lanes wait.
struct Collective {
  const char* name = nullptr;
  Combine combine = nullptr;
  std::uint32_t mask = 0, arrived = 0;
  Site site{};
  void* operands[32] = {};
  Thread* lanes[32] = {};
};

// A copy whose completion somebody has to wait for.
struct AsyncCopy {
  void* to = nullptr;
  const void* from = nullptr;
  std::uint32_t bytes = 0, valid = 0;
  unsigned char value[16] = {};  // of store_async, which has no source in memory
  std::uint64_t* barrier = nullptr;
  Thread* issuer = nullptr;
  Clock clock;  // what the issuer knew, and the copy's own event
  std::uint32_t epoch = 0;
  Site site{};
};

struct Thread {
  std::unique_ptr<Fiber> fiber;
  Block* block = nullptr;
  int index = 0;
  bool done = false;
  const char* waits_for = nullptr;  // null while it may run
  Site at{};
  std::vector<AsyncCopy> uncommitted;
  std::deque<std::vector<AsyncCopy>> groups;  // cp.async
  std::vector<AsyncCopy> bulk_uncommitted;
  std::deque<std::vector<AsyncCopy>> bulk_groups;
  Clock clock;
  std::uint32_t epoch = 1;
  bool arrived_at_cluster = false;
  std::uint64_t cluster_phase = 0;
  Clock cluster_clock;
};

struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
  std::uint64_t phase = 0;
};

// As aligned as dynamic shared memory is.
struct FreeShared {
  void operator()(char* memory) const { operator delete[](memory, std::align_val_t(1024)); }
};
using SharedMemory = std::unique_ptr<char[], FreeShared>;

struct Block {
  int number = 0, rank = 0;
  Dim3 index{};
  Cluster* cluster = nullptr;
  SharedMemory shared;
  std::vector<std::unique_ptr<Thread>> threads;
  int live = 0;
  std::map<int, Barrier> barriers;
  std::vector<std::vector<Collective>> collectives;  // of each warp
  std::uint32_t agent_epoch = 1;                     // of the block's asynchronous copies
};

struct Mbarrier {
  int count = 0, pending = 0;
  std::int64_t bytes = 0;
  std::uint64_t phase = 0;
  Block* block = nullptr;
  Clock now, before;  // of the phase under way, and of the one that completed last
};

struct Machine {
  Launch launch;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Block>> blocks;
  std::deque<Thread*> ready;
  std::vector<Thread*> spinning;
  std::deque<AsyncCopy> copies;  // bulk copies under way
  std::map<std::uint64_t*, Mbarrier> mbarriers;
  std::map<const void*, Clock> atomics;
  bool progress = false;  // since the spinning threads last looked
  Thread* running = nullptr;
  std::string error;
  int live = 0;
  bool combining = false;  // a warp operation reads and writes the registers of other threads
  std::mt19937_64* random = nullptr;
};

Machine& machine();
Machine* machine_or_null();  // outside of a launch: null
inline Thread& self() { return *machine().running; }

// Ends the launch with an Error. Does not return when a thread runs.
[[noreturn]] void report(const Site& site, const std::string& message);
// The running thread gives way until somebody calls wake().
void wait(const char* what, Site site);
void wake(Thread* thread);
std::string name_of(const Thread& thread);
std::string place_of(const Site& site);

// What a bulk copy does when it completes (async.cpp).
void complete(const AsyncCopy& copy);

}  // namespace lmkern::simt
