# Finds the interpreter, its headers and the torch that it imports. Makes the imported targets
# reprise::c10, reprise::torch_cpu and reprise::torch_python. libtorch.so has no code of its own and
# pulls in the CUDA libraries, so nothing links it.
#
# Sets TORCH_VERSION (with its local part: "2.13.0+cpu"), TORCH_CUDA_REPR (a Python literal: None or
# '13.0'), PYTHON_TAG ("cp311").

# scikit-build-core names the interpreter; without it, the one on PATH is meant.
set(Python_FIND_VIRTUALENV FIRST)
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

set(probe "${CMAKE_CURRENT_LIST_DIR}/probe_torch.py")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${probe}")
execute_process(COMMAND "${Python_EXECUTABLE}" "${probe}" RESULT_VARIABLE status
                OUTPUT_VARIABLE answer ERROR_VARIABLE complaint)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${complaint}")
endif()
# Whatever torch or a site hook prints comes before our line.
string(REGEX MATCH "{\"version\".*}" answer "${answer}")
string(JSON TORCH_VERSION GET "${answer}" version)
string(JSON TORCH_CUDA_REPR GET "${answer}" cuda_repr)
string(JSON PYTHON_TAG GET "${answer}" python_tag)
string(JSON torch_include GET "${answer}" include)
string(JSON torch_lib GET "${answer}" lib)
string(JSON torch_cxx11_abi GET "${answer}" cxx11_abi)
message(STATUS "torch ${TORCH_VERSION}, CUDA ${TORCH_CUDA_REPR}, in ${torch_lib}")

string(REGEX MATCH "^[0-9]+\\.[0-9]+" torch_release "${TORCH_VERSION}")
if(torch_release VERSION_LESS 2.13)
  message(FATAL_ERROR "torch-reprise needs torch >= 2.13, found ${TORCH_VERSION}: "
                      "pip install 'torch>=2.13'")
endif()

# Headers of an imported target are system headers: torch's own warnings stay out of ours.
foreach(name c10 torch_cpu torch_python)
  set(library "${torch_lib}/lib${name}.so")
  if(NOT EXISTS "${library}")
    message(FATAL_ERROR "torch ${TORCH_VERSION} has no ${library}. Only Linux wheels are supported.")
  endif()
  add_library(reprise::${name} SHARED IMPORTED)
  set_target_properties(reprise::${name} PROPERTIES IMPORTED_LOCATION "${library}")
  target_include_directories(reprise::${name} INTERFACE "${torch_include}"
                             "${torch_include}/torch/csrc/api/include")
  # The version is on the command line so that a build folder that outlives a change of torch
  # compiles everything again.
  target_compile_definitions(reprise::${name} INTERFACE
                             _GLIBCXX_USE_CXX11_ABI=${torch_cxx11_abi}
                             "REPRISE_TORCH_VERSION=\"${TORCH_VERSION}\"")
endforeach()
