#include <capo/engine/rng.h>

#include <utility>

namespace capo {
namespace {
thread_local GeneratorLog* current_log = nullptr;
thread_local RngCapture* current_capture = nullptr;
}

RngCapture* RngCapture::current() { return current_capture; }
RngCapture* RngCapture::set(RngCapture* capture) { return std::exchange(current_capture, capture); }

GeneratorLog::GeneratorLog() : outer_(current_log) { current_log = this; }
GeneratorLog::~GeneratorLog() { current_log = outer_; }

RngRange Generator::reserve(std::int64_t elements) {
  for (GeneratorLog* log = current_log; log; log = log->outer_) {
    bool known = false;
    for (const auto& e : log->entries_) known = known || e.generator == this;
    if (!known) log->entries_.push_back({this, seed_, offset_});
  }
  RngRange range{seed_, stream_, offset_};
  if (current_capture) current_capture->relate(*this, range);
  offset_ += static_cast<std::uint64_t>((elements + 3) / 4);
  return range;
}

}  // namespace capo
