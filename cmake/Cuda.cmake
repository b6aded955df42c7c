# Whether the CUDA backend is built (LMKERN_BUILD_CUDA), and the toolkit for it: CUDACXX, nvcc on the PATH
# or in /usr/local/cuda, else that of `pip install nvidia-cuda-nvcc` in the environment of the Python that
# builds. The module itself: csrc/cuda/CMakeLists.txt.

# Binaries for the architectures whose kernels are tested or tuned, and PTX for the rest. A binary runs on
# later minor versions of its major one (80 on 86 and 89, 100 on 103, 120 on 121), but 90a on 9.0 alone.
# The PTX is that of 100: it has all that kernels take from 9.0 on (clusters, bulk copies), so that what
# they choose by the device's capability is there, and drivers compile it for 11.0 and for whatever comes
# after 12. PTX of 120 would leave out 11.0, PTX of 90a is for 9.0 alone.
set(default 80-real 90a-real 100-real 120-real 100-virtual)
set(LMKERN_CUDA_ARCHITECTURES "" CACHE STRING
  "GPUs to build the CUDA kernels for, as CMake's CUDA_ARCHITECTURES: 90a-real (binary), 100-virtual (PTX), 80 (both); empty: all")
if(NOT LMKERN_CUDA_ARCHITECTURES)
  set(LMKERN_CUDA_ARCHITECTURES ${default})
endif()
option(LMKERN_CUDA_CHECK "Fail where a kernel takes more registers or spills more than it says" OFF)

set(LMKERN_BUILD_CUDA OFF)
if(NOT LMKERN_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "LMKERN_CUDA must be AUTO, ON or OFF, got '${LMKERN_CUDA}'")
endif()

# Why there is none: an error with ON, a remark with AUTO.
macro(_lmkern_no_cuda reason)
  if(LMKERN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "LMKERN_CUDA=ON: ${reason}")
  endif()
  message(STATUS "lmkern: CPU alone, no CUDA backend: ${reason}")
  return()
endmacro()

if(LMKERN_CUDA STREQUAL "OFF")
  _lmkern_no_cuda("LMKERN_CUDA=OFF")
endif()

if(CMAKE_CUDA_COMPILER)
  set(nvcc "${CMAKE_CUDA_COMPILER}")
elseif(DEFINED ENV{CUDACXX})
  set(nvcc "$ENV{CUDACXX}")
else()
  find_program(LMKERN_NVCC nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT LMKERN_NVCC)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c "import nvidia; print(*nvidia.__path__, sep=';')"
      OUTPUT_VARIABLE packages OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    find_program(LMKERN_NVCC nvcc PATHS ${packages} PATH_SUFFIXES cu14/bin cu13/bin NO_DEFAULT_PATH)
  endif()
  set(nvcc "${LMKERN_NVCC}")
endif()
if(NOT nvcc)
  _lmkern_no_cuda(
    "found no nvcc in CUDACXX, on the PATH, in /usr/local/cuda, nor in the packages of ${Python_EXECUTABLE} (pip install nvidia-cuda-nvcc)")
endif()
set(ENV{CUDACXX} "${nvcc}")

# nvcc looks for its libraries in lib64; pip's packages have lib.
get_filename_component(toolkit "${nvcc}" REALPATH)
get_filename_component(toolkit "${toolkit}/../.." ABSOLUTE)
if(EXISTS "${toolkit}/lib/libcudart_static.a" AND NOT EXISTS "${toolkit}/lib64")
  set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} -L${toolkit}/lib")
endif()

if(LMKERN_CUDA STREQUAL "AUTO")
  include(CheckLanguage)  # a toolkit that doesn't work here must not fail the build of the CPU module
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    _lmkern_no_cuda("${nvcc} can't compile here (LMKERN_CUDA=ON shows why)")
  endif()
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  _lmkern_no_cuda("needs CUDA 12.8 or later, ${nvcc} is ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
set(LMKERN_BUILD_CUDA ON)
message(STATUS "lmkern: CUDA backend with ${nvcc} ${CMAKE_CUDA_COMPILER_VERSION} for ${LMKERN_CUDA_ARCHITECTURES}")
