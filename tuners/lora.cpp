#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/join.h>
#include <capo/ops/view.h>
#include <capo/tuners/tuner.h>

#include <cmath>

namespace capo::tuners {
namespace {
constexpr const char* kSliceNames[] = {"q", "k", "v"};
}

Lora::Pair::Pair(Module* up, std::int64_t rank, std::int64_t in, std::int64_t out)
    : a(up, "a", {rank, in}, nn::Init::kaiming(std::sqrt(5.0))), b(up, "b", {out, rank}, nn::Init::zero()) {}
Lora::Slice::Slice(Module* up, std::string_view name, std::int64_t rank, std::int64_t width)
    : Module(up, name), Pair(this, rank, width, width) {}

Lora::Lora(nn::Module* target, std::string_view name, const LoraOptions& o)
    : Tuner(target, name),
      options(o),
      linear_(dynamic_cast<nn::Linear*>(target)),
      dropout_(this, "dropout", o.dropout) {
  CAPO_CHECK(linear_, "lora: ", target->path(), " is no Linear",
             target->attention_place() ? "; say which slices of its qkv (slices=qv), or name its qkv or proj" : "");
  CAPO_CHECK(o.rank > 0, "lora: rank must be positive, got ", o.rank);
  if (o.slices.empty()) {
    whole_ = std::make_unique<Pair>(this, o.rank, linear_->in(), linear_->out());
    return;
  }
  CAPO_CHECK(linear_->out() == 3 * linear_->in(), "lora: slices need a fused qkv [3 C, C], ", target->path(), " is ",
             linear_->weight.value().shape());
  for (char c : o.slices) {
    if (c == ',' || c == ' ' || c == '+') continue;
    const int i = c == 'q' ? 0 : c == 'k' ? 1 : c == 'v' ? 2 : -1;
    CAPO_CHECK(i >= 0 && !slice_[i], "lora: slices must name q, k, v at most once each, got \"", o.slices, "\"");
    slice_[i] = std::make_unique<Slice>(this, kSliceNames[i], o.rank, linear_->in());
  }
  CAPO_CHECK(slice_[0] || slice_[1] || slice_[2], "lora: slices must name q, k or v, got \"", o.slices, "\"");
}

Lora::~Lora() {
  if (merged_) swap_back();
}

double Lora::scale() const {
  const double alpha = options.alpha == 0 ? static_cast<double>(options.rank) : options.alpha;
  const double r = static_cast<double>(options.rank);
  return alpha / (options.rslora ? std::sqrt(r) : r);
}

Tensor Lora::apply(const nn::Site& site) {
  if (merged_) return site.y;
  const Tensor x = dropout_(site.z);
  const auto branch = [&](const Pair& p, std::int64_t column) -> LinearBranch {
    const Tensor h = linear(x, p.a);
    return {scale() == 1.0 ? h : h * scale(), p.b, {}, column};  // scaled where the rows are short
  };
  if (whole_) return add_linear(site.y, {branch(*whole_, 0)});
  std::vector<LinearBranch> branches;
  for (int i = 0; i < 3; ++i)
    if (slice_[i]) branches.push_back(branch(*slice_[i], i * linear_->in()));
  return add_linear(site.y, branches);
}

Tensor Lora::delta_weight() const {
  const auto product = [&](const Pair& p) { return matmul(p.b.value(), p.a.value()) * scale(); };
  if (whole_) return product(*whole_);
  std::vector<Tensor> parts;
  for (const auto& p : slice_)
    parts.push_back(
        p ? product(*p)
          : zeros({linear_->in(), linear_->in()}, linear_->weight.value().dtype(), linear_->weight.value().device()));
  return concat(parts, 0);
}

void Lora::merge() {
  CAPO_CHECK(!merged_, path(), ": is merged already");
  const NoGrad off;
  weight_ = linear_->weight.value();
  kept_ = weight_ + delta_weight();
  weight_.swap_storage(kept_);  // kept_ now holds the base's storage
  merged_ = true;
}

void Lora::unmerge() {
  CAPO_CHECK(merged_, path(), ": is not merged");
  CAPO_CHECK(linear_->weight.value().same(weight_), path(), ": ", linear_->weight.path(), " was replaced while merged");
  swap_back();
}

void Lora::swap_back() {
  weight_.swap_storage(kept_);
  weight_ = kept_ = Tensor();
  merged_ = false;
}

}  // namespace capo::tuners
