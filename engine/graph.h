// A captured step of a CUDA device, run again as a whole: no launch costs and no host work between its kernels.
//
//   run();                                    // once as usual: what is made at first use cannot be made in a capture
//   Graph graph(x.device());
//   graph.capture([&] { y = model(x); });     // recorded, not run: y has its memory and no values yet
//   copy_into(x, batch);
//   graph.replay();                           // y = model(x)
//
// Tensors from outside keep their places: new inputs are copied into them, and they (weights, buffers) must live, in
// their storage, as long as the graph. Memory made in the capture is the graph's until the graph dies; results that
// outlive it stay valid. Gradients that the work makes are made anew at every replay: clear them before the capture.
//
// Arguments freeze: a rate, a scale or a counter that the host hands to an op by value stays what it was at the
// capture. What is to change is read by pointer: numbers() below, and random draws, which go on from one replay to the
// next as if run eagerly.
//
// What needs the host throws while capturing, naming itself: item, to_vector, to between host and device, synchronize,
// global_norm, all_finite. Work for the CPU runs once, at the capture.
//
// Ops that check an index tensor (ops/index.h) check it on the device at every replay. A wrong index counts as 0 there,
// so that nothing out of bounds is touched; then the replay, having run to its end, throws the op's error.
#pragma once

#include <capo/engine/backend.h>
#include <capo/engine/rng.h>
#include <capo/engine/tensor.h>

#include <memory>
#include <utility>
#include <vector>

namespace capo {

class Graph final : private RngCapture {
 public:
  // Throws unless `device` is a CUDA device that this process can use.
  explicit Graph(Device device);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Records what work() gives to the device's current stream on this thread; once. When it throws nothing is kept and
  // the graph may capture again. Generators stand afterwards where they stood before.
  template <class F>
  void capture(F&& work) {
    begin();
    try {
      work();
    } catch (...) {
      abandon();
      throw;
    }
    end();
  }

  // Uploads the numbers and the generators' places, runs the work on the current stream, and moves the generators
  // (which must live) on by what it drew. Version counters of tensors do not see it. Does not wait, unless the work
  // holds index ops: then it ends with check().
  void replay();
  // Waits for the last replay and throws for the first op of the work whose index was wrong: "gather: index must be in
  // [0, 5), got 7 at [3]". replay() leaves it to the caller for labels of cross_entropy, whose loss is NaN then.
  void check();

  // n numbers that kernels of the work read on the device when they run; the host sets them before each replay.
  struct Numbers {
    Tensor there;   // f32 [n]
    float* here;
  };
  Numbers numbers(std::int64_t n);

  // Whether this thread captures on the device.
  static bool capturing(Device device);
  // For ops, then: where the device says at every replay what it found: {0, 0}, or {1 + place of the first wrong index,
  // the index}. fail throws the op's error.
  struct Check {
    const char *op, *what;
    Shape shape;          // of the index tensor
    std::int64_t size;
    std::int64_t ignore;  // a value that is no index and not wrong; in [0, size): none
    void (*fail)(const Check& check, std::int64_t place, std::int64_t index);
    bool silent;          // the op's result does not show it: replay() must
  };
  static std::int64_t* add_check(const Check& check);

  bool captured() const { return work_ != nullptr; }
  Device device() const { return state_.device(); }
  const CapturedWork& work() const { return *work_; }

 private:
  struct Stream {
    Generator* generator;
    std::uint64_t start, blocks;  // where it stood at the capture; what a replay draws
    std::size_t at;               // of its RngPlace in here_
  };

  void begin();
  void end();
  void abandon() noexcept;
  void relate(Generator& generator, RngRange& range) override;
  std::size_t take(std::size_t bytes);

  Tensor state_;                     // the same bytes on the device
  std::vector<unsigned char> here_;  // of fixed size: pointers into it stay good
  std::size_t used_ = 0;
  std::vector<Stream> streams_;
  std::vector<std::pair<Check, std::size_t>> checks_;  // in the order of the work, with their words' place in here_
  std::unique_ptr<CapturedWork> work_;
};

}  // namespace capo
