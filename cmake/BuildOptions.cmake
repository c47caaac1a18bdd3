# reprise_options: warnings, sanitizers and how code is laid out, linked privately by every target
# of ours.
# reprise_precompile(target header...): precompiles the headers for one target.

add_library(reprise_options INTERFACE)
if(REPRISE_DEV)
  target_compile_options(reprise_options INTERFACE -Wall -Wextra -Werror)
endif()
if(REPRISE_SANITIZE)
  target_compile_options(reprise_options INTERFACE -fsanitize=${REPRISE_SANITIZE}
                         -fno-omit-frame-pointer -g)
  target_link_options(reprise_options INTERFACE -fsanitize=${REPRISE_SANITIZE})
endif()

# Our code runs between two operators of torch, whose code is some hundred pages: most of it comes
# from beyond the first caches, and each page that it lies in takes another one's place in the
# processor's table of pages. So calls go without a stub each, which the linker would put elsewhere,
# and it may place each function by itself.
if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  target_compile_options(reprise_options INTERFACE
                         $<$<COMPILE_LANGUAGE:C,CXX>:-fno-plt;-ffunction-sections>)
  target_link_options(reprise_options INTERFACE -Wl,-z,now -Wl,-Bsymbolic-functions)
endif()

# Most of the time to compile one of our files goes into these headers of torch. A header belongs
# here when several files include it; each file still includes what it uses, so that a build with
# REPRISE_PCH=OFF works.
set(REPRISE_CORE_HEADERS
    <ATen/core/Tensor.h>
    <ATen/core/Generator.h>
    <torch/csrc/autograd/engine.h>
    <torch/csrc/autograd/function.h>
    <torch/csrc/autograd/saved_variable.h>
    <torch/csrc/autograd/variable.h>)
set(REPRISE_BINDING_HEADERS
    <torch/csrc/autograd/python_variable.h>
    <torch/csrc/utils/pybind.h>)

function(reprise_precompile target)
  if(NOT REPRISE_PCH)
    return()
  endif()
  foreach(header IN LISTS ARGN)
    # For C++ alone: the bindings have C files too. $<ANGLE-R> stands for the ">" that would end
    # the generator expression.
    string(REPLACE ">" "$<ANGLE-R>" header "${header}")
    target_precompile_headers(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${header}>")
  endforeach()
endfunction()
