# Installation: library, headers under include/capo, find_package(capo) and pkg-config files.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS capo EXPORT capoTargets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
        INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(FILES capo.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/capo)
install(DIRECTORY engine autograd ops models tuners datasets
        DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/capo
        FILES_MATCHING PATTERN "*.h"
        PATTERN "ops/cpu" EXCLUDE  # what kernel files include is private
        PATTERN "*_functors.h" EXCLUDE
        PATTERN "*_internal.h" EXCLUDE)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

set(capo_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/capo)
get_target_property(capo_type capo TYPE)
set(capo_find_private "")
if(capo_type STREQUAL "STATIC_LIBRARY")  # the consumer links what the archive needs
  string(APPEND capo_find_private "find_dependency(ZLIB)\n")
  if(CAPO_CUDA)
    string(APPEND capo_find_private "find_dependency(CUDAToolkit)\n")
  endif()
endif()
configure_package_config_file(cmake/capoConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/capoConfig.cmake
                              INSTALL_DESTINATION ${capo_package_dir})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/capoConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(EXPORT capoTargets NAMESPACE capo:: DESTINATION ${capo_package_dir})
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/capoConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/capoConfigVersion.cmake
        DESTINATION ${capo_package_dir})

set(capo_pc_defines "")
if(capo_one_isa)
  string(APPEND capo_pc_defines " -DCAPO_ONE_ISA")
endif()
set(capo_pc_libs "-lz")
if(CAPO_CUDA)
  string(APPEND capo_pc_defines " -DCAPO_WITH_CUDA")
  string(APPEND capo_pc_libs " -L${CUDAToolkit_LIBRARY_DIR} -lcublasLt -lcudart_static -lrt -ldl")
endif()
if(capo_type STREQUAL "STATIC_LIBRARY")  # no shared form exists beside it: a plain --libs must link
  set(capo_pc_libs_public "${capo_pc_libs}")
  set(capo_pc_libs_private "")
else()
  set(capo_pc_libs_public "")
  set(capo_pc_libs_private "${capo_pc_libs}")
endif()
# ${pcfiledir}: the file stays right when the prefix is moved or given only at `cmake --install --prefix`.
file(RELATIVE_PATH capo_pc_prefix /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(cmake/capo.pc.in ${CMAKE_CURRENT_BINARY_DIR}/capo.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/capo.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
