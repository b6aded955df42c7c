#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef LMKERN_HAVE_amx
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lmkern::cpu {

#define LMKERN_DECLARE(isa)   \
  namespace isa {             \
  extern const Kernels table; \
  }
#ifdef LMKERN_HAVE_baseline
LMKERN_DECLARE(baseline)
#endif
#ifdef LMKERN_HAVE_avx2
LMKERN_DECLARE(avx2)
#endif
#ifdef LMKERN_HAVE_avx2wide
LMKERN_DECLARE(avx2wide)
#endif
#ifdef LMKERN_HAVE_avx512
LMKERN_DECLARE(avx512)
#endif
#ifdef LMKERN_HAVE_amx
LMKERN_DECLARE(amx)
#endif
#ifdef LMKERN_HAVE_neon
LMKERN_DECLARE(neon)
#endif
#undef LMKERN_DECLARE

namespace {

#if defined(LMKERN_HAVE_avx512) || defined(LMKERN_HAVE_amx)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#ifdef LMKERN_HAVE_amx
// Tiles are 8 KiB of state for each thread, so Linux wants to be asked (since 5.16; it may refuse).
// The answer holds for all threads of the process.
bool has_amx() {
  constexpr unsigned kTiles = 1u << 24, kBFloat16 = 1u << 22;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kTiles) && (edx & kBFloat16) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// In ascending order of preference; the test build avx2wide is never preferred to avx2.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> tables;
#ifdef LMKERN_HAVE_baseline
  tables.push_back(&baseline::table);
#endif
#ifdef LMKERN_HAVE_neon
  tables.push_back(&neon::table);
#endif
#if defined(LMKERN_HAVE_avx2)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef LMKERN_HAVE_avx2wide
  if (has_avx2) tables.push_back(&avx2wide::table);
#endif
  if (has_avx2) tables.push_back(&avx2::table);
#endif
#ifdef LMKERN_HAVE_avx512
  if (has_avx512()) tables.push_back(&avx512::table);
#endif
#ifdef LMKERN_HAVE_amx
  if (has_avx512() && has_amx()) tables.push_back(&amx::table);
#endif
  return tables;
}

const Kernels* find(const std::string& name) {
  std::string known;
  for (const Kernels* table : supported()) {
    if (name == table->isa) return table;
    if (!known.empty()) known += ", ";
    known += table->isa;
  }
  throw std::invalid_argument("LMKERN_ISA must be one of " + known + " on this processor, got '" +
                              name + "'");
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  if (table == nullptr) {  // racing first calls choose the same table
    const char* wanted = std::getenv("LMKERN_ISA");
    const auto tables = supported();
    if (tables.empty()) throw std::runtime_error("lmkern was not built for this processor");
    table = wanted != nullptr && *wanted != '\0' ? find(wanted) : tables.back();
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : supported()) names.push_back(table->isa);
  return names;
}

void set_isa(const std::string& name) { chosen.store(find(name), std::memory_order_release); }

}  // namespace lmkern::cpu
