#include "cuda/golden.h"

#include <stdexcept>

#include "cuda/golden_case.h"

namespace lmkern::cuda {
namespace {

const std::vector<GoldenCase>& cases() {
  static const std::vector<GoldenCase> all = [] {
    std::vector<GoldenCase> result;
    for (auto family : {launch_goldens, warp_goldens, copy_goldens, convert_goldens, matrix_goldens,
                        atomic_goldens, mbarrier_goldens, cluster_goldens})
      for (GoldenCase& c : family()) result.push_back(std::move(c));
    return result;
  }();
  return all;
}

}  // namespace

std::vector<std::string> golden_names() {
  std::vector<std::string> names;
  for (const GoldenCase& c : cases()) names.push_back(c.name);
  return names;
}

std::string golden(const std::string& name) {
  for (const GoldenCase& c : cases())
    if (c.name == name) return c.run();
  throw std::invalid_argument("golden: there is no test named '" + name + "'");
}

}  // namespace lmkern::cuda
