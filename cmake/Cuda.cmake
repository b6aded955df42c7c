# The CUDA switch. No CUDA kernel exists yet, so AUTO and OFF build the CPU module alone, and ON
# says so instead of quietly building something else.
if(NOT LMKERN_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "LMKERN_CUDA must be AUTO, ON or OFF, got '${LMKERN_CUDA}'")
endif()
if(LMKERN_CUDA STREQUAL "ON")
  message(FATAL_ERROR "LMKERN_CUDA=ON: this version of lmkern has no CUDA kernels yet; use AUTO or OFF")
endif()
message(STATUS "lmkern: CUDA backend not built (LMKERN_CUDA=${LMKERN_CUDA}; no CUDA kernels in this version)")
