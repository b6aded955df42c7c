// lmkern._C_cuda: the CUDA kernels. Compiled with LMKERN_SIMT, the same on the emulator, for tests:
// lmkern._C_simt and _C_simt_race.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "cuda/golden.h"
#include "cuda/index_errors.h"
#if defined(LMKERN_SIMT)
#include "simt/planted.h"
#include "simt/simt.h"
#endif

namespace py = pybind11;

#if defined(LMKERN_SIMT)
namespace {
void set_schedule(const std::string& name, std::uint64_t seed) {
  using S = lmkern::simt::Schedule;
  if (name != "fifo" && name != "lifo" && name != "random")
    throw std::invalid_argument("schedule must be fifo, lifo or random, got " + name);
  lmkern::simt::set_schedule(name == "fifo"   ? S::kFifo
                             : name == "lifo" ? S::kLifo
                                              : S::kRandom,
                             seed);
}
}  // namespace
#endif

PYBIND11_MODULE(LMKERN_CUDA_MODULE, m, py::mod_gil_not_used()) {
  lmkern::bind_errors();
  lmkern::bind_embedding(m);
  lmkern::bind_embedding_bag(m);
  lmkern::bind_recurrent(m);
  m.def("golden_names", lmkern::cuda::golden_names);
  m.def("golden", lmkern::cuda::golden, py::call_guard<py::gil_scoped_release>());
  // The message of an index that a kernel found to be out of range, or None; then it is forgotten.
  m.def("take_index_error", lmkern::cuda::take_index_error);
#if defined(LMKERN_SIMT)
  m.def("set_schedule", set_schedule);
  m.def("race_mode", lmkern::simt::race_mode);
  m.def("planted_names", lmkern::simt::planted_names);
  m.def("run_planted", lmkern::simt::run_planted);
#endif
}
