# CAPO_CUDA_SHIM=ON: cuda/*.cu as C++ on the host shim (docs/cuda.md), with one device in host memory. For tests: the op
# tests then run every kernel through the library's own path, without a toolkit and without a GPU.
#
# Two sets of the kernels: the library's, under ASan and UBSan (A), and that of the race checker (B), which programs made
# by capo_shim_race_test (tests/shim) link instead. All other files are compiled once, without either.
if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU" OR NOT CMAKE_SYSTEM_NAME STREQUAL "Linux" OR BUILD_SHARED_LIBS OR CAPO_SANITIZE)
  message(FATAL_ERROR "CAPO_CUDA_SHIM needs GCC on Linux, static, without CAPO_SANITIZE: it sanitises the kernels itself")
endif()
include(CheckCXXSourceCompiles)
set(capo_shim_asan -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer)
set(CMAKE_REQUIRED_FLAGS "-fsanitize=address,undefined")
set(CMAKE_REQUIRED_LINK_OPTIONS -fsanitize=address,undefined)
check_cxx_source_compiles("int main() { return 0; }" CAPO_HAS_SANITIZERS)
unset(CMAKE_REQUIRED_FLAGS)
unset(CMAKE_REQUIRED_LINK_OPTIONS)
if(NOT CAPO_HAS_SANITIZERS)
  message(FATAL_ERROR "CAPO_CUDA_SHIM needs the runtimes of ASan and UBSan")
endif()

file(GLOB capo_shim_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cu)
set_source_files_properties(${capo_shim_sources} PROPERTIES LANGUAGE CXX)

# One set of objects from files that know the shim.
function(capo_shim_objects name defines flags)
  add_library(${name} OBJECT ${ARGN})
  target_compile_definitions(${name} PRIVATE CAPO_WITH_CUDA "CAPO_HOST_SHIM=<capo/tests/shim/shim.hpp>"
                             CAPO_SHIM_COVERAGE="${PROJECT_BINARY_DIR}/shim_coverage" ${defines})
  target_compile_options(${name} PRIVATE -O1 -fno-strict-aliasing -Wno-unknown-pragmas ${flags})
  target_include_directories(${name} PRIVATE ${PROJECT_BINARY_DIR}/include)
  target_link_libraries(${name} PRIVATE capo_options)
endfunction()

set(capo_shim_files tests/shim/shim.cpp tests/shim/backend.cpp tests/shim/streams.cpp tests/shim/coverage.cpp)
capo_shim_objects(capo_shim_a "" "${capo_shim_asan}" ${capo_shim_sources} ${capo_shim_files})
target_sources(capo PRIVATE $<TARGET_OBJECTS:capo_shim_a>)
target_compile_definitions(capo PUBLIC CAPO_WITH_CUDA)
target_link_options(capo PUBLIC "$<$<NOT:$<BOOL:$<TARGET_PROPERTY:CAPO_SHIM_RACE>>>:-fsanitize=address,undefined>")

# Only the kernels call __tsan_*, which race.cpp supplies: libtsan is not linked.
set(capo_shim_race -fsanitize=thread,alignment,bounds,shift -fno-sanitize-recover=all)
capo_shim_objects(capo_shim_b_kernels CAPO_SHIM_RACE "${capo_shim_race}" ${capo_shim_sources})
capo_shim_objects(capo_shim_b CAPO_SHIM_RACE "" ${capo_shim_files} tests/shim/race.cpp)
