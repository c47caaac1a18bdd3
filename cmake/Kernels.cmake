# Kernels of ours, for a torch with CUDA where nvcc is found; otherwise fingerprints of CUDA tensors
# are taken from a copy on the CPU. Sets REPRISE_HAS_KERNELS.
#
# Included before the first target: those made before enable_language have no CUDA_ARCHITECTURES,
# which is an error when the build is generated.
option(REPRISE_CUDA "Compile kernels of ours where nvcc is found and torch has CUDA" ON)
set(REPRISE_HAS_KERNELS OFF)
if(REPRISE_CUDA AND NOT TORCH_CUDA_REPR STREQUAL "None")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 75-virtual 80 90)
    endif()
    enable_language(CUDA)
    find_package(CUDAToolkit)
    # torch has loaded its own CUDA runtime, found by the name of its major version.
    string(REGEX MATCH "[0-9]+" torch_cuda_major "${TORCH_CUDA_REPR}")
    if(CUDAToolkit_FOUND AND CUDAToolkit_VERSION_MAJOR EQUAL torch_cuda_major)
      set(REPRISE_HAS_KERNELS ON)
    else()
      message(STATUS "No kernels: torch has CUDA ${TORCH_CUDA_REPR}, the toolkit is "
                     "${CUDAToolkit_VERSION}")
    endif()
  else()
    message(STATUS "No kernels: there is no CUDA compiler")
  endif()
endif()

# Links the kernels into a target of ours. They have flags of their own: nvcc does not know ours.
function(reprise_add_kernels target)
  if(NOT REPRISE_HAS_KERNELS)
    return()
  endif()
  add_library(reprise_kernels OBJECT ${ARGN})
  target_include_directories(reprise_kernels PRIVATE csrc)
  set_target_properties(reprise_kernels PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                        CUDA_RUNTIME_LIBRARY Shared CUDA_VISIBILITY_PRESET hidden)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:reprise_kernels>)
  # Also where the core's precompiled header is used: GCC refuses it under other definitions.
  target_compile_definitions(${target} PUBLIC REPRISE_CUDA)
  target_link_libraries(${target} PUBLIC CUDA::cudart)
endfunction()
