// Kernels with one bug each, and the same kernels without it: the tests of the emulator.
#pragma once
#include <string>
#include <vector>

namespace lmkern::simt {

std::vector<std::string> planted_names();
// Runs a kernel with or without its bug. Throws what the emulator reports; returns whether the result
// was right, for what plain mode cannot report.
bool run_planted(const std::string& name, bool bug);

}  // namespace lmkern::simt
