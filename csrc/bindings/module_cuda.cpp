// lmkern._C_cuda: the CUDA kernels. Compiled with LMKERN_SIMT, the same on the emulator, for tests:
// lmkern._C_simt and _C_simt_race.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>

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
#else
namespace {

// CUDA's version as its headers write it, 13000 for 13.0: of the linked runtime, and the newest that the
// driver knows (0: no driver).
int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}
int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

// Without a driver, or with one that is too old, there are none.
int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // or the next launch would report it
  return 0;
}

// What the kernels were compiled for, as in CMake: 90a-real (binary), 100-virtual (PTX), 80 (both).
std::vector<std::string> architectures() {
  std::vector<std::string> found;
  std::istringstream words(LMKERN_CUDA_ARCHITECTURES);
  for (std::string word; words >> word;) found.push_back(word);
  return found;
}

}  // namespace
#endif

PYBIND11_MODULE(LMKERN_CUDA_MODULE, m, py::mod_gil_not_used()) {
  lmkern::bind_errors();
  lmkern::bind_embedding(m);
  lmkern::bind_embedding_bag(m);
  lmkern::bind_embedding_optimizer(m);
  lmkern::bind_recurrent(m);
  lmkern::bind_token_position(m);
  m.def("golden_names", lmkern::cuda::golden_names);
  m.def("golden", lmkern::cuda::golden, py::call_guard<py::gil_scoped_release>());
  // The message of an index that a kernel found to be out of range, or None; then it is forgotten.
  m.def("take_index_error", lmkern::cuda::take_index_error);
#if defined(LMKERN_SIMT)
  m.def("set_schedule", set_schedule);
  m.def("set_device", [](int multiprocessors, int max_cluster, std::size_t max_shared_bytes) {
    lmkern::simt::set_device({multiprocessors, max_cluster, max_shared_bytes});
  });
  m.def("race_mode", lmkern::simt::race_mode);
  m.def("planted_names", lmkern::simt::planted_names);
  m.def("run_planted", lmkern::simt::run_planted);
#else
  m.def("runtime_version", runtime_version);
  m.def("driver_version", driver_version);
  m.def("device_count", device_count);
  m.def("architectures", architectures);
#endif
}
