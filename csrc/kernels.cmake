# The target "kernels": the kernels proper, once for each instruction set that the target can have, and the choice among
# them. They include nothing of torch, so that no inline function compiled for a newer processor can be shared with code
# that runs everywhere, and so that one archive of them serves every torch.
if(MTLK_KERNELS)
  add_library(kernels STATIC IMPORTED)
  set_target_properties(kernels PROPERTIES IMPORTED_LOCATION ${MTLK_KERNELS})
  return()
endif()

include(CheckCXXCompilerFlag)
set(kernel_objects "")
set(targets "")

macro(add_kernels isa)
  add_library(kernels_${isa} OBJECT
    csrc/cpu/kernels.cpp
    csrc/cpu/level/chain_kernels.cpp
    csrc/cpu/level/layerwise_kernels.cpp)
  target_include_directories(kernels_${isa} PRIVATE csrc csrc/cpu)
  target_compile_definitions(kernels_${isa} PRIVATE MTLK_ISA=${isa})
  target_compile_options(kernels_${isa} PRIVATE -O3 -ffp-contract=fast -fno-math-errno -Wall -Wextra -Wno-psabi ${ARGN}
    ${instruments})
  list(APPEND kernel_objects $<TARGET_OBJECTS:kernels_${isa}>)
  list(APPEND targets ${isa})
endmacro()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512)
  add_kernels(baseline -O2)  # for processors of before 2013, and in half the time that -O3 takes
  add_kernels(avx2 -mavx2 -mfma -mf16c)
  add_kernels(avx512 ${avx512})
  check_cxx_compiler_flag("-mavx512bf16" MTLK_COMPILES_AVX512BF16)
  if(MTLK_COMPILES_AVX512BF16)
    add_kernels(avx512bf16 ${avx512} -mavx512bf16)
  endif()
  if(MTLK_SPLIT)
    add_kernels(split ${avx512} -mavx512bf16 -DMTLK_SPLIT)
  endif()
  check_cxx_compiler_flag("-mamx-bf16 -mavx512bf16" MTLK_COMPILES_AMX)
  if(MTLK_COMPILES_AMX)
    add_kernels(amx ${avx512} -mavx512bf16 -mamx-tile -mamx-bf16)
  endif()
else()
  add_kernels(baseline)
endif()

add_library(kernels STATIC csrc/cpu/runtime/instruction_sets.cpp ${kernel_objects})
target_include_directories(kernels PRIVATE csrc csrc/cpu)
target_compile_options(kernels PRIVATE ${instruments})
string(REPLACE ";" " " targets "${targets}")
target_compile_definitions(kernels PRIVATE MTLK_TARGETS="${targets}")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  target_compile_definitions(kernels PRIVATE MTLK_X86 $<$<BOOL:${MTLK_COMPILES_AVX512BF16}>:MTLK_AVX512BF16>
    $<$<BOOL:${MTLK_SPLIT}>:MTLK_SPLIT> $<$<BOOL:${MTLK_COMPILES_AMX}>:MTLK_AMX>)
endif()
