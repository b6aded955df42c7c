// Checks of row numbers, shared by the ops that look rows up.
#pragma once
#include "core/check.h"

namespace lmkern {

// [..., i, ...]: where element `flat` of the view is.
std::string position_string(const TensorView& view, std::int64_t flat);

// "index 12 at position [3] is out of range for V = 10", with the argument if it is another than input.
std::string index_message(const char* name, std::int64_t index, const std::string& position,
                          const char* extent, std::int64_t rows);

// int32 or int64, contiguous.
void check_integers(const Check& check, const TensorView& view, const char* name);

// int32 or int64, contiguous, every element in [0, rows); IndexError names the first that is not. Where
// contents cannot be read, the kernels look at the elements (cuda/index_errors.h).
void check_indices(const Check& check, const TensorView& indices, std::int64_t rows,
                   const char* name = nullptr, const char* extent = "V");

}  // namespace lmkern
