# REPRISE_VERSION: the version in pyproject.toml, the only place that has it. Read here too, so that
# a plain `cmake -B build` knows it without scikit-build-core.
file(STRINGS "${CMAKE_CURRENT_SOURCE_DIR}/pyproject.toml" version_line REGEX "^version = \"[0-9.]+\"$")
if(NOT version_line MATCHES "\"([0-9.]+)\"")
  message(FATAL_ERROR "pyproject.toml has no line: version = \"X.Y.Z\"")
endif()
set(REPRISE_VERSION "${CMAKE_MATCH_1}")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS pyproject.toml)
