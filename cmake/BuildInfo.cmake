# Writes torch_reprise/_build_info.py: what the import handshake compares with the running process.
string(TOUPPER "${CMAKE_BUILD_TYPE}" build_type_upper)
string(STRIP "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${build_type_upper}}" REPRISE_CXX_FLAGS)
if(REPRISE_SANITIZE)
  string(APPEND REPRISE_CXX_FLAGS " -fsanitize=${REPRISE_SANITIZE}")
endif()
string(REGEX REPLACE "([\\\\\"])" "\\\\\\1" REPRISE_CXX_FLAGS "${REPRISE_CXX_FLAGS}")
configure_file("${CMAKE_CURRENT_LIST_DIR}/_build_info.py.in" _build_info.py @ONLY)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/_build_info.py" DESTINATION torch_reprise)
