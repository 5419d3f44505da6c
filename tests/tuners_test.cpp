// Tuners: parameter counts, the identities that define them, starts, folding, what they leave alone.
#include <doctest/doctest.h>

#include <capo/models/nn/state.h>
#include <capo/models/vit/vit.h>
#include <capo/ops/binary.h>
#include <capo/ops/cross_entropy.h>
#include <capo/ops/join.h>
#include <capo/ops/layer_norm.h>
#include <capo/ops/matmul.h>
#include <capo/ops/softmax.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>
#include <capo/tests/support.h>
#include <capo/tuners/spec.h>

#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

using namespace capo;
using test::close;
using test::normal;
using test::same_bits;
using testing::bytes_of;

namespace {

constexpr std::int64_t kDim = 24;
constexpr int kHeads = 3;
constexpr double kScale = 0.35355339059327373;  // 1 / sqrt(8)

vit::VitConfig small(int classes = 5) {
  vit::VitConfig c;
  c.image = 8;
  c.patch = 4;
  c.dim = kDim;
  c.depth = 2;
  c.heads = kHeads;
  c.mlp_ratio = 2;
  c.classes = classes;
  return c;
}

// No parameter stays at zero, no norm at one.
void randomise(nn::Module& m) {
  const NoGrad off;
  for (nn::Parameter* p : m.parameters()) {
    const bool norm_weight = p->name() == "weight" && p->value().rank() == 1;
    copy_into(p->value(), cast(normal(p->value().shape(), p->path(), norm_weight ? 1 : 0, 0.2), p->value().dtype()));
  }
}

// One block as a root, so that the stream is in our hands.
struct Net : nn::Layer<Net> {
  explicit Net(const vit::VitConfig& c, const nn::Build& build = {.dtype = f64})
      : Layer(build), block(this, "block", c, 0) {}
  Tensor forward(const Tensor& x) { return block(x); }
  int heads() const override { return kHeads; }
  vit::Block block;
};

// Value, then the gradient of <y, cotangent> for x and each named leaf.
struct Result {
  Tensor y;
  std::vector<Tensor> grads;
};
template <class F>
Result differentiate(F&& f, const std::vector<Tensor>& leaves) {
  Result r{f(), {}};
  r.grads = grad({r.y}, leaves, {normal(r.y.shape(), "cotangent")});
  return r;
}
// Both have a gradient for every leaf: where neither had one, nothing would be compared.
void check_reached(const Result& a, const Result& b) {
  REQUIRE(a.grads.size() == b.grads.size());
  for (std::size_t i = 0; i < a.grads.size(); ++i)
    REQUIRE_MESSAGE((a.grads[i].defined() && b.grads[i].defined()), "gradient " << i);
}
void check_same(const Result& a, const Result& b, double tol) {
  CHECK(close(a.y, b.y, tol, 0));
  check_reached(a, b);
  for (std::size_t i = 0; i < a.grads.size(); ++i)
    CHECK_MESSAGE(close(a.grads[i], b.grads[i], tol, 1e-3), "gradient " << i);
}
void check_bits(const Result& a, const Result& b) {
  CHECK(same_bits(a.y, b.y));
  check_reached(a, b);
  for (std::size_t i = 0; i < a.grads.size(); ++i)
    CHECK_MESSAGE(same_bits(a.grads[i], b.grads[i]), "gradient " << i);
}

std::vector<Tensor> values_of(nn::Module& m) {
  std::vector<Tensor> all;
  for (nn::Parameter* p : m.parameters())
    if (p->trainable()) all.push_back(p->value());
  return all;
}
const Tensor& parameter(nn::Module& m, const std::string& path) { return nn::find_parameters(m, path)[0]->value(); }

Tensor leaf(const Shape& shape, const std::string& seed) {
  const Tensor x = normal(shape, seed);
  set_requires_grad(x, true);
  return x;
}

// softmax(scale q k^T) v on [B, N, H, D], by matmul and softmax.
Tensor plain_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  const Tensor s = matmul(permute(q, {0, 2, 1, 3}), permute(k, {0, 2, 3, 1})) * scale;
  return permute(matmul(softmax(s, -1), permute(v, {0, 2, 1, 3})), {0, 2, 1, 3});
}
// [B, N, C] x [3 C, C] -> q, k, v
std::vector<Tensor> project(const Tensor& z, const Tensor& w, const Tensor& b) {
  return unbind(reshape(matmul(z, transpose(w, 0, 1)) + b, {z.size(0), z.size(1), 3, kHeads, kDim / kHeads}), 2);
}
Tensor heads_of(const Tensor& tokens, std::int64_t batch) {
  const std::int64_t p = tokens.size(0);
  return expand(reshape(tokens, {1, p, kHeads, kDim / kHeads}), {batch, p, kHeads, kDim / kHeads});
}
Tensor batch_of(const Tensor& tokens, std::int64_t batch) {
  return expand(reshape(tokens, {1, tokens.size(0), tokens.size(1)}), {batch, tokens.size(0), tokens.size(1)});
}
Tensor affine_of(const Tensor& x, const Tensor& w, const Tensor& b) { return matmul(x, transpose(w, 0, 1)) + b; }

std::int64_t trained(const std::string& spec, int classes = 0) {
  vit::Vit model(vit::config("vit_b", 224, 16, classes), {.device = kMeta});
  tuners::apply_spec(model, spec);
  return nn::parameter_count(model, true);
}

std::map<std::string, std::string> base_bytes(nn::Module& m) {
  std::map<std::string, std::string> all;
  for (nn::Parameter* p : m.parameters())
    if (p->kind() == nn::Kind::base) all[p->path()] = bytes_of(p->value());
  return all;
}

}  // namespace

TEST_CASE("parameter counts on ViT-B/16") {
  CHECK(trained("full") == 85'798'656);
  CHECK(trained("**.bias: train") == 102'912);
  CHECK(trained("bitfit", 100) == 102'912 + 76'900);
  CHECK(trained("blocks.*.norm*: train; norm: train") == 38'400);
  CHECK(trained("linear", 100) == 76'900);
  CHECK(trained("head: train", 100) == 76'900);
  for (int r : {1, 4, 8}) {
    CHECK(trained(cat("blocks.*.attn.qkv: lora(rank=", r, ")")) == 36'864 * r);
    CHECK(trained(cat("blocks.*.attn.qkv: lora(rank=", r, ", slices=qkv)")) == 55'296 * r);
    CHECK(trained(cat("blocks.*.attn: lora(rank=", r, ", slices=qv)")) == 36'864 * r);
  }
  CHECK(trained("blocks.*.mlp: u_adapter(dim=16)") == 304'320);
  CHECK(trained("blocks.*: u_adapter(dim=32)") == 599'424);
  const auto twice = [](int h) {
    return trained(cat("blocks.*.attn: u_adapter(dim=", h, "); blocks.*.mlp: u_adapter(dim=", h, ")"));
  };
  CHECK(twice(1) == 55'320);
  CHECK(twice(4) == 165'984);
  CHECK(twice(8) == 313'536);
  CHECK(twice(16) == 608'640);
  CHECK(twice(64) == 2'379'264);
  CHECK(twice(128) == 4'740'096);
  for (int p : {1, 10}) {
    CHECK(trained(cat("blocks.*.attn: u_prompt(length=", p, ")")) == 9'216 * p);
    CHECK(trained(cat("blocks.*.attn: u_prefix(length=", p, ")")) == 18'432 * p);
    CHECK(trained(cat("blocks.*.mlp: u_prefix(length=", p, ")")) == 18'432 * p);
    CHECK(trained(cat("blocks.*: u_prompt(length=", p, ")")) == 9'216 * p + 12);
  }
}

TEST_CASE("a prefix is attention over more keys and values") {
  Net net(small());
  tuners::apply_spec(net, "block.attn: u_prefix(length=5)");
  net.set_trainable(true);
  randomise(net);
  const Tensor z = leaf({2, 7, kDim}, "z");
  const std::string at = "block.attn.core.u_prefix.";
  std::vector<Tensor> leaves{z, parameter(net, at + "k"), parameter(net, at + "v")};
  for (const char* name : {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"})
    leaves.push_back(parameter(net, cat("block.attn.", name)));
  const Result tuned = differentiate([&] { return net.block.attn(z); }, leaves);
  const Result serial = differentiate(
      [&] {
        const auto qkv = project(z, leaves[3], leaves[4]);
        const Tensor k = concat({qkv[1], heads_of(leaves[1], 2)}, 1), v = concat({qkv[2], heads_of(leaves[2], 2)}, 1);
        return affine_of(reshape(plain_attention(qkv[0], k, v, kScale), {2, 7, kDim}), leaves[5], leaves[6]);
      },
      leaves);
  check_same(tuned, serial, 1e-12);
}

TEST_CASE("a prompt is attention over more tokens, for the image's rows") {
  Net net(small());
  tuners::apply_spec(net, "block.attn: u_prompt(length=4)");
  net.set_trainable(true);
  randomise(net);
  const Tensor x = leaf({2, 6, kDim}, "x");
  std::vector<Tensor> leaves{x, parameter(net, "block.attn.core.u_prompt.tokens")};
  for (const char* name :
       {"norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"})
    leaves.push_back(parameter(net, cat("block.", name)));
  const Result tuned = differentiate([&] { return net.block.attn.call(x, net.block.norm1(x)); }, leaves);
  const Result serial = differentiate(
      [&] {
        const Tensor z = layer_norm(concat({x, batch_of(leaves[1], 2)}, 1), leaves[2], leaves[3], 1e-6);
        const auto qkv = project(z, leaves[4], leaves[5]);
        const Tensor o = plain_attention(qkv[0], qkv[1], qkv[2], kScale);
        return affine_of(reshape(slice(o, 1, 0, 6), {2, 6, kDim}), leaves[6], leaves[7]);
      },
      leaves);
  check_same(tuned, serial, 1e-12);
}

TEST_CASE("prompt with qk-norm; prefix and prompt in either order") {
  vit::VitConfig c = small();
  c.qk_norm = true;
  const Tensor x = leaf({2, 6, kDim}, "x");
  const auto run = [&](const std::string& spec) {
    Net net(c);
    tuners::apply_spec(net, spec);
    net.set_trainable(true);
    randomise(net);
    std::vector<Tensor> leaves{x};
    for (const char* name :
         {"core.u_prefix.k", "core.u_prefix.v", "core.u_prompt.tokens", "qkv.weight", "k_norm.weight"})
      leaves.push_back(parameter(net, cat("block.attn.", name)));
    return differentiate([&] { return net(x); }, leaves);
  };
  const Result a = run("block.attn: u_prefix(length=3); block.attn: u_prompt(length=2)");
  const Result b = run("block.attn: u_prompt(length=2); block.attn: u_prefix(length=3)");
  check_same(a, b, 1e-12);

  Net net(c);
  tuners::apply_spec(net, "block.attn: u_prompt(length=4)");
  net.set_trainable(true);
  randomise(net);
  const auto p = [&](const char* name) { return parameter(net, cat("block.", name)); };
  const std::vector<Tensor> leaves{x, p("attn.core.u_prompt.tokens"), p("attn.k_norm.weight"), p("attn.q_norm.bias"),
                                   p("attn.qkv.weight")};
  const Result tuned = differentiate([&] { return net.block.attn.call(x, net.block.norm1(x)); }, leaves);
  const Result serial = differentiate(
      [&] {
        const Tensor z = layer_norm(concat({x, batch_of(leaves[1], 2)}, 1), p("norm1.weight"), p("norm1.bias"), 1e-6);
        const auto qkv = project(z, leaves[4], p("attn.qkv.bias"));
        const Tensor q = layer_norm(qkv[0], p("attn.q_norm.weight"), leaves[3], 1e-6);
        const Tensor k = layer_norm(qkv[1], leaves[2], p("attn.k_norm.bias"), 1e-6);
        const Tensor o = plain_attention(q, k, qkv[2], kScale);
        return affine_of(reshape(slice(o, 1, 0, 6), {2, 6, kDim}), p("attn.proj.weight"), p("attn.proj.bias"));
      },
      leaves);
  check_same(tuned, serial, 1e-12);
}

TEST_CASE("adapters: behind, on the input, on the stream") {
  for (const char* on : {"y", "z", "x"}) {
    Net net(small());
    tuners::apply_spec(net, cat("block.mlp: u_adapter(dim=6, scale=0.7, on=", on, ")"));
    net.set_trainable(true);
    randomise(net);
    const Tensor x = leaf({2, 5, kDim}, "x");
    std::vector<Tensor> leaves{x};
    for (const char* name : {"down.weight", "down.bias", "up.weight", "up.bias"})
      leaves.push_back(parameter(net, cat("block.mlp.u_adapter.", name)));
    const Result tuned = differentiate([&] { return net.block.mlp.call(x, net.block.norm2(x)); }, leaves);
    const Result serial = differentiate(
        [&] {
          const Tensor z = net.block.norm2(x), y = net.block.mlp.forward(z);
          const Tensor& t = *on == 'y' ? y : *on == 'z' ? z : x;
          return y + affine_of(gelu(affine_of(t, leaves[1], leaves[2])), leaves[3], leaves[4]) * 0.7;
        },
        leaves);
    check_same(tuned, serial, 1e-12);
  }
  // At a Linear of unequal widths, reading its input.
  Net net(small());
  tuners::apply_spec(net, "block.mlp.fc1: u_adapter(dim=6, on=z, act=relu)");
  randomise(net);
  const Tensor z = normal({2, 5, kDim}, "z");
  const auto p = [&](const char* name) { return parameter(net, cat("block.mlp.fc1.u_adapter.", name)); };
  const Tensor want = net.block.mlp.fc1.forward(z) +
                      affine_of(relu(affine_of(z, p("down.weight"), p("down.bias"))), p("up.weight"), p("up.bias"));
  CHECK(close(net.block.mlp.fc1(z), want, 1e-12));
}

TEST_CASE("prefix and prompt beside an OP without softmax") {
  for (const std::string at : {"block", "block.mlp"}) {
    for (const std::string form : {"u_prefix", "u_prompt"}) {
      Net net(small());
      tuners::apply_spec(net, cat(at, ": ", form, "(length=3)"));
      net.set_trainable(true);
      randomise(net);
      const Tensor x = leaf({2, 5, kDim}, "x");
      std::vector<Tensor> leaves{x};
      for (const char* name : {"k", "v", "tokens", "scale"})
        for (nn::Parameter* p : net.parameters())
          if (p->path() == cat(at, ".", form, ".", name)) leaves.push_back(p->value());
      REQUIRE(leaves.size() == 3);
      const bool whole = at == "block";
      const Result tuned = differentiate([&] { return whole ? net.block(x) : net.block.mlp(x); }, leaves);
      const Result hand = differentiate(
          [&] {
            const Tensor y = whole ? net.block.forward(x) : net.block.mlp.forward(x);
            const Tensor k = heads_of(leaves[1], 2), v = form == "u_prefix" ? heads_of(leaves[2], 2) : k;
            const Tensor t =
                reshape(plain_attention(reshape(x, {2, 5, kHeads, kDim / kHeads}), k, v, kScale), {2, 5, kDim});
            return y + (form == "u_prefix" ? t : t * leaves[2]);
          },
          leaves);
      check_same(tuned, hand, 1e-12);
    }
  }
}

TEST_CASE("identity at the start, where promised") {
  const Tensor image = normal({2, 8, 8, 3}, "image");
  const auto output = [&](const std::string& spec) {
    vit::Vit model(small(), {.dtype = f64});
    if (!spec.empty()) tuners::apply_spec(model, spec);
    const NoGrad off;
    return to_vector<double>(model(image));
  };
  const auto bare = output("");
  for (const char* spec :
       {"blocks.*.mlp: u_adapter(dim=8)", "blocks.*.attn: u_adapter(on=x)", "blocks.*: u_adapter(on=z)",
        "blocks.*.attn: lora(slices=qv)", "blocks.*.attn.proj: lora()", "blocks.*.mlp: u_prefix()",
        "blocks.*: u_prefix()", "blocks.*.mlp: u_prompt()", "blocks.*: u_prompt()"})
    CHECK_MESSAGE(output(spec) == bare, std::string(spec));
  for (const char* spec :
       {"blocks.*.attn: u_prefix()", "blocks.*.attn: u_prompt()", "blocks.*.mlp: u_adapter(init=xavier)"})
    CHECK_MESSAGE(output(spec) != bare, std::string(spec));
}

TEST_CASE("LoRA folds into its Linear and out again") {
  const Tensor image = normal({2, 8, 8, 3}, "image");
  for (const char* spec :
       {"blocks.*.attn.qkv: lora(rank=3, alpha=7)", "blocks.*.attn: lora(rank=2, slices=qv, alpha=3, rslora=true)",
        "blocks.*.attn: lora(rank=2, slices=k); blocks.*.mlp.fc*: lora(rank=1)"}) {
    vit::Vit model(small(), {.dtype = f64});
    tuners::apply_spec(model, spec);
    randomise(model);
    const NoGrad off;
    const auto before = base_bytes(model);
    const Tensor tapped = model(image);
    tuners::merge_tuners(model);
    CHECK(base_bytes(model) != before);
    CHECK(close(model(image), tapped, 1e-12));
    for (tuners::Tuner* t : tuners::tuners_of(model)) {
      CHECK(t->merged());
      CHECK_THROWS_AS(t->merge(), Error);
    }
    tuners::unmerge_tuners(model);
    CHECK(base_bytes(model) == before);
    CHECK(same_bits(model(image), tapped));
    tuners::merge_tuners(model);
    tuners::detach_tuners(model);
    CHECK(base_bytes(model) == before);
    CHECK(tuners::tuners_of(model).empty());
    CHECK(nn::parameter_count(model) == nn::parameter_count(*std::make_unique<vit::Vit>(small())));
  }
  // A tuner that goes while merged, alone or with its model, gives the bits back to whoever still holds the weight.
  auto model = std::make_unique<vit::Vit>(small());
  tuners::apply_spec(*model, "blocks.*.attn: lora(slices=qv)");
  randomise(*model);
  const Tensor weight = model->blocks[0].attn.qkv.weight.value();
  const std::string bytes = bytes_of(weight);
  tuners::merge_tuners(*model);
  CHECK(bytes_of(weight) != bytes);
  model->blocks[0].attn.qkv.detach("lora");
  CHECK(bytes_of(weight) == bytes);
  const Tensor other = model->blocks[1].attn.qkv.weight.value();
  tuners::unmerge_tuners(*model);
  const std::string other_bytes = bytes_of(other);
  tuners::merge_tuners(*model);
  model.reset();
  CHECK(bytes_of(other) == other_bytes);

  vit::Vit fixed(small());
  tuners::apply_spec(fixed, "blocks.*.mlp: u_adapter()");
  CHECK_THROWS_AS(tuners::merge_tuners(fixed), Error);
  CHECK_THROWS_AS(fixed.blocks[0].mlp.detach("lora"), Error);
}

TEST_CASE("LoRA's dropout acts in training alone") {
  Net net(small());
  tuners::apply_spec(net, "block.attn.proj: lora(dropout=0.5)");
  randomise(net);
  const Tensor x = normal({2, 5, kDim}, "x");
  CHECK(same_bits(net(x), net(x)));
  net.train();
  CHECK(!same_bits(net(x), net(x)));
}

TEST_CASE("a tuner attached changes no other initial value") {
  vit::Vit a(small()), b(small());
  tuners::apply_spec(b, "blocks.*.attn: u_prefix(); blocks.*.mlp: u_adapter()");
  CHECK(base_bytes(a) == base_bytes(b));
}

TEST_CASE("only the tuner's parameters learn, and the frozen rest keeps no inputs") {
  const Tensor image = normal({2, 8, 8, 3}, "image");
  const Tensor labels = from_vector<std::int64_t>({1, 3}, {2});
  for (const std::string spec :
       {"blocks.*.attn: u_prefix()", "blocks.*.attn: u_prompt()", "blocks.*.mlp: u_adapter()", "blocks.*: u_prefix()",
        "blocks.*.mlp: u_prompt()", "blocks.*.attn: lora(slices=qv)", "linear", "bitfit"}) {
    vit::Vit model(small(), {.dtype = f64});
    tuners::apply_spec(model, spec);
    randomise(model);
    backward(cross_entropy(model(image), labels));
    for (nn::Parameter* p : model.parameters()) {
      const bool ours = spec == "linear"   ? p->kind() == nn::Kind::head
                        : spec == "bitfit" ? p->name() == "bias" || p->kind() == nn::Kind::head
                                           : p->kind() == nn::Kind::tuner;
      CHECK_MESSAGE(p->trainable() == ours, spec << " " << p->path());
      CHECK_MESSAGE(grad_of(p->value()).defined() == ours, spec << " " << p->path());
    }
  }
  const auto rows = [&](vit::Vit& model) {
    std::vector<Tensor> weights;
    for (nn::Parameter* p : model.parameters()) weights.push_back(p->value());
    const SavedBytes saved(weights);
    const Tensor loss = cross_entropy(model(image), labels);
    std::map<std::string, std::int64_t> bytes;  // "module op"
    for (const auto& row : saved.rows())
      if (row.bytes) bytes[cat(row.module, " ", row.op)] += row.bytes;
    return bytes;
  };
  {
    vit::Vit model(small(), {.dtype = f64});
    tuners::apply_spec(model, "linear");
    for (const auto& [where, bytes] : rows(model))
      CHECK_MESSAGE((where.starts_with("head ") || where.starts_with(" ")), where);
  }
  {
    vit::Vit model(small(), {.dtype = f64});
    tuners::apply_spec(model, "blocks.1.mlp: u_adapter(dim=8)");
    for (const auto& [where, bytes] : rows(model)) CHECK_MESSAGE(!where.starts_with("blocks.0"), where);
  }
  {
    vit::Vit model(small(), {.dtype = f64});
    tuners::apply_spec(model, "blocks.0.attn: u_prefix()");
    const auto all = rows(model);
    for (const auto& [where, bytes] : all)
      for (const char* frozen : {"qkv linear", "proj linear", "fc2 linear", "patch_embed"})
        CHECK_MESSAGE(where.find(frozen) == std::string::npos, where);
    // fc1 keeps its pre-activation alone: 2 images x 5 tokens x 48 channels of 8 bytes.
    REQUIRE(all.count("blocks.1.mlp.fc1 gelu"));
    CHECK(all.at("blocks.1.mlp.fc1 gelu") == 2 * 5 * 48 * 8);
  }
}

TEST_CASE("one block under prefix, prompt, AdaptFormer and LoRA at once") {
  Net net(small());
  tuners::apply_spec(
      net,
      "block.attn: u_prefix(length=3); block.attn: u_prompt(length=2); block.mlp: u_adapter(dim=5, scale=0.4, on=x);"
      "block.attn: lora(rank=2, alpha=3, slices=qv)");
  net.set_trainable(true);
  randomise(net);
  const std::int64_t batch = 2, n = 7;
  const Tensor x = leaf({batch, n, kDim}, "x");
  std::vector<Tensor> leaves = values_of(net);
  leaves.push_back(x);
  const auto p = [&](const std::string& name) { return parameter(net, "block." + name); };
  const Result tuned = differentiate([&] { return net(x); }, leaves);
  const Result serial = differentiate(
      [&] {
        const auto low_rank = [&](const std::string& part) {
          return matmul(p("attn.qkv.lora." + part + ".b"), p("attn.qkv.lora." + part + ".a")) * 1.5;
        };
        const Tensor w = p("attn.qkv.weight") + concat({low_rank("q"), zeros({kDim, kDim}, f64), low_rank("v")}, 0);
        const Tensor z = layer_norm(concat({x, batch_of(p("attn.core.u_prompt.tokens"), batch)}, 1), p("norm1.weight"),
                                    p("norm1.bias"), 1e-6);
        const auto qkv = project(z, w, p("attn.qkv.bias"));
        const Tensor k = concat({qkv[1], heads_of(p("attn.core.u_prefix.k"), batch)}, 1);
        const Tensor v = concat({qkv[2], heads_of(p("attn.core.u_prefix.v"), batch)}, 1);
        const Tensor o = plain_attention(slice(qkv[0], 1, 0, n), k, v, kScale);
        const Tensor h = x + affine_of(reshape(o, {batch, n, kDim}), p("attn.proj.weight"), p("attn.proj.bias"));
        const Tensor m = layer_norm(h, p("norm2.weight"), p("norm2.bias"), 1e-6);
        const Tensor f = affine_of(gelu(affine_of(m, p("mlp.fc1.weight"), p("mlp.fc1.bias"))), p("mlp.fc2.weight"),
                                   p("mlp.fc2.bias"));
        const Tensor adapter =
            affine_of(gelu(affine_of(h, p("mlp.u_adapter.down.weight"), p("mlp.u_adapter.down.bias"))),
                      p("mlp.u_adapter.up.weight"), p("mlp.u_adapter.up.bias"));
        return h + f + adapter * 0.4;
      },
      leaves);
  check_same(tuned, serial, 1e-12);

  SUBCASE("checkpointed gradients have the same bits") {
    const auto checkpointed = [&](const Tensor& in, const std::vector<Tensor>& inside) {
      return checkpoint([&net](const std::vector<Tensor>& t) { return std::vector<Tensor>{net(t[0])}; }, {in},
                        inside)[0];
    };
    std::vector<Tensor> inside = values_of(net);
    check_bits(tuned, differentiate([&] { return checkpointed(x, inside); }, leaves));
    // The frozen block below frozen tokens: the tuners are the only edges.
    for (nn::Parameter* q : net.parameters()) q->set_trainable(q->kind() == nn::Kind::tuner);
    const Tensor frozen = x.detach();
    inside = values_of(net);
    check_bits(differentiate([&] { return net(frozen); }, inside),
               differentiate([&] { return checkpointed(frozen, inside); }, inside));
  }
  SUBCASE("taps fire on every module") {
    struct Count : nn::Tap {
      Tensor apply(const nn::Site& s) override { return ++sites, s.y; }
      AttentionOut apply(const nn::CoreSite& s) override { return ++cores, s.out; }
      int sites = 0, cores = 0;
    };
    std::vector<nn::Module*> modules;
    for (nn::Module* m : net.modules())
      if (m->runs_taps()) modules.push_back(m);
    std::vector<Count> counts(modules.size());
    for (std::size_t i = 0; i < modules.size(); ++i) modules[i]->attach_observer(&counts[i]);
    CHECK(close(net(x), tuned.y, 1e-13));
    for (std::size_t i = 0; i < modules.size(); ++i) {
      CHECK_MESSAGE(counts[i].sites + counts[i].cores > 0, modules[i]->path());
      CHECK_MESSAGE((counts[i].cores > 0) == modules[i]->path().ends_with("core"), modules[i]->path());
      modules[i]->detach_observers();
    }
    CHECK(same_bits(net(x), tuned.y));
  }
}
