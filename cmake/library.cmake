# The library: one static (or shared) archive of engine, autograd, ops, models, tuners and datasets.
find_package(Threads REQUIRED)
find_package(ZLIB REQUIRED)
find_package(nlohmann_json 3.9 REQUIRED)
find_package(Eigen3 3.3 REQUIRED NO_MODULE)
find_path(CAPO_STB_DIR stb_image.h PATH_SUFFIXES stb REQUIRED)

file(GLOB capo_sources CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR}
     engine/*.cpp autograd/*.cpp models/*/*.cpp tuners/*.cpp datasets/*.cpp)
list(APPEND capo_sources ops/kernel.cpp)

# ops/ops.def is the one list of ops: OP(stem, name, kind). A stem without its sources is an error here.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/ops/ops.def)
file(STRINGS ops/ops.def capo_op_lines REGEX "^OP\\(")
set(CAPO_STEMS "")
foreach(line IN LISTS capo_op_lines)
  if(NOT line MATCHES "^OP\\(([a-z0-9_]+), *([a-z0-9_]+), *([A-Z_]+)\\)$")
    message(FATAL_ERROR "ops/ops.def: expected OP(stem, name, KIND), got: ${line}")
  endif()
  list(APPEND CAPO_STEMS ${CMAKE_MATCH_1})
endforeach()
list(REMOVE_DUPLICATES CAPO_STEMS)

set(capo_isa_flags_v2 -march=x86-64-v2)
set(capo_isa_flags_v3 -march=x86-64-v3)
set(capo_isa_flags_v4 -march=x86-64-v4 -mprefer-vector-width=512)
set(capo_isas ${CAPO_ISAS})
set(capo_one_isa OFF)
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(capo_isas v2)
  set(capo_isa_flags_v2 "")
endif()
if(capo_isas STREQUAL "v2")
  set(capo_one_isa ON)
elseif(NOT capo_isas STREQUAL "v2;v3;v4")
  message(FATAL_ERROR "CAPO_ISAS must be v2;v3;v4 or v2, got ${capo_isas}")
endif()

set(capo_kernel_sources "")
foreach(stem IN LISTS CAPO_STEMS)
  foreach(file IN ITEMS ops/${stem}.h ops/${stem}.cpp)
    if(NOT EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${file})
      message(FATAL_ERROR "ops/ops.def lists ${stem}, but ${file} is missing")
    endif()
  endforeach()
  list(APPEND capo_sources ops/${stem}.cpp)
  if(EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/ops/cpu/${stem}.cpp)  # pure views and composites have no kernel
    list(APPEND capo_kernel_sources ops/cpu/${stem}.cpp)
  endif()
  file(GLOB capo_more CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} ops/cpu/${stem}/*.cpp)  # a long stem's other parts
  list(APPEND capo_kernel_sources ${capo_more})
endforeach()

add_library(capo ${capo_sources})
add_library(capo::capo ALIAS capo)
# Header-only and build-only needs must not reach the exported target.
target_link_libraries(capo PRIVATE $<BUILD_INTERFACE:capo_options> $<BUILD_INTERFACE:nlohmann_json::nlohmann_json>
                      ZLIB::ZLIB PUBLIC Threads::Threads)
target_include_directories(capo SYSTEM PRIVATE ${CAPO_STB_DIR})
# stb_image's JPEG decoder lets signed sums wrap on damaged files, and its PNG decoder copies no bytes to a null pointer
# when the first IDAT is empty: both defined here, and here alone.
set_source_files_properties(datasets/stb.cpp PROPERTIES COMPILE_OPTIONS
                            "-w;-fwrapv;-fno-delete-null-pointer-checks;-fno-sanitize=nonnull-attribute")
# Eigen for that file alone.
get_target_property(capo_eigen Eigen3::Eigen INTERFACE_INCLUDE_DIRECTORIES)
set_source_files_properties(models/dependencies/covlasso.cpp PROPERTIES COMPILE_OPTIONS "-isystem;${capo_eigen}")
# It measures the machine, not the build type.
set_source_files_properties(engine/peaks.cpp PROPERTIES COMPILE_OPTIONS -O2)
# Checkpoints name the library that wrote them.
set_source_files_properties(models/train/checkpoint.cpp PROPERTIES COMPILE_DEFINITIONS CAPO_VERSION="${PROJECT_VERSION}")
target_include_directories(capo PUBLIC $<BUILD_INTERFACE:${CMAKE_CURRENT_BINARY_DIR}/include> $<INSTALL_INTERFACE:include>)
target_compile_features(capo PUBLIC cxx_std_20)
set_target_properties(capo PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION 0)
if(NOT BUILD_SHARED_LIBS)  # a plugin that links the archive does not re-export it
  set_target_properties(capo PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
endif()
if(capo_one_isa)
  target_compile_definitions(capo PUBLIC CAPO_ONE_ISA)
endif()

# CPU kernels: the same sources, once per instruction set (ops/cpu/kernel.h says what they may include).
foreach(isa IN LISTS capo_isas)
  add_library(capo_cpu_${isa} OBJECT ${capo_kernel_sources})
  target_compile_definitions(capo_cpu_${isa} PRIVATE CAPO_ISA=${isa})
  target_compile_options(capo_cpu_${isa} PRIVATE ${capo_isa_flags_${isa}} ${CAPO_KERNEL_OPT} -fno-math-errno -fno-trapping-math
                         -fopenmp-simd -ffp-contract=fast -Wno-unknown-pragmas)
  target_include_directories(capo_cpu_${isa} PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/include)
  target_link_libraries(capo_cpu_${isa} PRIVATE capo_options)
  target_sources(capo PRIVATE $<TARGET_OBJECTS:capo_cpu_${isa}>)
endforeach()
