# Keeps the paths of the machine that builds a wheel out of it: torch's headers put the name of
# their file into messages. build_wheels.py includes this by CMAKE_PROJECT_TOP_LEVEL_INCLUDES and
# names the folders in REPRISE_HIDDEN_PREFIXES. Not among CMAKE_CXX_FLAGS, which `info` prints.
foreach(prefix IN LISTS REPRISE_HIDDEN_PREFIXES)
  add_compile_options("-fmacro-prefix-map=${prefix}/=")
endforeach()
