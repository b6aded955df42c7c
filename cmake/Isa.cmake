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
  if(LMKERN_SANITIZE)  # -g1: lines and no variables are all that a report shows, at half the build's time
    target_compile_options(${object} PRIVATE
      -O1 -fsanitize=${LMKERN_SANITIZE} -fno-omit-frame-pointer -g1)
  endif()
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
  target_compile_definitions(${target} PRIVATE LMKERN_HAVE_${isa})
endfunction()

# x86-64: baseline (SSE2), avx2, avx512, amx (avx512 with tiles), and for tests avx2wide, the 16-lane code on hardware without
# AVX-512, where the compiler splits each vector in two. Arm: neon. Elsewhere: baseline.
function(lmkern_add_cpu_kernels target)
  set(flags_baseline "")
  set(bytes_baseline 16)
  set(default baseline)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set(default baseline avx2 avx512 amx)
    set(flags_avx2 -mavx2 -mfma -mf16c)
    set(bytes_avx2 32)
    set(flags_avx2wide ${flags_avx2})
    set(bytes_avx2wide 64)
    set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
      -mprefer-vector-width=512)
    set(bytes_avx512 64)
    set(flags_amx ${flags_avx512} -mamx-tile -mamx-bf16)
    set(bytes_amx 64)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
    set(default neon)
    set(flags_neon "")
    set(bytes_neon 16)
  endif()
  if(NOT LMKERN_ISAS)
    set(LMKERN_ISAS ${default})
  endif()
  foreach(isa IN LISTS LMKERN_ISAS)
    if(NOT DEFINED bytes_${isa})
      message(FATAL_ERROR "LMKERN_ISAS: no instruction set '${isa}' on ${CMAKE_SYSTEM_PROCESSOR}")
    endif()
    _lmkern_add_isa(${target} ${isa} ${bytes_${isa}} "${flags_${isa}}" "${ARGN}")
  endforeach()
endfunction()
