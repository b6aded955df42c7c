// This instruction set's row of the kernel table.
#include "cpu/isa.h"

#define LMKERN_STRING_(x) #x
#define LMKERN_STRING(x) LMKERN_STRING_(x)

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

#define LMKERN_DECLARE(Result, name, Args) Result name(const Args& args);
LMKERN_KERNELS(LMKERN_DECLARE)
double peak_flops(int threads, std::int64_t iterations);

extern const Kernels table;
const Kernels table = {
    LMKERN_STRING(LMKERN_ISA_NAMESPACE),
#define LMKERN_ENTRY(Result, name, Args) name,
    LMKERN_KERNELS(LMKERN_ENTRY)
#undef LMKERN_ENTRY
        peak_flops,
};

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
