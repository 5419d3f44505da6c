// Crash-safe training checkpoints: kill -9, power loss or a full disk at any moment leaves a readable checkpoint that
// is at least as new as the last save() that returned.
//
// <dir>/last.safetensors      the newest
// <dir>/previous.safetensors  the one before (a hard link made before the rename)
// A save writes a temporary file, fsyncs it, links last to previous, renames the temporary over last, and fsyncs the
// folder. Every failure is an Error; the old files stay.
//
// Tensors, all in PyTorch layout: "model/<path>" (trainable parameters and all buffers; frozen parameters are not
// stored, but their SHA-256 is), "optimizer/...", "ema/...". The metadata entry "capo.checkpoint" is one JSON object:
// format, library, position, seed, schedule, settings, generators, sha256 of every tensor, sha256 of the frozen
// parameters.
#pragma once

#include <capo/engine/rng.h>
#include <capo/models/train/ema.h>
#include <capo/models/train/optim.h>
#include <capo/models/train/schedule.h>

#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace capo::train {

// Where a run is. All of it is exact after a round trip.
struct Position {
  std::int64_t epoch = 0;
  std::int64_t batch = 0;  // the next batch of the epoch; batches_per_epoch: all are done, the epoch's end is not
  std::int64_t step = 0;   // optimiser steps done
  double best = -std::numeric_limits<double>::infinity();  // best validation metric so far; -inf: none
  double loss_sum = 0;          // over the epoch's batches so far
  std::int64_t loss_count = 0;  // samples in it
  std::int64_t csv_rows = 0;    // written so far
  double loss_scale = 1;        // of the next step, and steps since it last changed (TrainOptions::loss_scale)
  std::int64_t clean_steps = 0;
};

// What a checkpoint holds; null members are left out (and must then be absent from the file).
struct TrainState {
  nn::Module* module = nullptr;  // required
  Optimizer* optimizer = nullptr;
  Ema* ema = nullptr;
  std::uint64_t seed = 0;
  Schedule schedule = {};
  Position position = {};
  std::string settings = "";  // the run's other settings as text: must be equal on load
};

// Random streams inside the module tree (nn::Module::generator), by module path.
std::vector<std::pair<std::string, Generator*>> generators(nn::Module& module);

class Checkpointer {
 public:
  // Makes the folder, takes an exclusive lock on it (two runs in one folder throw) and removes temporaries that a
  // killed run left.
  explicit Checkpointer(const std::string& dir);
  ~Checkpointer();
  Checkpointer(const Checkpointer&) = delete;
  Checkpointer& operator=(const Checkpointer&) = delete;

  const std::string& dir() const { return dir_; }
  std::string last() const { return dir_ + "/last.safetensors"; }
  std::string previous() const { return dir_ + "/previous.safetensors"; }
  // A checkpoint is there to resume from.
  bool exists() const;

  void save(const TrainState& state);

  // Reads last, checks all of it (container, hashes, names, shapes, dtypes, frozen parameters, seed, schedule,
  // settings, generators), and only then copies it into the state's module, optimizer, ema and position.
  // When last is missing or damaged, previous is taken and a warning logged. Returns the file that was loaded.
  // A sound file of another run (other names, seed, schedule, settings, frozen parameters) always throws.
  std::string load(TrainState& state);

 private:
  std::string frozen_hash(nn::Module& module);

  std::string dir_;
  int lock_ = -1;
  // The frozen parameters' hash is computed once, as long as nobody writes to them.
  std::string frozen_hash_;
  std::vector<std::pair<const void*, std::uint64_t>> frozen_key_;
};

// The checkpoint's JSON text, checked for integrity only; for tools that list checkpoints.
std::string checkpoint_info(const std::string& path);

}  // namespace capo::train
