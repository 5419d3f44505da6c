#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/join.h>
#include <capo/ops/view.h>
#include <capo/tuners/tuner.h>

#include <cmath>

namespace capo::tuners {
namespace {
constexpr const char* kSliceNames[] = {"q", "k", "v"};

nn::Linear& linear_of(nn::Module* target) {
  auto* linear = dynamic_cast<nn::Linear*>(target);
  CAPO_CHECK(linear, "lora: ", target->path(), " is no Linear and no Conv",
             target->attention_place() ? "; say which slices of its qkv (slices=qv), or name its qkv or proj" : "");
  return *linear;
}

}  // namespace

double LoraOptions::scale() const {
  const double top = alpha == 0 ? static_cast<double>(rank) : alpha;
  const double r = static_cast<double>(rank);
  return top / (rslora ? std::sqrt(r) : r);
}

Lora::Pair::Pair(Module* up, std::int64_t rank, std::int64_t in, std::int64_t out)
    : a(up, "a", {rank, in}, nn::Init::kaiming(std::sqrt(5.0))), b(up, "b", {out, rank}, nn::Init::zero()) {}
Lora::Slice::Slice(Module* up, std::string_view name, std::int64_t rank, std::int64_t width)
    : Module(up, name), Pair(this, rank, width, width) {}

Lora::Lora(nn::Module* target, std::string_view name, const LoraOptions& o)
    : FoldingTuner(target, name, linear_of(target).weight),
      options(o),
      linear_(&linear_of(target)),
      dropout_(this, "dropout", o.dropout) {
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

Tensor Lora::apply(const nn::Site& site) {
  if (merged()) return site.y;
  const double scale = options.scale();
  const Tensor x = dropout_(site.z);
  const auto branch = [&](const Pair& p, std::int64_t column) -> LinearBranch {
    const Tensor h = linear(x, p.a);
    return {scale == 1.0 ? h : h * scale, p.b, {}, column};  // scaled where the rows are short
  };
  if (whole_) return add_linear(site.y, {branch(*whole_, 0)});
  std::vector<LinearBranch> branches;
  for (int i = 0; i < 3; ++i)
    if (slice_[i]) branches.push_back(branch(*slice_[i], i * linear_->in()));
  return add_linear(site.y, branches);
}

Tensor Lora::delta_weight() const {
  const auto product = [&](const Pair& p) { return matmul(p.b.value(), p.a.value()) * options.scale(); };
  if (whole_) return product(*whole_);
  std::vector<Tensor> parts;
  for (const auto& p : slice_)
    parts.push_back(
        p ? product(*p)
          : zeros({linear_->in(), linear_->in()}, linear_->weight.value().dtype(), linear_->weight.value().device()));
  return concat(parts, 0);
}

}  // namespace capo::tuners
