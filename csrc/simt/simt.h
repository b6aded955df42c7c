// A SIMT emulator: CUDA kernels on a CPU, for tests.
//
// The kernels of csrc/cuda use no CUDA syntax of their own, only the wrappers of csrc/cuda/device.
// Compiled by the host compiler with LMKERN_SIMT, those call what is declared here. Each CUDA thread
// is a fiber; it runs until it waits, and the schedule (first in first out, last in first out, or
// random from a seed) says who goes on. So whatever depends on an order that nothing guarantees
// differs between schedules, and what is wrong in itself is reported: an Error names the place in
// the kernel.
//
//   always      barriers that not all threads reach, or reach at different places; deadlocks, with
//               everyone who waits; warp operations whose mask is wrong; misaligned vectors;
//               launches beyond the hardware's limits; misuse of mbarriers. Shared memory begins
//               as NaN, and so does the target of an asynchronous copy until it was waited for.
//   ASan, UBSan as on the CPU: shared memory is one exact heap block for each block of threads.
//   race mode   kernels compiled with -fsanitize=thread, but linked to callbacks of our own
//               (tsan.cpp): vector clocks find data races in shared and global memory whatever the
//               schedule; accesses outside all known memory, reads of shared memory that nobody
//               has written, and accesses to memory that an asynchronous copy still owns.
//
// What it cannot show: the PTX bodies of the wrappers, and speed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace lmkern {

// A place in a kernel's source.
struct Site {
  const char* file;
  int line;
};

}  // namespace lmkern

namespace lmkern::simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct Launch {
  Dim3 grid;
  int threads;               // of a block
  std::size_t shared_bytes;  // of a block
  int cluster = 1;           // blocks in a cluster, along x
  bool resident = false;     // all blocks run at the same time, as a barrier of the grid needs
  const char* kernel = "";   // its name, for reports
};

// What the emulated device can do. Few multiprocessors, so that tests reach the paths that large grids take.
struct Device {
  int multiprocessors = 8;
  int max_cluster = 16;                       // blocks; 1: no clusters
  std::size_t max_shared_bytes = 227 * 1024;  // of a block
};
const Device& device();
void set_device(const Device& device);

enum class Schedule { kFifo, kLifo, kRandom };
void set_schedule(Schedule schedule, std::uint64_t seed);

// Runs body(context) once in each thread. Throws Error at the first thing that is wrong.
void launch(const Launch& launch, void (*body)(void*), void* context);

// Global memory that kernels may touch, while this object lives. Without any, bounds of global
// memory are not checked.
class GlobalMemory {
 public:
  GlobalMemory(const void* data, std::size_t bytes);
  ~GlobalMemory();
  GlobalMemory(const GlobalMemory&) = delete;
  GlobalMemory& operator=(const GlobalMemory&) = delete;

 private:
  const void* data_;
};

bool race_mode();

// ---- who am I -----------------------------------------------------------------------------------

int thread_index();
int thread_count();
Dim3 block_index();
Dim3 block_count();
int cluster_rank();
int cluster_size();

// ---- memory -------------------------------------------------------------------------------------

char* shared_memory();
// The same place in the shared memory of another block of the cluster.
void* map_shared(void* local, int rank, Site site);
// Reports an access of `bytes` at an address that is no multiple of them.
void check_aligned(const void* address, std::size_t bytes, Site site);
// What the wrappers read and write on behalf of a thread, which no compiler instruments.
void check_read(const void* address, std::size_t bytes, Site site);
void check_write(const void* address, std::size_t bytes, Site site);

// ---- barriers -----------------------------------------------------------------------------------

void block_barrier(Site site);
void named_barrier(int id, int threads, Site site);
void warp_barrier(std::uint32_t mask, Site site);
void cluster_arrive(Site site);
void cluster_wait(Site site);

// ---- warps --------------------------------------------------------------------------------------

// The operands of the lanes; those outside the mask are null.
using Combine = void (*)(void* const (&operands)[32], std::uint32_t mask);
// Waits until all lanes of `mask` have come with the same `combine` from the same mask; the last one
// runs it. It orders nothing in memory, as on the hardware.
void collective(const char* name, std::uint32_t mask, Combine combine, void* operand, Site site);

// ---- atomics ------------------------------------------------------------------------------------

enum class Order { kRelaxed, kAcquire, kRelease, kAcquireRelease };
std::uint32_t atomic_load(const std::uint32_t* address, Order order, Site site);
void atomic_store(std::uint32_t* address, std::uint32_t value, Order order, Site site);
// The value before.
std::uint32_t atomic_add(std::uint32_t* address, std::uint32_t value, Order order, Site site);
void atomic_min(unsigned long long* address, unsigned long long value, Site site);
// The value before.
std::uint32_t atomic_max(std::uint32_t* address, std::uint32_t value, Site site);
// A thread that polls gives way here.
void spin(Site site);

// ---- asynchronous copies ------------------------------------------------------------------------

void copy_async(void* shared, const void* global, int bytes, int valid_bytes, Site site);
void copy_commit();
void copy_wait(int groups_left, Site site);

void mbarrier_init(std::uint64_t* barrier, int arrivals, Site site);
void mbarrier_arrive(std::uint64_t* barrier, std::uint32_t expected_bytes, Site site);
void mbarrier_arrive_remote(std::uint64_t* barrier, int rank, Site site);
void mbarrier_wait(std::uint64_t* barrier, int parity, Site site);
// Completes on `barrier`, which lies in the shared memory of the block that `to` belongs to.
void bulk_copy(void* to, const void* from, std::uint32_t bytes, std::uint64_t* barrier, Site site);
// From shared to global memory, in this thread's bulk groups.
void bulk_store(void* global, const void* shared, std::uint32_t bytes, Site site);
void bulk_commit();
void bulk_wait(int groups_left, Site site);
void store_async(void* remote, const void* value, int bytes, std::uint64_t* barrier, Site site);

}  // namespace lmkern::simt
