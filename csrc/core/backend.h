// The kernels behind the checks of csrc/ops: this module's.
#pragma once
#if defined(LMKERN_CUDA_MODULE)
#include "cuda/kernels.h"
namespace lmkern {
namespace backend = cuda;
}
#else
#include "cpu/isa.h"
namespace lmkern {
namespace backend = cpu;
}
#endif
