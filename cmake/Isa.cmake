# Compiles each CPU kernel file once per instruction set, each build in a namespace of its own
# (lmkern::cpu::<isa>). csrc/cpu/isa.cpp chooses one of them at run time.
#
# LMKERN_ISA_NAMESPACE  the namespace;  LMKERN_VEC_BYTES  the width of one vector.

function(_lmkern_add_isa target isa vec_bytes flags sources)
  set(object lmkern_cpu_${isa})
  add_library(${object} OBJECT ${sources})
  target_include_directories(${object} PRIVATE ${CMAKE_SOURCE_DIR}/csrc)
  target_compile_definitions(${object} PRIVATE
    LMKERN_ISA_NAMESPACE=${isa} LMKERN_VEC_BYTES=${vec_bytes})
  # Never -ffast-math: GCC 12 would then flush denormals for the whole process. -Wno-psabi: vectors
  # wider than the baseline are only ever passed between inlined functions.
  target_compile_options(${object} PRIVATE
    -Wall -Wextra -Wno-psabi -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math ${flags})
  target_link_libraries(${object} PRIVATE OpenMP::OpenMP_CXX)
  if(LMKERN_SANITIZE)
    target_compile_options(${object} PRIVATE
      -O1 -fsanitize=${LMKERN_SANITIZE} -fno-omit-frame-pointer -g)
  endif()
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
  target_compile_definitions(${target} PRIVATE LMKERN_HAVE_${isa})
endfunction()

function(lmkern_add_cpu_kernels target)
  set(sources ${ARGN})
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set(avx2 -mavx2 -mfma -mf16c)
    _lmkern_add_isa(${target} baseline 16 "" "${sources}")
    _lmkern_add_isa(${target} avx2 32 "${avx2}" "${sources}")
    _lmkern_add_isa(${target} avx512 64
      "${avx2};-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mprefer-vector-width=512" "${sources}")
    if(LMKERN_TEST_ISA)
      # The 16-lane code on hardware without AVX-512: the compiler splits each vector in two.
      _lmkern_add_isa(${target} avx2wide 64 "${avx2}" "${sources}")
    endif()
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
    _lmkern_add_isa(${target} neon 16 "" "${sources}")
  else()
    _lmkern_add_isa(${target} baseline 16 "" "${sources}")
  endif()
endfunction()
