#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

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
#ifdef LMKERN_HAVE_neon
LMKERN_DECLARE(neon)
#endif
#undef LMKERN_DECLARE

namespace {

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
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    tables.push_back(&avx512::table);
#endif
  return tables;
}

const Kernels* find(const std::string& name) {
  std::string known;
  for (const Kernels* table : supported()) {
    if (name == table->isa) return table;
    known += (known.empty() ? "" : ", ") + std::string(table->isa);
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
