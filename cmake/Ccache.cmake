# ccache as compiler launcher where it is installed. A precompiled header defeats it without these
# two settings, which is why they are not left to the user.
find_program(REPRISE_CCACHE ccache DOC "ccache, or empty for none")
if(REPRISE_CCACHE)
  foreach(language C CXX)
    if(NOT CMAKE_${language}_COMPILER_LAUNCHER)
      set(CMAKE_${language}_COMPILER_LAUNCHER
          "${CMAKE_COMMAND}" -E env CCACHE_SLOPPINESS=pch_defines,time_macros "${REPRISE_CCACHE}")
    endif()
  endforeach()
  message(STATUS "Compiling through ${REPRISE_CCACHE}")
endif()
