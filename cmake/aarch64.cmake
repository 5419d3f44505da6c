# Toolchain file: 64-bit Arm on a Debian or Ubuntu of another processor; programs run under qemu-user (CONTRIBUTING.md).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)  # zlib1g-dev:arm64 lies there; header-only packages serve both
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static)
# Static: Debian 12's qemu-user (7.2) hangs in the first pthread_create of a dynamic program.
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
set(ZLIB_LIBRARY /usr/lib/${CMAKE_LIBRARY_ARCHITECTURE}/libz.a)  # find_library would prefer libz.so
