// The accuracy curve in a training log.
#pragma once

#include <capo/datasets/plot.h>

#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace capo::examples {

// Epoch and top-1 in percent of every validation row of a train::Trainer's CSV, earlier runs included
// (step,epoch,kind,lr,loss,grad_norm,top1,..).
inline Series validation_curve(const std::string& csv, const std::string& name) {
  Series curve{.name = name, .markers = true};
  std::ifstream in(csv);
  for (std::string line; std::getline(in, line);) {
    std::vector<std::string> cells;
    std::istringstream row(line);
    for (std::string cell; std::getline(row, cell, ',');) cells.push_back(cell);
    if (cells.size() < 7 || cells[2] != "validation") continue;
    curve.x.push_back(std::stod(cells[1]) + 1);
    curve.y.push_back(100 * std::stod(cells[6]));
  }
  return curve;
}

}  // namespace capo::examples
