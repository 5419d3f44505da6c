// The little of std::atomic that handles need, by the compiler's builtins: <atomic> would cost every file that includes
// tensor.h a tenth of a second.
#pragma once

namespace capo {

// T: an integer or a pointer. Loads and stores are relaxed.
template <class T>
class Atomic {
 public:
  constexpr Atomic(T v) : v_(v) {}
  Atomic(const Atomic&) = delete;
  Atomic& operator=(const Atomic&) = delete;

  T load() const { return __atomic_load_n(&v_, __ATOMIC_RELAXED); }
  void store(T v) { __atomic_store_n(&v_, v, __ATOMIC_RELAXED); }
  void add(T v) { __atomic_fetch_add(&v_, v, __ATOMIC_RELAXED); }
  // The value before; orders everything done to the object before its last release (acquire and release).
  T release(T v) { return __atomic_fetch_sub(&v_, v, __ATOMIC_ACQ_REL); }

 private:
  T v_;
};

}  // namespace capo
