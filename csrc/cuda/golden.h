// Golden tests of the wrappers in cuda/device: kernels put index-coded data through each of them, and
// the host says from the PTX ISA what must come out, without the emulator's help. One source for the
// emulator and for a GPU, where it is the one test of the wrappers' PTX.
//
// They ship with the package: `lmkern selftest` checks a user's GPU.
#pragma once
#include <string>
#include <vector>

namespace lmkern::cuda {

std::vector<std::string> golden_names();

// What came out wrong first ("lane 5, register 2: expected 3017, got 3016"); nothing if all is right;
// "skipped: ..." where the device lacks what the wrapper needs. Waits for the device.
std::string golden(const std::string& name);

}  // namespace lmkern::cuda
