#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/join.h>
#include <capo/ops/view.h>
#include <capo/tuners/tuner.h>

#include <cmath>

namespace capo::tuners {

void Tuner::merge() { detail::fail(path(), ": this tuner does not fold into weights"); }
void Tuner::unmerge() { detail::fail(path(), ": this tuner does not fold into weights"); }

FoldingTuner::FoldingTuner(nn::Module* target, std::string_view name, nn::Parameter& weight)
    : Tuner(target, name), parameter_(weight) {}

FoldingTuner::~FoldingTuner() {
  if (merged()) swap_back();
}

void FoldingTuner::merge() {
  CAPO_CHECK(!merged(), path(), ": is merged already");
  const NoGrad off;
  weight_ = parameter_.value();
  Tensor sum = weight_ + delta_weight();
  weight_.swap_storage(sum);
  kept_ = sum;  // holds the base's storage now
}

void FoldingTuner::unmerge() {
  CAPO_CHECK(merged(), path(), ": is not merged");
  CAPO_CHECK(parameter_.value().same(weight_), path(), ": ", parameter_.path(), " was replaced while merged");
  swap_back();
}

void FoldingTuner::swap_back() {
  weight_.swap_storage(kept_);
  weight_ = kept_ = Tensor();
}

namespace {

std::int64_t width_of(nn::Module* target, std::string_view name) {
  CAPO_CHECK(target->width() > 0, name, ": ", target->path(), " is no module that maps tokens to tokens");
  return target->width();
}
int heads_of(nn::Module* target, std::string_view name) {
  CAPO_CHECK(target->heads() > 0, name, ": ", target->path(), " belongs to no model with attention heads");
  return target->heads();
}
std::int64_t input_width_of(nn::Module* target, Reads reads) {
  return reads == Reads::y ? width_of(target, "u_adapter") : width_of(target, "u_adapter") ? target->input_width() : 0;
}
// Learned tokens beside an OP are compared with its input and added to its output.
std::int64_t square_width_of(nn::Module* target, std::string_view name) {
  const std::int64_t d = width_of(target, name);
  CAPO_CHECK(target->input_width() == d, name, ": ", target->path(), " maps width ", target->input_width(), " to ", d,
             "; tokens beside it need equal widths");
  CAPO_CHECK(d % heads_of(target, name) == 0, name, ": width ", d, " of ", target->path(), " is no multiple of ",
             target->heads(), " heads");
  return d;
}
std::int64_t positive(std::int64_t n, const char* what) {
  CAPO_CHECK(n > 0, what, " must be positive, got ", n);
  return n;
}

// [p, d] -> [B, p, H, d / H], shared by the batch.
Tensor split_heads(const Tensor& t, std::int64_t batch, int heads) {
  const std::int64_t p = t.size(-2), d = t.size(-1);
  return expand(reshape(t, {1, p, heads, d / heads}), {batch, p, heads, d / heads});
}

// concat_heads Attn(split(z), k, v) for z [B, N, d] and learned k, v [p, d].
Tensor attend_to(const Tensor& z, const Tensor& k, const Tensor& v, int heads) {
  CAPO_CHECK(z.rank() == 3, "u_tuner: tokens must be [B, N, C], got ", z.shape());
  const std::int64_t b = z.size(0), n = z.size(1), d = z.size(2);
  const Tensor q = reshape(z, {b, n, heads, d / heads});
  return reshape(attention(q, split_heads(k, b, heads), split_heads(v, b, heads)).o, {b, n, d});
}

// y + tau where y may be an f32 stream and tau 16-bit.
Tensor plus(const Tensor& y, const Tensor& tau) { return y + cast(tau, y.dtype()); }

}  // namespace

UAdapter::UAdapter(nn::Module* target, std::string_view name, const AdapterOptions& o)
    : Tuner(target, name), options(o),
      down(this, "down", input_width_of(target, o.reads), positive(o.dim, "u_adapter: dim"), true,
           o.zero_up ? nn::Init::kaiming(std::sqrt(5.0)) : nn::Init::xavier()),
      up(this, "up", o.dim, width_of(target, "u_adapter"), true, o.zero_up ? nn::Init::zero() : nn::Init::xavier()) {}

Tensor UAdapter::apply(const nn::Site& site) {
  const Tensor& t = options.reads == Reads::x ? site.x : options.reads == Reads::z ? site.z : site.y;
  return up.add_to(site.y, down.with_activation(cast(t, down.weight.value().dtype()), options.act), options.scale);
}

UPrefix::UPrefix(nn::Module* core, std::string_view name, const nn::AttentionPlace& place, const TokenOptions& o)
    : Tuner(core, name), k(this, "k", {positive(o.length, "u_prefix: length"), place.qkv->in()}, nn::Init::xavier()),
      v(this, "v", {o.length, place.qkv->in()}, nn::Init::xavier()), heads_(place.heads) {}

AttentionOut UPrefix::apply(const nn::CoreSite& site) {
  AttentionOptions options;
  options.scale = site.scale;
  const std::int64_t batch = site.q.size(0);
  const AttentionOut pre = attention(site.q, split_heads(k, batch, heads_), split_heads(v, batch, heads_), options);
  return lse_merge(site.out.o, site.out.lse, pre.o, pre.lse);
}

UPrompt::UPrompt(nn::Module* core, std::string_view name, const nn::AttentionPlace& place, const TokenOptions& o)
    : Tuner(core, name),
      tokens(this, "tokens", {positive(o.length, "u_prompt: length"), place.qkv->in()}, nn::Init::xavier()),
      place_(place) {}

AttentionOut UPrompt::apply(const nn::CoreSite& site) {
  AttentionOptions options;
  options.scale = site.scale;
  const std::int64_t p = tokens.value().size(0), d = tokens.value().size(1), batch = site.q.size(0);
  const Tensor placed = reshape(tokens, {1, p, d});
  const Tensor normed = place_.pre_norm ? place_.pre_norm->reapply(placed) : placed;
  const auto parts = unbind(reshape((*place_.qkv)(normed), {1, p, 3, place_.heads, d / place_.heads}), 2);
  const Tensor k = place_.k_norm ? place_.k_norm->reapply(parts[1]) : parts[1];
  const Shape shape{batch, p, place_.heads, d / place_.heads};
  const AttentionOut pro = attention(site.q, expand(k, shape), expand(parts[2], shape), options);
  return lse_merge(site.out.o, site.out.lse, pro.o, pro.lse);
}

UPrefixBeside::UPrefixBeside(nn::Module* target, std::string_view name, const TokenOptions& o)
    : Tuner(target, name),
      k(this, "k", {positive(o.length, "u_prefix: length"), square_width_of(target, "u_prefix")}, nn::Init::xavier()),
      v(this, "v", {o.length, k.value().size(1)}, nn::Init::zero()) {}
Tensor UPrefixBeside::apply(const nn::Site& site) {
  return plus(site.y, attend_to(cast(site.z, k.value().dtype()), k, v, target().heads()));
}

UPromptBeside::UPromptBeside(nn::Module* target, std::string_view name, const TokenOptions& o)
    : Tuner(target, name),
      tokens(this, "tokens", {positive(o.length, "u_prompt: length"), square_width_of(target, "u_prompt")},
             nn::Init::xavier()),
      scale(this, "scale", {1}, nn::Init::zero()) {}
Tensor UPromptBeside::apply(const nn::Site& site) {
  const Tensor z = cast(site.z, scale.value().dtype());
  return plus(site.y, attend_to(z, tokens, tokens, target().heads()) * scale.value());
}

}  // namespace capo::tuners
