// Race mode: what every access to shared and global memory is checked against. In other builds
// nothing of this does anything.
#pragma once
#include "simt/machine.h"

namespace lmkern::simt::race {

#if defined(LMKERN_SIMT_RACE)
inline constexpr bool kOn = true;
#else
inline constexpr bool kOn = false;
#endif

enum class Kind { kRead, kWrite, kAtomicRead, kAtomicWrite };

// An access of the running thread.
void access(const void* address, std::size_t bytes, Kind kind, const Place& place);

// A piece of memory begins and ceases to be known. Shared memory belongs to a block, and counts as
// never written.
void add_memory(const void* data, std::size_t bytes, const Block* block);
void remove_memory(const void* data);
// All launches before this one are over.
void forget();

// The running thread hands what it knows to a clock, and takes over what a clock knows.
void publish(Clock& clock);
void learn(const Clock& clock);

// An asynchronous copy takes its target over, and gives it back, written by `slot` of a block at
// `epoch`: of the issuing thread, or of the block's copy engine (slot = threads).
void take_over(const AsyncCopy& copy, const Place& place);
void give_back(const AsyncCopy& copy, int block, int slot, std::uint32_t epoch);

// Where code lies: file:line, from the debug information.
std::string locate(std::uintptr_t code);

}  // namespace lmkern::simt::race
