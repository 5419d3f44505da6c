#include <capo/engine/error.h>
#include <capo/engine/graph.h>
#include <capo/engine/profile_internal.h>

#include <algorithm>
#include <cstring>

namespace capo {
namespace {

constexpr std::size_t kBytes = 48 << 10;  // what one upload takes, and 3,000 generators or 12,000 numbers
thread_local Graph* active = nullptr;

}  // namespace

void refuse_capture(const char* what) {
  CAPO_CHECK(!active, what, ": needs the host, which cannot take part while a graph is captured on ",
             active->device());
}

bool capturing_graph() { return active != nullptr; }

Graph::Graph(Device device) : here_(kBytes) {
  backend_for(device);
  state_ = empty({kBytes / sizeof(float)}, f32, device);
}

Graph::~Graph() = default;

void Graph::begin() {
  CAPO_CHECK(!active, "graph: this thread is capturing another");
  CAPO_CHECK(!work_, "graph: has captured already");
  streams_.clear();  // of a capture that could not be ended
  checks_.clear();
  backend_for(device()).begin_capture(device().index);
  active = this;
  RngCapture::set(this);
}

void Graph::end() {
  active = nullptr;
  RngCapture::set(nullptr);
  for (Stream& s : streams_) {
    s.blocks = s.generator->offset() - s.start;
    s.generator->set_offset(s.start);
  }
  work_ = backend_for(device()).end_capture(device().index);
}

void Graph::abandon() noexcept {
  active = nullptr;
  RngCapture::set(nullptr);
  for (const Stream& s : streams_) s.generator->set_offset(s.start);
  streams_.clear();
  checks_.clear();
  backend_for(device()).abandon_capture(device().index);
}

void Graph::replay() {
  refuse_capture("graph: replay");
  CAPO_CHECK(work_, "graph: replay before a capture");
  for (const Stream& s : streams_) {
    const RngPlace place{s.generator->seed(), s.generator->offset()};
    std::memcpy(here_.data() + s.at, &place, sizeof place);
  }
  if (used_ > 0) backend_for(device()).upload(device().index, state_.data(), here_.data(), used_);
  if (detail::profiling()) {
    {
      const detail::TimedLaunch timed("graph_replay", device(), {}, backend_for(device()).stream(device().index));
      work_->launch();
    }
    detail::name_launches("graph_replay", "");
  } else {
    work_->launch();
  }
  for (const Stream& s : streams_) s.generator->set_offset(s.generator->offset() + s.blocks);
  if (std::any_of(checks_.begin(), checks_.end(), [](const auto& c) { return c.first.silent; })) check();
}

void Graph::check() {
  if (checks_.empty()) return;
  std::vector<unsigned char> there(used_);
  copy_bytes(there.data(), kCpu, state_.data(), device(), used_);
  for (const auto& [check, at] : checks_) {
    std::int64_t found[2];
    std::memcpy(found, there.data() + at, sizeof found);
    if (found[0] != 0) check.fail(check, found[0] - 1, found[1]);
  }
}

bool Graph::capturing(Device device) { return active && active->device() == device; }

std::int64_t* Graph::add_check(const Check& check) {
  CAPO_CHECK(active, "graph: checks are added during a capture");
  const std::size_t at = active->take(2 * sizeof(std::int64_t));
  active->checks_.emplace_back(check, at);
  return reinterpret_cast<std::int64_t*>(static_cast<unsigned char*>(active->state_.data()) + at);
}

std::size_t Graph::take(std::size_t bytes) {
  CAPO_CHECK(used_ + bytes <= kBytes, "graph: more than ", kBytes, " bytes of numbers and generators");
  const std::size_t at = used_;
  used_ += (bytes + 15) / 16 * 16;
  return at;
}

Graph::Numbers Graph::numbers(std::int64_t n) {
  CAPO_CHECK(n > 0 && !work_, "graph: numbers are made before the capture ends, at least one, asked for ", n);
  const std::size_t at = take(static_cast<std::size_t>(n) * sizeof(float));
  return {strided_view(state_, {n}, {1}, static_cast<std::int64_t>(at / sizeof(float))),
          reinterpret_cast<float*>(here_.data() + at)};
}

void Graph::relate(Generator& generator, RngRange& range) {
  const Stream* stream = nullptr;
  for (const Stream& s : streams_)
    if (s.generator == &generator) stream = &s;
  if (!stream) {
    streams_.push_back({&generator, range.offset, 0, take(sizeof(RngPlace))});
    stream = &streams_.back();
  }
  range.offset -= stream->start;
  range.place = reinterpret_cast<const RngPlace*>(static_cast<unsigned char*>(state_.data()) + stream->at);
}

}  // namespace capo
