// Progress for the example programs: a bar on a terminal, a plain line every few seconds elsewhere, on stderr; and
// Ctrl-C that finishes the step and saves.
//
//   ProgressBar bar;
//   options.on_progress = ProgressBar::progress; options.on_epoch = ProgressBar::epoch; options.user = &bar;
//   train::Trainer trainer(...);
//   const StopOnSignal stop(trainer);
#pragma once

#include <capo/models/train/trainer.h>

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <string>

namespace capo::examples {

// "2:03:04", "03:04".
inline std::string duration_text(double seconds) {
  if (!(seconds >= 0) || seconds > 3.6e8) return "--:--";
  const auto s = static_cast<long long>(std::llround(seconds));
  char text[48];
  if (s >= 3600)
    std::snprintf(text, sizeof text, "%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
  else
    std::snprintf(text, sizeof text, "%02lld:%02lld", s / 60, s % 60);
  return text;
}

class ProgressBar {
 public:
  explicit ProgressBar(double plain_seconds = 10) : tty_(::isatty(2) != 0), every_(tty_ ? 0.1 : plain_seconds) {}

  static void progress(const train::Progress& p, void* user) { static_cast<ProgressBar*>(user)->draw(p); }
  static void epoch(const train::EpochReport& r, void* user) { static_cast<ProgressBar*>(user)->report(r); }

  void draw(const train::Progress& p) {
    const auto now = Clock::now();
    if (p.batch < p.batches && std::chrono::duration<double>(now - shown_).count() < every_) return;
    if (!tty_ && p.batch == p.batches && std::chrono::duration<double>(now - shown_).count() < every_) return;
    shown_ = now;
    char text[320];
    std::snprintf(text, sizeof text,
                  "epoch %lld/%lld  %lld/%lld  loss %.4f  lr %.2e  %.0f img/s%s  eta %s  mem %.0f MiB (peak %.0f)",
                  static_cast<long long>(p.epoch + 1), static_cast<long long>(p.epochs),
                  static_cast<long long>(p.batch), static_cast<long long>(p.batches), p.loss, p.lr, p.images_per_s,
                  p.wait_share > 0.2 ? " (waiting for data)" : "", duration_text(p.eta_seconds).c_str(),
                  static_cast<double>(p.live_bytes) / 1048576.0, static_cast<double>(p.peak_bytes) / 1048576.0);
    if (!tty_) {
      std::fprintf(stderr, "%s\n", text);
      return;
    }
    constexpr int kWidth = 24;
    const int done = p.batches > 0 ? static_cast<int>(kWidth * p.batch / p.batches) : 0;
    std::string bar(static_cast<std::size_t>(done), '=');
    if (done < kWidth) bar += '>';
    bar.resize(kWidth, ' ');
    std::fprintf(stderr, "\r[%s] %s\x1b[K", bar.c_str(), text);
    open_line_ = true;
    std::fflush(stderr);
  }

  void report(const train::EpochReport& r) {
    clear();
    if (r.validated)
      std::fprintf(stderr, "epoch %lld: train loss %.4f, validation loss %.4f, top-1 %.2f %%, top-5 %.2f %%%s (%s)\n",
                   static_cast<long long>(r.epoch + 1), r.train_loss, r.validation.loss, 100 * r.validation.top1,
                   100 * r.validation.top5, r.best ? ", best" : "", duration_text(r.seconds).c_str());
    else
      std::fprintf(stderr, "epoch %lld: train loss %.4f (%s)\n", static_cast<long long>(r.epoch + 1), r.train_loss,
                   duration_text(r.seconds).c_str());
  }

  // For work that is no training: `done` of `all`.
  void count(std::int64_t done, std::int64_t all, const char* what) {
    const auto now = Clock::now();
    if (std::chrono::duration<double>(now - shown_).count() < every_) return;
    shown_ = now;
    std::fprintf(stderr, tty_ ? "\r%lld/%lld %s\x1b[K" : "%lld/%lld %s\n", static_cast<long long>(done),
                 static_cast<long long>(all), what);
    open_line_ = tty_;
    std::fflush(stderr);
  }

  // Before other output to the terminal.
  void clear() {
    if (open_line_) std::fprintf(stderr, "\r\x1b[K");
    open_line_ = false;
  }
  ~ProgressBar() { clear(); }

 private:
  using Clock = std::chrono::steady_clock;
  bool tty_, open_line_ = false;
  double every_;
  Clock::time_point shown_{};
};

// While alive, the first Ctrl-C (or SIGTERM) asks the trainer to finish its step, save and return; the next one kills.
class StopOnSignal {
 public:
  explicit StopOnSignal(train::Trainer& trainer) {
    target().store(&trainer);
    struct sigaction action {};
    action.sa_handler = [](int) {
      if (train::Trainer* t = target().load()) t->request_stop();
    };
    action.sa_flags = static_cast<int>(SA_RESETHAND) | SA_RESTART;
    ::sigaction(SIGINT, &action, &old_int_);
    ::sigaction(SIGTERM, &action, &old_term_);
  }
  ~StopOnSignal() {
    ::sigaction(SIGINT, &old_int_, nullptr);
    ::sigaction(SIGTERM, &old_term_, nullptr);
    target().store(nullptr);
  }
  StopOnSignal(const StopOnSignal&) = delete;
  StopOnSignal& operator=(const StopOnSignal&) = delete;

 private:
  static std::atomic<train::Trainer*>& target() {
    static std::atomic<train::Trainer*> t{nullptr};
    return t;
  }
  struct sigaction old_int_ {}, old_term_ {};
};

}  // namespace capo::examples
