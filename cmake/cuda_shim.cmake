# CAPO_CUDA_SHIM=ON: cuda/*.cu as C++ on the host shim (docs/cuda.md), with one device in host memory. For tests: the op
# tests then run every kernel through the library's own path, without a toolkit and without a GPU.
if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU" OR NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  message(FATAL_ERROR "CAPO_CUDA_SHIM needs GCC on Linux")
endif()
file(GLOB capo_shim_sources CONFIGURE_DEPENDS cuda/*.cu)
set_source_files_properties(${capo_shim_sources} PROPERTIES LANGUAGE CXX)
add_library(capo_cuda_shim OBJECT ${capo_shim_sources} tests/shim/shim.cpp tests/shim/backend.cpp
            tests/shim/streams.cpp)
target_compile_definitions(capo_cuda_shim PRIVATE CAPO_WITH_CUDA "CAPO_HOST_SHIM=<capo/tests/shim/shim.hpp>")
target_compile_options(capo_cuda_shim PRIVATE -fno-strict-aliasing -Wno-unknown-pragmas)
target_include_directories(capo_cuda_shim PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/include)
target_link_libraries(capo_cuda_shim PRIVATE capo_options)
target_sources(capo PRIVATE $<TARGET_OBJECTS:capo_cuda_shim>)
target_compile_definitions(capo PUBLIC CAPO_WITH_CUDA)
