// Results in order, made ahead by worker threads: what Loader and PatchSource have in common.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace capo {

// Asked between parts of the work, so that a stop or a seek need not wait for the rest.
class StillWanted {
 public:
  virtual bool operator()() const = 0;

 protected:
  ~StillWanted() = default;
};

// Makes result number `ticket` = 0, 1, ... from the ticket alone; called from several threads. `memory` is a result
// that came back, or an empty one. Once wanted() is false the return value does not matter.
template <class T>
class Maker {
 public:
  virtual T make(T memory, std::int64_t ticket, const StillWanted& wanted) = 0;

 protected:
  ~Maker() = default;
};

// Workers claim tickets in order, at most `prefetch` ahead of the one next() waits for, and lay results into `done`.
// next, seek and recycle are for one thread at a time.
template <class T>
class Prefetch {
 public:
  // workers 0: next() makes each result itself. The maker must outlive this.
  Prefetch(Maker<T>& maker, int workers, int prefetch) : maker_(maker), prefetch_(prefetch) {
    try {
      for (int i = 0; i < workers; ++i) threads_.emplace_back([this] { run(); });
    } catch (...) {
      join();
      throw;
    }
  }
  ~Prefetch() { join(); }
  Prefetch(const Prefetch&) = delete;
  Prefetch& operator=(const Prefetch&) = delete;

  // The next result. An exception met while making it is rethrown here, and again at each further call until seek().
  T next() {
    std::unique_lock lock(mutex_);
    if (threads_.empty()) {
      T memory = take_spare();
      lock.unlock();
      T result = maker_.make(std::move(memory), wanted_, Wanted(*this, generation_));
      ++wanted_;
      return result;
    }
    ready_.wait(lock, [&] { return done_.count(wanted_) > 0; });
    const auto it = done_.find(wanted_);
    if (it->second.error) std::rethrow_exception(it->second.error);
    T result = std::move(it->second.value);
    done_.erase(it);
    ++wanted_;
    lock.unlock();
    work_.notify_one();
    return result;
  }

  void seek(std::int64_t ticket) {
    {
      std::lock_guard lock(mutex_);
      ++generation_;
      done_.clear();
      wanted_ = claimed_ = ticket;
    }
    work_.notify_all();
  }

  // Memory for a later result.
  void recycle(T&& result) {
    std::lock_guard lock(mutex_);
    if (spare_.size() < static_cast<std::size_t>(prefetch_)) spare_.push_back(std::move(result));
  }

 private:
  struct Wanted final : StillWanted {
    Wanted(Prefetch& p, std::uint64_t g) : owner(p), generation(g) {}
    bool operator()() const override {
      std::lock_guard lock(owner.mutex_);
      return !owner.stop_ && owner.generation_ == generation;
    }
    Prefetch& owner;
    std::uint64_t generation;
  };
  struct Result {
    T value;
    std::exception_ptr error;
  };

  T take_spare() {
    if (spare_.empty()) return {};
    T memory = std::move(spare_.back());
    spare_.pop_back();
    return memory;
  }

  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      work_.wait(lock, [&] { return stop_ || claimed_ < wanted_ + prefetch_; });
      if (stop_) return;
      const std::int64_t ticket = claimed_++;
      const std::uint64_t mine = generation_;
      T memory = take_spare();
      lock.unlock();
      Result r;
      try {
        r.value = maker_.make(std::move(memory), ticket, Wanted(*this, mine));
      } catch (...) {
        r.error = std::current_exception();
      }
      lock.lock();
      if (stop_) return;
      if (mine != generation_) continue;
      done_.emplace(ticket, std::move(r));
      if (ticket == wanted_) ready_.notify_one();
    }
  }

  void join() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    work_.notify_all();
    for (auto& t : threads_) t.join();
    threads_.clear();
  }

  Maker<T>& maker_;
  const int prefetch_;
  std::mutex mutex_;
  std::condition_variable work_, ready_;
  bool stop_ = false;
  std::uint64_t generation_ = 0;  // counts seeks: results of older generations are thrown away
  std::int64_t claimed_ = 0, wanted_ = 0;
  std::map<std::int64_t, Result> done_;
  std::vector<T> spare_;
  std::vector<std::thread> threads_;
};

}  // namespace capo
