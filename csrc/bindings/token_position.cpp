#include "ops/token_position.h"

#include <pybind11/stl.h>

#include <tuple>

#include "bindings/bind.h"
#if defined(LMKERN_CUDA_MODULE)
#include "cuda/kernels.h"
#endif

namespace lmkern {
namespace {

// TokenPosition, member by member.
using TokenPositionRows = std::tuple<TensorView, TensorView, TensorView, TensorView, std::int64_t,
                                     std::int64_t, TensorView, TensorView, double>;

TokenPosition token_position(const TokenPositionRows& members) {
  return std::apply([](const auto&... member) { return TokenPosition{member...}; }, members);
}

}  // namespace

void bind_token_position(pybind11::module_& m) {
  m.def("token_position_forward",
        [](const TokenPositionRows& rows, TensorView weight, TensorView bias, double eps,
           double dropout_p, TensorView seed, TensorView out, TensorView statistics) {
          call(token_position_forward,
               {token_position(rows), weight, bias, eps, dropout_p, seed, out, statistics});
        });
  m.def("token_position_backward",
        [](const TokenPositionRows& rows, TensorView d_out, TensorView statistics,
           TensorView weight, double dropout_p, TensorView seed, TensorView d_sum,
           TensorView d_position, TensorView d_weight, TensorView d_bias, TensorView workspace) {
          call(token_position_backward, {token_position(rows), d_out, statistics, weight, dropout_p,
                                         seed, d_sum, d_position, d_weight, d_bias, workspace});
        });
#if defined(LMKERN_CUDA_MODULE)
  m.def("token_position_workspace", cuda::token_position_workspace);
#endif
}

}  // namespace lmkern
