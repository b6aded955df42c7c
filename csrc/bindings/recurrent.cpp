#include "ops/recurrent.h"

#include <pybind11/stl.h>

#include <tuple>

#include "bindings/bind.h"
#if defined(LMKERN_CUDA_MODULE)
#include "cuda/kernels.h"
#include "cuda/recurrent.h"
#endif

namespace lmkern {
namespace {

// RecurrentOptions, member by member.
using Options =
    std::tuple<int, bool, std::int64_t, TensorView, TensorView, TensorView, TensorView, TensorView,
               TensorView, TensorView, double, TensorView, TensorView, TensorView, double, double,
               TensorView, TensorView, TensorView, TensorView, bool>;

RecurrentOptions recurrent_options(const Options& members) {
  return std::apply(
      [](int cell, const auto&... member) {
        return RecurrentOptions{static_cast<RecurrentCell>(cell), member...};
      },
      members);
}

}  // namespace

void bind_recurrent(pybind11::module_& m) {
  m.def("recurrent_forward",
        [](const Options& options, TensorView gates, TensorView h0, TensorView c0,
           TensorView first_hh, TensorView y, TensorView h_n, TensorView c_n, TensorView cells,
           TensorView hidden, TensorView hh, TensorView unprojected, bool save,
           TensorView workspace, bool packed_ready) {
          call(recurrent_forward, {recurrent_options(options), gates, h0, c0, first_hh, y, h_n, c_n,
                                   cells, hidden, hh, unprojected, save, workspace, packed_ready});
        });
  m.def("recurrent_backward",
        [](const Options& options, TensorView d_y, TensorView d_h_n, TensorView d_c_n,
           TensorView d_cells, TensorView h0, TensorView c0, TensorView y, TensorView gates,
           TensorView cells, TensorView hidden, TensorView hh, TensorView d_gates, TensorView d_hh,
           TensorView d_h, TensorView d_normed, TensorView d_c_normed, TensorView c_now,
           TensorView d_h0, TensorView d_c0, bool recompute, TensorView workspace) {
          call(recurrent_backward, {recurrent_options(options),
                                    d_y,
                                    d_h_n,
                                    d_c_n,
                                    d_cells,
                                    h0,
                                    c0,
                                    y,
                                    gates,
                                    cells,
                                    hidden,
                                    hh,
                                    d_gates,
                                    d_hh,
                                    d_h,
                                    d_normed,
                                    d_c_normed,
                                    c_now,
                                    d_h0,
                                    d_c0,
                                    recompute,
                                    workspace});
        });
#if defined(LMKERN_CUDA_MODULE)
  m.def("recurrent_begin_at", [](const std::string& path) {
    using P = cuda::RecurrentPath;
    if (path != "cluster" && path != "persistent" && path != "steps")
      throw std::invalid_argument("path must be cluster, persistent or steps, got " + path);
    cuda::begin_at(path == "cluster"      ? P::kCluster
                   : path == "persistent" ? P::kPersistent
                                          : P::kSteps);
  });
  m.def("recurrent_workspace", [](const Options& options, bool backward) {
    return cuda::recurrent_workspace(recurrent_options(options), backward);
  });
#endif

  m.def("recurrent_step",
        [](int cell, TensorView from_x, TensorView from_h, TensorView x, TensorView w_ih,
           TensorView w_hh, TensorView b_ih, TensorView b_hh, TensorView h, TensorView c,
           TensorView h_next, TensorView y, TensorView c_next, TensorView gates, TensorView cells,
           TensorView hidden) {
          call(recurrent_step, {static_cast<RecurrentCell>(cell), from_x, from_h, x, w_ih, w_hh,
                                b_ih, b_hh, h, c, h_next, y, c_next, gates, cells, hidden});
        });

  m.def("recurrent_step_backward",
        [](int cell, TensorView d_h, TensorView d_y, TensorView d_c, TensorView gates,
           TensorView hidden, TensorView h, TensorView c, TensorView d_gates, TensorView d_hh,
           TensorView d_h_prev, TensorView d_c_prev, TensorView d_b_ih, TensorView d_b_hh) {
          call(recurrent_step_backward,
               {static_cast<RecurrentCell>(cell), d_h, d_y, d_c, gates, hidden, h, c, d_gates, d_hh,
                d_h_prev, d_c_prev, d_b_ih, d_b_hh});
        });
}

}  // namespace lmkern
