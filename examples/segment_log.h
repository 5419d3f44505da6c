// What a segmentation run says while it goes: the bar, a line per validation, validation.csv and its curve.
#pragma once

#include <capo/datasets/plot.h>
#include <capo/engine/files.h>
#include <capo/examples/progress.h>
#include <capo/examples/segment_task.h>

#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace capo::examples {

class SegmentLog {
 public:
  // Rows of an earlier part of the run stay, up to the epoch it is resumed at.
  SegmentLog(const SegmentTask& task, std::vector<std::string> class_names, std::string csv)
      : task_(task), names_(std::move(class_names)), csv_(std::move(csv)) {}

  static void progress(const train::Progress& p, void* user) { static_cast<SegmentLog*>(user)->bar_.draw(p); }
  static void epoch(const train::EpochReport& r, void* user) { static_cast<SegmentLog*>(user)->report(r); }

  // Dice of each class, in percent, by epoch.
  std::vector<Series> curves() const {
    std::vector<Series> all;
    for (const auto& n : names_) all.push_back({.name = n, .markers = true});
    for (const auto& row : rows()) {
      for (std::size_t k = 0; k < all.size(); ++k) {
        all[k].x.push_back(row[0]);
        all[k].y.push_back(100 * row[3 + k]);
      }
    }
    return all;
  }

 private:
  void report(const train::EpochReport& r) {
    bar_.clear();
    if (!r.validated) return;
    std::string line = cat("epoch ", r.epoch + 1, ": train loss ", r.train_loss, ", validation loss ",
                           r.validation.loss, ", Dice %"),
                row = cat(r.epoch + 1, ",", r.train_loss, ",", r.validation.loss);
    for (std::size_t k = 0; k < names_.size(); ++k) {
      char text[64];
      std::snprintf(text, sizeof text, " %.2f", 100 * task_.mean_dice(k));
      line += cat(k ? ", " : " ", names_[k], text);
      row += cat(",", task_.mean_dice(k));
    }
    std::fprintf(stderr, "%s (%s)%s\n", line.c_str(), duration_text(r.seconds).c_str(), r.best ? ", best" : "");
    std::string text = "epoch,train_loss,validation_loss";
    for (const auto& n : names_) text += ",dice_" + n;
    std::ifstream in(csv_);
    for (std::string old; std::getline(in, old);)
      if (std::isdigit(static_cast<unsigned char>(old[0])) && std::stoll(old) <= r.epoch) text += "\n" + old;
    write_file_atomic(csv_, text + "\n" + row + "\n");
  }

  std::vector<std::vector<double>> rows() const {
    std::vector<std::vector<double>> all;
    std::ifstream in(csv_);
    for (std::string line; std::getline(in, line);) {
      if (!std::isdigit(static_cast<unsigned char>(line[0]))) continue;
      std::istringstream cells(line);
      all.emplace_back();
      for (std::string cell; std::getline(cells, cell, ',');) all.back().push_back(std::strtod(cell.c_str(), nullptr));
      if (all.back().size() != 3 + names_.size()) all.pop_back();
    }
    return all;
  }

  const SegmentTask& task_;
  std::vector<std::string> names_;
  std::string csv_;
  ProgressBar bar_{30};
};

}  // namespace capo::examples
