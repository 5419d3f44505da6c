// The hooks through which shim.cpp tells the race checker (race.cpp) what happens; nothing in the sanitiser build.
#pragma once

#include <cstddef>
#include <string>

namespace capo::shim::race {

#if defined(CAPO_SHIM_RACE)
inline constexpr bool kOn = true;
void* allocate(std::size_t bytes, const char* name);  // from the one region that has shadow cells
void release(void* p);
void* arena(std::size_t bytes);
void shared_part(void* p, std::size_t bytes, const char* name);  // fresh, uninitialised
void shared_end(void* p, std::size_t bytes);
void mark_initialised(const void* p, std::size_t bytes);
std::string unwritten(const void* p, std::size_t bytes);  // "" or the first byte that nothing has written
void begin_launch();
void begin_block(int block, int threads);
void run_thread(int thread);  // -1: the host
void barrier();
void sync_warp(int warp, unsigned mask);
void read(const void* p, std::size_t bytes);
void write(const void* p, std::size_t bytes);
void async_begin(const void* p, std::size_t bytes);  // a cp.async may write these from now on,
void async_end(const void* p, std::size_t bytes);    // and has written them now
std::string take_failure();  // "" or the first failure since the last call
#else
inline constexpr bool kOn = false;
inline std::string unwritten(const void*, std::size_t) { return {}; }
inline void begin_launch() {}
inline void begin_block(int, int) {}
inline void run_thread(int) {}
inline void barrier() {}
inline void sync_warp(int, unsigned) {}
inline void read(const void*, std::size_t) {}
inline void write(const void*, std::size_t) {}
inline void async_begin(const void*, std::size_t) {}
inline void async_end(const void*, std::size_t) {}
inline std::string take_failure() { return {}; }
#endif

}  // namespace capo::shim::race
