// What -fsanitize=thread calls: the compiler instruments every access of a kernel, and instead of
// ThreadSanitizer's runtime these check it (race.h). Compiled without instrumentation.
#include "simt/race.h"

using lmkern::simt::race::access;
using lmkern::simt::race::Kind;

#define LMKERN_CALLER reinterpret_cast<std::uintptr_t>(__builtin_return_address(0))
#define LMKERN_ACCESS(name, bytes, kind) \
  void name(void* address) { access(address, bytes, kind, {LMKERN_CALLER, {}}); }
#define LMKERN_ACCESSES(bytes)                                      \
  LMKERN_ACCESS(__tsan_read##bytes, bytes, Kind::kRead)             \
  LMKERN_ACCESS(__tsan_write##bytes, bytes, Kind::kWrite)           \
  LMKERN_ACCESS(__tsan_unaligned_read##bytes, bytes, Kind::kRead)   \
  LMKERN_ACCESS(__tsan_unaligned_write##bytes, bytes, Kind::kWrite) \
  LMKERN_ACCESS(__tsan_volatile_read##bytes, bytes, Kind::kRead)    \
  LMKERN_ACCESS(__tsan_volatile_write##bytes, bytes, Kind::kWrite)

extern "C" {
LMKERN_ACCESSES(1)
LMKERN_ACCESSES(2)
LMKERN_ACCESSES(4)
LMKERN_ACCESSES(8)
LMKERN_ACCESSES(16)

void __tsan_read_range(void* address, unsigned long bytes) {
  access(address, bytes, Kind::kRead, {LMKERN_CALLER, {}});
}
void __tsan_write_range(void* address, unsigned long bytes) {
  access(address, bytes, Kind::kWrite, {LMKERN_CALLER, {}});
}

// Of guards of static variables, in host code.
unsigned char __tsan_atomic8_load(const volatile unsigned char* address, int) { return *address; }

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
