// The module tree: declared is registered, paths equal PyTorch's, tuners hang on as taps.
//
//   struct Block : nn::Layer<Block> {
//     nn::LayerNorm norm1{this, "norm1", dim};      // path "blocks.3.norm1"
//     ...
//     Tensor forward(const Tensor& x);
//   };
//
// Modules have fixed addresses (they never move). operator() runs forward, then the taps. A forward under NoGrad
// changes nothing in the module, so several threads may run one model at once.
#pragma once

#include <capo/autograd/autograd.h>
#include <capo/engine/rng.h>
#include <capo/engine/tensor.h>
#include <capo/ops/attention.h>

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace capo::nn {

class Module;

// How a tensor lies in a PyTorch-layout file, relative to ours. Declared by the layer, never guessed from a shape.
enum class Layout {
  plain,           // the same
  conv,            // ours [O, k.., I], file [O, I, k..]
  conv_transpose,  // ours [I, k.., O], file [I, O, k..]
};

// base: the model's own; tuner: added by a tuner; head: the task's classifier.
enum class Kind { base, tuner, head };

// Initial values; drawn from (seed, full path), so that adding a module changes nothing else, and the same on every
// device.
struct Init {
  enum class Rule {
    zeros,
    ones,
    constant,
    uniform,
    normal,
    trunc_normal,
    xavier_uniform,
    kaiming_uniform
  } rule = Rule::zeros;
  double a = 0;  // constant, uniform bound, std (trunc_normal cuts at +-2 as timm does), or the `a` of kaiming_uniform
  static Init zero() { return {}; }
  static Init one() { return {Rule::ones, 0}; }
  static Init constant(double v) { return {Rule::constant, v}; }
  static Init uniform(double bound) { return {Rule::uniform, bound}; }
  static Init normal(double std) { return {Rule::normal, std}; }
  static Init trunc_normal(double std) { return {Rule::trunc_normal, std}; }
  static Init xavier() { return {Rule::xavier_uniform, 0}; }      // fan_in = product of all but the first axis
  static Init kaiming(double a) { return {Rule::kaiming_uniform, a}; }
};

// What a root is built with; children follow it.
struct Build {
  std::uint64_t seed = 0;
  DType dtype = f32;
  Device device = kCpu;
};

// A trainable tensor (or, as `Buffer`, a tensor that is state but not trained). Registered by its constructor.
class Parameter {
 public:
  Parameter(Module* up, std::string_view name, const Shape& shape, Init init, Layout layout = Layout::plain,
            bool buffer = false);
  Parameter(const Parameter&) = delete;

  const Tensor& value() const { return value_; }
  operator const Tensor&() const { return value_; }
  // Replaces the tensor (same shape, dtype and device); keeps requires_grad.
  void set(const Tensor& t);

  const std::string& name() const { return name_; }
  std::string path() const;
  Layout layout() const { return layout_; }
  bool is_buffer() const { return buffer_; }
  Kind kind() const;
  Module& owner() const { return *up_; }
  bool trainable() const { return !buffer_ && requires_grad(value_); }
  void set_trainable(bool on);

 private:
  friend class Module;
  Module* up_;
  std::string name_;
  Tensor value_;
  Layout layout_;
  bool buffer_;
};

struct Buffer : Parameter {
  Buffer(Module* up, std::string_view name, const Shape& shape, Init init)
      : Parameter(up, name, shape, init, Layout::plain, true) {}
};

// What a tap sees of one call.
struct Site {
  Tensor x;  // the module's input before the norm, where the caller has one (a residual block's stream); else z
  Tensor z;  // the module's input
  Tensor y;  // its output so far
};

// The same at the core of an attention: heads split, before the output projection. See nn::Attention.
struct CoreSite {
  Tensor z;        // the attention's input [B, N, C]
  Tensor q, k, v;  // [B, N, H, D]
  double scale;    // of q k^T
  AttentionOut out;
};

// Something that changes a module's output. Tuners derive from it (tuners/tuner.h).
class Tap {
 public:
  virtual ~Tap() = default;
  virtual Tensor apply(const Site& site) { return site.y; }
  virtual AttentionOut apply(const CoreSite& site) { return site.out; }
};

struct AttentionPlace;  // nn/attention.h

class Module {
 public:
  // A root.
  explicit Module(const Build& build);
  // A child. name: one path segment. It is of its parent's kind unless said otherwise.
  Module(Module* up, std::string_view name);
  Module(Module* up, std::string_view name, Kind kind) : Module(up, name) { kind_ = kind; }
  virtual ~Module();
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  const std::string& name() const { return name_; }
  const std::string& path() const { return path_; }  // "" for the root
  Module* parent() const { return up_; }
  const Module& root() const;
  const Build& build() const { return build_; }
  Kind kind() const { return kind_; }

  const std::vector<Module*>& children() const { return children_; }
  const std::vector<Parameter*>& own_parameters() const { return parameters_; }
  // The whole subtree, declaration order, this module first.
  std::vector<Module*> modules();
  std::vector<Parameter*> parameters(bool buffers = false);

  bool training() const { return training_; }
  void train(bool on = true);  // the subtree
  // Moves a whole model, tuners included, to another device; gradients are dropped. Throws on a child. Before
  // optimisers and averages are made, and with no tuner merged: those keep the tensors that were there.
  void move_to(Device device);
  // Frozen: no parameter of the subtree is trainable; a frozen batch_norm never updates its statistics.
  void set_trainable(bool on);

  // Hangs a tap below this module: T(this, name, args...). Returns it; the module owns it.
  template <class T, class... Args>
  T& attach(std::string_view name, Args&&... args) {
    check_runs_taps(name);
    auto tap = std::make_unique<T>(this, name, std::forward<Args>(args)...);
    T& ref = *tap;
    taps_.push_back({std::string(name), std::move(tap), &ref});
    return ref;
  }
  // Observers that are not modules (tests, feature extraction) are not owned.
  void attach_observer(Tap* tap) {
    check_runs_taps("an observer");
    taps_.push_back({"", nullptr, tap});
  }
  void detach(std::string_view name);  // throws when there is none of that name
  void detach_observers();
  bool tapped() const { return !taps_.empty(); }
  std::vector<std::string> tap_names() const;
  Module* tap(std::string_view name) const;

  // Where attention tuners attach; null for modules that are no attention.
  virtual const AttentionPlace* attention_place() { return nullptr; }
  // Attention heads of the model part this module belongs to (0: unknown); tuners beside an FFN use the same number.
  virtual int heads() const { return up_ ? up_->heads() : 0; }
  // Width of the tokens this module makes (0: it is no token-to-token module), and of those it reads.
  virtual std::int64_t width() const { return 0; }
  virtual std::int64_t input_width() const { return width(); }
  // The module's own random stream, which a checkpoint of training holds; null for modules that draw nothing.
  virtual Generator* generator() { return nullptr; }
  // False for mere containers: nothing would ever run a tap there, so attaching throws.
  virtual bool runs_taps() const { return false; }
  // A computation that tuners may apply again (norms); throws for others.
  virtual Tensor reapply(const Tensor& x);

 protected:
  Tensor run_taps(Site site) {
    for (auto& t : taps_) site.y = t.tap->apply(site);
    return site.y;
  }
  AttentionOut run_core_taps(CoreSite site) {
    for (auto& t : taps_) site.out = t.tap->apply(site);
    return site.out;
  }

 private:
  friend class Parameter;
  void check_runs_taps(std::string_view name) const;
  struct Hung {
    std::string name;
    std::unique_ptr<Module> owned;
    Tap* tap;
  };
  Module* up_ = nullptr;
  std::string name_, path_;
  Build build_;
  Kind kind_ = Kind::base;
  bool training_ = false;
  std::vector<Module*> children_;
  std::vector<Parameter*> parameters_;
  std::vector<Hung> taps_;
};

// Gives a module its call operator: m(x) = taps(forward(x)). m.call(x, z) also tells the taps x, the stream before the
// norm.
template <class Derived>
class Layer : public Module {
 public:
  using Module::Module;
  Tensor operator()(const Tensor& z) { return call(z, z); }
  Tensor call(const Tensor& x, const Tensor& z) {
    const ModuleScope scope(&path());
    const Tensor y = static_cast<Derived*>(this)->forward(z);
    return tapped() ? run_taps({x, z, y}) : y;
  }
  bool runs_taps() const final { return true; }
};

// Owns and numbers children: blocks.0, blocks.1, ...
template <class T>
class List : public Module {
 public:
  using Module::Module;
  template <class... Args>
  T& add(Args&&... args) {
    items_.push_back(std::make_unique<T>(this, std::to_string(items_.size()), std::forward<Args>(args)...));
    return *items_.back();
  }
  int size() const { return static_cast<int>(items_.size()); }
  T& operator[](int i) { return *items_[static_cast<std::size_t>(i)]; }
  auto begin() { return items_.begin(); }
  auto end() { return items_.end(); }

 private:
  std::vector<std::unique_ptr<T>> items_;
};

// "*" matches inside one path segment, "**" across segments.
bool matches(std::string_view pattern, std::string_view path);
// Parameters (or modules) whose path matches; throws with near misses when there is none.
std::vector<Parameter*> find_parameters(Module& m, std::string_view pattern);
std::vector<Module*> find_modules(Module& m, std::string_view pattern);
// Parameters matching the pattern, or lying below a module that does, stop training (buffers stop updating).
void freeze(Module& m, std::string_view pattern);
void unfreeze(Module& m, std::string_view pattern);

std::int64_t parameter_count(Module& m, bool trainable_only = false);
// Layers, shapes, parameters, one line each.
std::string summary(Module& m);

}  // namespace capo::nn
