// --profile: a few training steps in the middle of a run, as a table on stdout and a trace in a file (docs/profile.md).
//
//   StepProfile profile(file);                      // empty: nothing happens
//   options.on_progress = StepProfile::progress; options.on_epoch = StepProfile::epoch; options.user = &profile;
#pragma once

#include <capo/engine/profile.h>
#include <capo/examples/progress.h>

#include <cstdio>
#include <string>
#include <utility>

namespace capo::examples {

class StepProfile {
 public:
  static constexpr int kWarm = 3, kSteps = 20;  // steps before, which fill caches, and steps that are profiled

  StepProfile(std::string file, double plain_seconds) : file_(std::move(file)), bar_(plain_seconds) {}

  static void progress(const train::Progress& p, void* user) {
    auto* self = static_cast<StepProfile*>(user);
    self->bar_.draw(p);
    self->step();
  }
  static void epoch(const train::EpochReport& r, void* user) { static_cast<StepProfile*>(user)->bar_.report(r); }

  // Once more at the end, for a run that was too short.
  void finish() {
    if (!profile_.running()) return;
    profile_.stop();
    bar_.clear();
    std::printf("profile of %d training steps: %s", done_ - kWarm, profile_.table().c_str());
    profile_.write_trace(file_);
    std::printf("trace in %s: open it at https://ui.perfetto.dev\n", file_.c_str());
    std::fflush(stdout);
  }

 private:
  void step() {
    if (file_.empty()) return;
    ++done_;
    if (done_ == kWarm) profile_.start();
    if (done_ == kWarm + kSteps) finish();
  }

  std::string file_;
  ProgressBar bar_;
  Profile profile_;
  int done_ = 0;
};

}  // namespace capo::examples
