// ViT's variants against timm, configurations, files, training: what does not need the golden files.
#include <doctest/doctest.h>

#include <capo/engine/threads.h>
#include <capo/models/train/checkpoint.h>
#include <capo/models/train/optim.h>
#include <capo/models/vit/load.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/cross_entropy.h>
#include <capo/ops/reduce.h>
#include <capo/ops/view.h>
#include <capo/tests/golden_rule.h>
#include <capo/tests/op_test.h>
#include <capo/tests/temp_folder.h>
#include <capo/tuners/spec.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

using namespace capo;
using namespace capo::testing;
using test::close;
using test::normal;
using test::same_bits;

namespace {

vit::VitConfig small() {
  vit::VitConfig c;
  c.image = 32;
  c.patch = 8;
  c.dim = 64;
  c.depth = 2;
  c.heads = 2;
  c.mlp_ratio = 2;
  c.classes = 3;
  return c;
}

struct Variant {
  std::string name;
  vit::VitConfig config;
  std::size_t parameters;            // tensors
  std::vector<double>
      logits;  // timm 1.0.31, f64, on the rule's weights and images (features: the first three channels)
};

const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = [] {
    std::vector<Variant> v{
        {"plain",
         small(),
         32,
         {-0.6813234264223946, 0.5803541959739457, -0.06623065698396108, -0.6300134140386004, 0.594117423108885,
          0.022063570216286604}},
        {"mean",
         small(),
         32,
         {-0.6368857507146585, 0.05968961946537779, 0.16264098311742609, -0.6994617636122028, 0.37247026215827206,
          0.14475534895592237}},
        {"registers",
         small(),
         33,
         {-0.770726812183986, 0.6840959386078708, 0.009408565176653505, -0.7607903755184423, 0.6874472281521408,
          0.029648550325096112}},
        {"dinov2",
         small(),
         37,
         {-0.5961664034774165, 0.993522031021982, 0.32409680169779653, -0.5530974564946338, 1.0351052533722718,
          0.3659068803418117}},
        {"no_class",
         small(),
         31,
         {-0.6099036179593007, -0.17016666349750525, 0.046365640518923334, -0.5496125519462043, 0.2763056622443065,
          0.18337781621901766}},
        {"qk_norm",
         small(),
         40,
         {-0.7177554001181873, 0.553435666624578, -0.0583283720906603, -0.5312698518891884, 0.7065881285631052,
          0.24671247219187056}},
        {"layer_scale",
         small(),
         36,
         {-0.48552019750758446, 0.5130969494497892, -0.34815636315814064, -0.49677469606105307, 0.5209497591380315,
          -0.26037990647397374}},
        {"no_bias",
         small(),
         30,
         {-0.6586501789618042, 0.6746723147353614, -0.07074581141338676, -0.6094470922648215, 0.6916009692352781,
          0.03465214320995608}},
        {"mean_registers",
         small(),
         33,
         {-0.8027386920864895, 0.0027878407148763384, 0.10093521496633967, -0.7472705526265676, 0.7312290462312508,
          0.2166122937923287}},
        {"distilled",
         small(),
         35,
         {0.2484607096445577, -0.0632148638888565, -0.0456008640059088, 0.20577877390012023, 0.0019783949997786987,
          0.06387048989896095}},
        {"features",
         small(),
         30,
         {-1.881425883354295, 0.2830357515600986, 0.8729997504641187, -1.8592037093125602, 0.07671333154046417,
          0.8401630110200464}},
    };
    v[1].config.pool = vit::Pool::mean;
    v[2].config.registers = 3;
    v[3].config.registers = 4;
    v[3].config.no_embed_class = true;
    v[3].config.layer_scale = 1e-5;
    v[4].config.class_token = false;
    v[4].config.pool = vit::Pool::mean;
    v[5].config.qk_norm = true;
    v[6].config.layer_scale = 0.1;
    v[7].config.qkv_bias = false;
    v[8].config.registers = 2;
    v[8].config.pool = vit::Pool::mean;
    v[9].config.distilled = true;
    v[10].config.classes = 0;
    return v;
  }();
  return all;
}

// NHWC, f64.
Tensor images() { return contiguous(permute(golden::make("input", {2, 3, 32, 32}), {0, 2, 3, 1})); }
Tensor labels(std::int64_t n = 2) {
  std::vector<std::int64_t> v;
  for (std::int64_t i = 0; i < n; ++i) v.push_back((i * 2 + 1) % 3);
  return from_vector(v, {n});
}

std::string bytes_of(nn::Module& m) {
  std::string all;
  for (nn::Parameter* p : m.parameters()) all.append(static_cast<const char*>(p->value().data()), p->value().nbytes());
  return all;
}

std::vector<vit::NamedShape> names_of(nn::Module& m) {
  std::vector<vit::NamedShape> names;
  for (const auto& t : nn::state_dict(m)) names.push_back({t.name, t.value.shape()});
  return names;
}

}  // namespace

TEST_CASE("variants agree with timm, learn everywhere, and tell their configuration") {
  for (const Variant& v : variants()) {
    CAPTURE(v.name);
    vit::Vit model(v.config, {.dtype = f64});
    golden::fill(model);
    CHECK(model.parameters().size() == v.parameters);
    Tensor y = model(images());
    const Tensor cotangent = normal(y.shape(), "cotangent");
    backward(y, cotangent);
    for (nn::Parameter* p : model.parameters()) {
      CHECK_MESSAGE(grad_of(p->value()).defined(), p->path());
      clear_grad(p->value());
    }
    const NoGrad off;
    if (!v.config.classes) y = slice(y, 1, 0, 3);
    CHECK(close(y, test::values(v.logits, {2, 3}), 1e-12));

    vit::VitConfig found = vit::config_from_names(names_of(model), 2);
    CHECK((found.layer_scale > 0) == (v.config.layer_scale > 0));
    found.layer_scale = v.config.layer_scale;  // the names do not say how large
    CHECK(vit::to_json(found) == vit::to_json(v.config));
    CHECK(vit::to_json(vit::config_from_json(vit::to_json(v.config), "test")) == vit::to_json(v.config));
  }
}

TEST_CASE("checkpointing: the same bits, with dropout and drop-path") {
  for (const Variant& v : variants()) {
    CAPTURE(v.name);
    const auto run = [&](double checkpointed) {
      vit::VitConfig c = v.config;
      c.drop = 0.1;
      c.drop_path = 0.3;
      c.patch_drop = 0.4;
      c.checkpoint = checkpointed;
      vit::Vit model(c, {.seed = 5});
      golden::fill(model);
      model.train();
      const Tensor x = cast(images(), f32);
      set_requires_grad(x, true);
      std::string all;
      for (int step = 0; step < 2; ++step) {
        const Tensor y = model(x);
        backward(y, cast(normal(y.shape(), "cotangent"), f32));
        const auto add = [&](const Tensor& t) { all.append(static_cast<const char*>(t.data()), t.nbytes()); };
        add(y);
        add(grad_of(x));
        for (nn::Parameter* p : model.parameters()) add(contiguous(grad_of(p->value())));
      }
      return all;
    };
    const std::string plain = run(0);
    CHECK(plain == run(1));
    CHECK(plain == run(0.5));
  }
}

TEST_CASE("patch dropout: eval is untouched, training keeps some patches of each sample and every prefix token") {
  struct Input : nn::Tap {  // of the first block
    Tensor apply(const nn::Site& s) override { return seen = s.z.detach(), s.y; }
    Tensor seen;
  };
  const std::int64_t patches = 16, batch = 6;
  const Tensor x = cast(normal({batch, 32, 32, 3}, "batch"), f32);
  for (const Variant& v : variants())
    for (double rate : {0.5, 0.3, 0.99}) {
      CAPTURE(v.name);
      CAPTURE(rate);
      vit::VitConfig c = v.config;
      vit::Vit whole(c, {.seed = 5});
      c.patch_drop = rate;
      vit::Vit model(c, {.seed = 5});
      CHECK(bytes_of(model) == bytes_of(whole));
      CHECK(vit::to_json(c) == vit::to_json(v.config));  // as drop_path: training's alone
      Input before, after;
      whole.blocks[0].attach_observer(&before);
      model.blocks[0].attach_observer(&after);
      {
        const NoGrad off;
        CHECK(same_bits(model(x), whole(x)));
        CHECK(model.patch_drop->rng.offset() == 0);
      }
      whole.train();
      model.train();
      const std::int64_t prefix = c.prefix_tokens(), kept = std::max(1, static_cast<int>(16 * (1 - rate)));
      const Tensor image = clone(x);
      set_requires_grad(image, true);
      Tensor tokens = model.tokens(image);
      CHECK(tokens.shape() == Shape{batch, prefix + kept, c.dim});
      backward(tokens, cast(normal(tokens.shape(), "cotangent"), f32));
      const Tensor slope = grad_of(image);
      {
        const NoGrad off;
        whole(x);
      }
      std::vector<std::string> sets;
      for (std::int64_t b = 0; b < batch; ++b) {
        const Tensor full = select(before.seen, 0, b), some = select(after.seen, 0, b);
        CHECK(same_bits(contiguous(slice(some, 0, 0, prefix)), contiguous(slice(full, 0, 0, prefix))));
        std::string set(patches, '.');
        std::int64_t next = 0;  // kept rows are the whole model's, in its order
        for (std::int64_t i = 0; i < patches && next < kept; ++i)
          if (same_bits(select(some, 0, prefix + next), select(full, 0, prefix + i))) set[i] = 'x', ++next;
        CHECK(next == kept);
        std::string moved(patches, '.');  // patches whose pixels have a gradient
        for (std::int64_t i = 0; i < patches; ++i) {
          const Tensor image_b = select(slope, 0, b);
          const std::int64_t top = i / 4 * 8, left = i % 4 * 8;
          for (double g : to_vector<double>(cast(slice(slice(image_b, 0, top, top + 8), 1, left, left + 8), f64)))
            if (g != 0) moved[i] = 'x';
        }
        CHECK(moved == set);
        sets.push_back(set);
      }
      std::sort(sets.begin(), sets.end());
      CHECK(std::unique(sets.begin(), sets.end()) - sets.begin() >= 4);
    }
  const auto built = [](double rate) {
    return error_of([&] {
      vit::VitConfig c = small();
      c.patch_drop = rate;
      vit::Vit model(c, {.device = kMeta});
    });
  };
  CHECK(built(1) == "patch_drop: p must be in [0, 1), got 1");
  CHECK(contains(built(-0.1), "patch_drop: p must be in [0, 1)"));
}

TEST_CASE("patch dropout: every patch is kept equally often, drawn anew each time, and resumed by its stream") {
  vit::VitConfig c = small();
  c.patch_drop = 0.75;
  vit::Vit model(c, {.seed = 5}), twin(c, {.seed = 5}), other(c, {.seed = 6});
  for (vit::Vit* m : {&model, &twin, &other}) m->train();
  std::vector<double> ids;  // token i of every sample is i
  for (int b = 0; b < 500; ++b)
    for (int i = 0; i < 17; ++i) ids.push_back(i);
  const Tensor tokens = test::values(ids, {500, 17, 1});
  const auto draw = [&](vit::Vit& m) { return to_vector<double>((*m.patch_drop)(tokens)); };
  const std::vector<double> first = draw(model), second = draw(model);
  CHECK(first != second);
  CHECK(draw(twin) == first);
  CHECK(draw(other) != first);
  std::vector<std::string> streams;
  for (const auto& [path, rng] : train::generators(model))
    if (rng == &model.patch_drop->rng) streams.push_back(path);
  CHECK(streams == std::vector<std::string>{"patch_drop"});
  CHECK(train::generators(model).size() == train::generators(*std::make_unique<vit::Vit>(small())).size() + 1);
  twin.patch_drop->rng.set_offset(model.patch_drop->rng.offset());
  CHECK(draw(twin) == draw(model));
  std::vector<int> counts(17, 0);
  for (std::size_t k = 0; k < first.size(); k += 5) {
    CHECK(first[k] == 0);
    for (std::size_t i = k; i < k + 5; ++i) ++counts[static_cast<std::size_t>(first[i])];
    for (std::size_t i = k; i < k + 4; ++i) CHECK(first[i] < first[i + 1]);
  }
  CHECK(counts[0] == 500);
  for (int i = 1; i < 17; ++i) CHECK(std::abs(counts[i] - 125) < 50);  // 5 standard deviations
  // On the meta device shapes alone; an empty batch; too few tokens.
  vit::Vit meta(c, {.device = kMeta});
  meta.train();
  CHECK(meta.tokens(zeros({3, 32, 32, 3}, f32, kMeta)).shape() == Shape{3, 5, 64});
  CHECK((*model.patch_drop)(zeros({0, 17, 64})).shape() == Shape{0, 5, 64});
  CHECK(contains(error_of([&] { (*model.patch_drop)(zeros({2, 1, 64})); }), "with more than 1 tokens, got [2, 1, 64]"));
}

TEST_CASE("bf16 with an f32 stream is closer to f64 than with a bf16 stream, and carries tuners") {
  vit::VitConfig c = small();
  c.depth = 8;
  c.layer_scale = 0.3;
  const auto made = [&](DType dtype, bool wide) {
    c.f32_stream = wide;
    auto m = std::make_unique<vit::Vit>(c, nn::Build{.seed = 3, .dtype = dtype});
    for (nn::Parameter* p : m->parameters())  // the rule's weights as bf16 has them
      p->set(cast(cast(golden::make(p->path(), p->value().shape()), bf16), dtype));
    return m;
  };
  const auto error = [](const Tensor& a, const Tensor& exact) {
    const Tensor d = cast(a.detach(), f64) - exact.detach();
    return std::sqrt(sum(d * d).item() / sum(exact.detach() * exact.detach()).item());
  };
  const auto exact = made(f64, false), narrow = made(bf16, false), wide = made(bf16, true);
  const Tensor image = cast(cast(images(), bf16), f64);
  std::vector<Tensor> y, g;
  for (vit::Vit* m : {exact.get(), narrow.get(), wide.get()}) {
    const Tensor tokens = m->tokens(cast(image, m->build().dtype));
    CHECK(tokens.dtype() == m->build().dtype);
    y.push_back(tokens);
    backward(tokens, cast(normal(tokens.shape(), "dy"), tokens.dtype()));
    g.push_back(grad_of(m->pos_embed));
  }
  CHECK(error(y[2], y[0]) < 0.6 * error(y[1], y[0]));  // measured: 0.0030 and 0.0074
  CHECK(error(g[2], g[0]) < 0.6 * error(g[1], g[0]));  // 0.0035 and 0.0079
  tuners::apply_spec(
      *wide,
      "blocks.*: u_adapter(dim=4); blocks.*.mlp: u_adapter(dim=4, on=x); blocks.0: u_prefix(length=2);"
      "blocks.1: u_prompt(length=2); blocks.*.attn: u_prefix(length=2); blocks.*.attn: lora(slices=qv); head: train");
  backward(cross_entropy(cast((*wide)(cast(image, bf16)), f32), labels()));
  for (nn::Parameter* p : wide->parameters())
    if (p->trainable()) CHECK_MESSAGE(grad_of(*p).defined(), p->path());
}

TEST_CASE("checkpointing keeps less") {
  const auto kept = [](double checkpointed) {
    vit::VitConfig c = small();
    c.checkpoint = checkpointed;
    vit::Vit model(c);
    std::vector<Tensor> weights;
    for (nn::Parameter* p : model.parameters()) weights.push_back(p->value());
    const SavedBytes saved(weights);
    const Tensor y = model(cast(images(), f32));
    return saved.total();
  };
  CHECK(kept(1) * 3 < kept(0));
  const std::int64_t depth = small().depth;
  REQUIRE(depth == 2);
  CHECK(kept(0.24) == kept(0));  // no block
  CHECK(kept(0.25) == kept(0.5));
  CHECK(std::llabs(kept(0.5) * 2 - kept(0) - kept(1)) * 10 < kept(0));
  for (const double share : {-0.1, 1.1, std::nan("")})
    CHECK(contains(error_of([&] { kept(share); }), "vit: checkpoint is a share of the blocks, 0 to 1"));
}

TEST_CASE("taps fire on every module of every variant, fused or not") {
  struct Count : nn::Tap {
    Tensor apply(const nn::Site& s) override { return ++calls, s.y; }
    AttentionOut apply(const nn::CoreSite& s) override { return ++calls, s.out; }
    int calls = 0;
  };
  for (const Variant& v : variants()) {
    vit::Vit model(v.config, {.dtype = f64});
    golden::fill(model);
    const NoGrad off;
    const Tensor bare = model(images());
    std::vector<nn::Module*> modules;
    for (nn::Module* m : model.modules())
      if (m->runs_taps()) modules.push_back(m);
    CHECK(modules.size() > 25);
    for (bool together : {true, false}) {
      std::vector<Count> counts(modules.size());
      if (together) {
        for (std::size_t i = 0; i < modules.size(); ++i) modules[i]->attach_observer(&counts[i]);
        CHECK(close(model(images()), bare, 1e-13));
      }
      for (std::size_t i = 0; i < modules.size(); ++i) {
        if (!together) {
          modules[i]->attach_observer(&counts[i]);
          model(images());
        }
        CHECK_MESSAGE(counts[i].calls > 0, v.name << " " << modules[i]->path());
        modules[i]->detach_observers();
      }
    }
    CHECK(same_bits(model(images()), bare));
    CHECK(contains(error_of([&] { Count c; model.blocks.attach_observer(&c); }), "only a container"));
  }
}

TEST_CASE("a residual sum fused with the norm after it or not: the same bits from the same bytes kept") {
  struct Look : nn::Tap {} look;  // a norm that carries a tap is not fused
  for (const Variant& v : variants())
    for (const DType t : {f32, f64}) {
      CAPTURE(v.name);
      const auto run = [&](bool fused) {
        vit::VitConfig c = v.config;
        c.drop_path = 0.3;
        vit::Vit model(c, {.seed = 5, .dtype = t});
        golden::fill(model);
        model.train();
        if (!fused)
          for (auto& block : model.blocks)
            for (nn::LayerNorm* norm : {&block->norm1, &block->norm2}) norm->attach_observer(&look);
        const Tensor x = cast(images(), t);
        set_requires_grad(x, true);
        const SavedBytes saved;
        const Tensor y = model(x);
        int seen = 0;
        for (const auto& row : saved.rows()) seen += row.op == "add_layer_norm";
        CHECK(seen == (fused ? 2 * c.depth - 1 : 0));  // every norm of a block but the first
        backward(y, cast(normal(y.shape(), "cotangent"), t));
        std::string all = std::to_string(saved.total());
        const auto add = [&](const Tensor& g) { all.append(static_cast<const char*>(g.data()), g.nbytes()); };
        add(y);
        add(grad_of(x));
        for (nn::Parameter* p : model.parameters()) add(contiguous(grad_of(p->value())));
        return all;
      };
      CHECK(run(true) == run(false));
    }
}

TEST_CASE("the published sizes") {
  const auto count = [](const char* size, int image, int patch, int classes) {
    vit::Vit model(vit::config(size, image, patch, classes), {.device = kMeta});
    return nn::parameter_count(model);
  };
  CHECK(count("vit_ti", 224, 16, 1000) == 5'717'416);
  CHECK(count("vit_s", 224, 16, 1000) == 22'050'664);
  CHECK(count("vit_b", 224, 16, 1000) == 86'567'656);
  CHECK(count("vit_l", 224, 16, 1000) == 304'326'632);
  CHECK(count("vit_h", 224, 14, 1000) == 632'045'800);
  CHECK(count("vit_b", 384, 32, 0) == 87'455'232 + 768 * (145 - 50));
}

TEST_CASE("vit_ti's names and shapes are timm's") {
  vit::Vit model(vit::config("vit_ti", 224, 16, 1000), {.device = kMeta});
  std::string text;
  for (nn::Parameter* p : model.parameters()) text += cat(p->path(), " ", p->value().shape(), "\n");
  for (const char* line :
       {"cls_token [1, 1, 192]\n", "pos_embed [1, 197, 192]\n", "patch_embed.proj.weight [192, 16, 16, 3]\n",
        "patch_embed.proj.bias [192]\n", "norm.weight [192]\n", "head.weight [1000, 192]\n", "head.bias [1000]\n"})
    CHECK_MESSAGE(contains(text, line), std::string(line));
  for (int i = 0; i < 12; ++i)
    for (const char* line :
         {"norm1.weight [192]", "norm1.bias [192]", "attn.qkv.weight [576, 192]", "attn.qkv.bias [576]",
          "attn.proj.weight [192, 192]", "attn.proj.bias [192]", "norm2.weight [192]", "norm2.bias [192]",
          "mlp.fc1.weight [768, 192]", "mlp.fc1.bias [768]", "mlp.fc2.weight [192, 768]", "mlp.fc2.bias [192]"})
      CHECK_MESSAGE(contains(text, cat("blocks.", i, ".", line, "\n")), std::string(line));
  CHECK(model.parameters().size() == 8 + 12 * 12);
}

TEST_CASE("bad configurations and inputs") {
  const auto build = [](auto change) {
    return error_of([&] {
      vit::VitConfig c = small();
      change(c);
      vit::Vit model(c, {.device = kMeta});
    });
  };
  CHECK(contains(build([](auto& c) { c.patch = 7; }), "vit: image must be a multiple of patch"));
  CHECK(contains(build([](auto& c) { c.heads = 5; }), "vit: dim must be a multiple of heads"));
  CHECK(contains(build([](auto& c) { c.class_token = false; }), "pool must be mean"));
  CHECK(contains(build([](auto& c) { c.class_token = false, c.pool = vit::Pool::mean, c.distilled = true; }),
                 "needs a class token"));
  CHECK(contains(error_of([] { vit::config("vit_x", 32, 8, 1); }),
                 "vit_ti, vit_s, vit_b, vit_l or vit_h, got \"vit_x\""));
  vit::Vit model(small());
  CHECK(contains(error_of([&] {
                   model(zeros({1, 3, 32, 32}));
                 }),
                 "vit: image must be [B, 32, 32, 3], got [1, 3, 32, 32]"));
  for (const char* text :
       {"", "[]", "{", "{\"size\": 3}", "{\"image\": 32.5}", "{\"image\": \"32\"}", "{\"image\": 32, \"image\": 32}",
        "{\"heads\": 0}", "{\"pool\": \"max\"}", "{\"pool\": 3}", "{\"distilled\": 1}", "{\"norm_eps\": -1}"})
    CHECK_MESSAGE(starts_with(error_of([&] { vit::config_from_json(text, "file"); }), "file: "), std::string(text));
  CHECK(error_of([] { vit::config_from_json("{\"image\": 32, \"image\": 32}", "file"); }) ==
        "file: the model configuration: duplicate key, got \"image\" twice");
  CHECK(error_of([] { vit::config_from_json("{\"pool\": \"max\"}", "file"); }) ==
        "file: the model configuration: pool must be one of token, mean, got \"max\"");
  CHECK(error_of([] { vit::config_from_json("{\"size\": 3}", "file"); }) ==
        "file: the model configuration: unknown key \"size\"");
  CHECK(error_of([] { vit::config_from_json("3", "file"); }) ==
        "file: the model configuration: must be a JSON object, got number");
  CHECK(contains(error_of([] {
                   vit::config_from_names({{"conv1.weight", {64, 3, 7, 7}}});
                 }),
                 "patch_embed.proj.weight of rank 4, this one has not"));
  CHECK(contains(error_of([] {
                   vit::config_from_names({{"patch_embed.proj.weight", {64, 3, 7, 7}}, {"pos_embed", {1, 18, 64}}});
                 }),
                 "no square grid"));
  for (const Shape& proj : {Shape{64, 3, 0, 0}, Shape{0, 3, 8, 8}, Shape{64, 0, 8, 8}, Shape{64, 3, 8, 4}})
    CHECK(contains(error_of([&] {
                     vit::config_from_names({{"patch_embed.proj.weight", proj}, {"pos_embed", {1, 16, 64}}});
                   }),
                   cat("patch_embed.proj.weight must be [dim, channels, patch, patch], got ", proj)));
}

TEST_CASE("heads that a timm file does not tell") {
  const auto heads_of = [](std::int64_t dim, int told = 0) {
    const std::vector<vit::NamedShape> names{{"patch_embed.proj.weight", {dim, 3, 14, 14}},
                                             {"pos_embed", {1, 256, dim}}};
    return vit::config_from_names(names, told).heads;
  };
  for (const std::int64_t dim : {1152, 1280, 1408, 1664}) CHECK(heads_of(dim) == 16);  // so400m, H, g, G
  CHECK(heads_of(192) == 3);
  CHECK(heads_of(768) == 12);
  CHECK(heads_of(1024) == 16);
  CHECK(heads_of(1280, 20) == 20);
  CHECK(contains(error_of([&] { heads_of(100); }), "dim 100 is no multiple of 64; say how many heads"));
}

TEST_CASE("position embeddings for another grid are timm's") {
  // F.interpolate(bicubic, antialias) of PyTorch 2.15 in f64, channel 1 of 4.
  const Tensor pos = golden::make("pos_embed", {1, 17, 4});
  const std::vector<double> six{-0.1333928615775128,   0.12572822615506413,  0.3733359759202865,   0.23683682274846002,
                                0.338856721969596,     0.46757909873161685,  -0.23132753930437047, -0.17542903767983364,
                                -0.020243401683902068, 0.2692682425315588,   0.14488086247325332,  -0.04962587768152743,
                                -0.25831984208101094,  -0.35766066263230983, -0.27526812692511066, 0.33367546318837277,
                                -0.010623481303787938, -0.4921391797187201};
  const std::vector<double> three{-0.12354784854290261,  0.19100492133920954,  0.1968504412514771,
                                  -0.13111110082483038,  0.19944370135595313,  -0.05576507883529202,
                                  -0.007667611353212006, -0.08837279217560735, 0.12279409416019443};
  const auto check = [&](int grid, const std::vector<double>& want) {
    const Tensor y = vit::resize_pos_embed(pos, 1, grid);
    CHECK(y.shape() == Shape{1, 1 + grid * grid, 4});
    CHECK(close(slice(y, 1, 0, 1), slice(pos, 1, 0, 1), 0));
    const auto got = to_vector<double>(y);
    for (std::size_t i = 0; i < want.size(); ++i)
      CHECK(got[(i + 1) * 4 + 1] == doctest::Approx(want[i]).epsilon(1e-10));
  };
  check(6, six);
  check(3, three);
  CHECK(vit::resize_pos_embed(pos, 1, 4).same(pos));
  CHECK(vit::resize_pos_embed(slice(pos, 1, 1, 17), 0, 5).shape() == Shape{1, 25, 4});
  CHECK_THROWS_AS(vit::resize_pos_embed(pos, 2, 3), Error);
}

TEST_CASE("state dicts and weight files") {
  TempFolder folder;
  const std::string path = folder / "model.safetensors";
  for (const Variant& v : variants()) {
    vit::Vit a(v.config, {.seed = 1}), b(v.config, {.seed = 2});
    CHECK(bytes_of(a) != bytes_of(b));
    nn::save_weights(a, path, f32);
    nn::load_weights(b, path);
    CHECK(bytes_of(a) == bytes_of(b));
    vit::Vit wide(v.config, {.seed = 3, .dtype = f64});
    nn::load_weights(wide, path);
    CHECK(close(cast(wide.pos_embed.value(), f32), a.pos_embed.value(), 0));
  }
  vit::Vit a(small(), {.seed = 1}), b(small(), {.seed = 2});
  for (DType half : {f16, bf16}) {
    nn::save_weights(a, path, half);
    nn::load_weights(b, path);
    for (std::size_t i = 0; i < a.parameters().size(); ++i)
      CHECK(same_bits(b.parameters()[i]->value().detach(), cast(cast(a.parameters()[i]->value().detach(), half), f32)));
  }
  // PyTorch's layout outside.
  int found = 0;
  for (const auto& t : nn::state_dict(a))
    if (t.name == "patch_embed.proj.weight") {
      ++found;
      CHECK(t.value.shape() == Shape{64, 3, 8, 8});
      CHECK(same_bits(t.value, contiguous(permute(a.patch_embed.proj.weight.value().detach(), {0, 3, 1, 2}))));
    }
  CHECK(found == 1);
  // The same initial values for the same seed.
  vit::Vit again(small(), {.seed = 1});
  CHECK(bytes_of(a) == bytes_of(again));
}

TEST_CASE("what does not fit is listed, and nothing changes") {
  vit::Vit model(small(), {.seed = 1});
  const std::string before = bytes_of(model);
  nn::StateDict dict = nn::state_dict(*std::make_unique<vit::Vit>(small(), nn::Build{.seed = 2}));
  std::erase_if(dict, [](const auto& t) { return t.name == "norm.weight" || t.name == "blocks.1.attn.qkv.bias"; });
  for (auto& t : dict) {
    if (t.name == "pos_embed") t.value = zeros({1, 10, 64});
    if (t.name == "norm.bias") t.value = zeros({64}, i64);
  }
  dict.push_back({"extra.weight", zeros({3})});
  const std::string text = error_of([&] { nn::load_state(model, dict); });
  for (const char* part :
       {"missing: blocks.1.attn.qkv.bias, norm.weight", "unexpected: extra.weight",
        "pos_embed must be f32 [1, 17, 64], got f32 [1, 10, 64]", "norm.bias must be f32 [64], got i64 [64]"})
    CHECK_MESSAGE(contains(text, part), text);
  CHECK(bytes_of(model) == before);
  dict = nn::state_dict(model);
  dict.push_back(dict[3]);
  CHECK(contains(error_of([&] { nn::load_state(model, dict); }), "twice"));

  vit::VitConfig c = small();
  c.classes = 7;
  vit::Vit other(c, {.seed = 3});
  CHECK(contains(error_of([&] { nn::load_state(other, nn::state_dict(model)); }),
                 "head.weight must be f32 [7, 64], got f32 [3, 64]"));
  const auto skipped = nn::load_state(other, nn::state_dict(model), {.skip = {"head.*"}});
  CHECK(skipped == std::vector<std::string>{"head.weight", "head.bias"});
  CHECK(same_bits(other.pos_embed.value().detach(), model.pos_embed.value().detach()));

  TempFolder folder;
  CHECK(contains(error_of([&] { nn::load_weights(model, folder / "none.safetensors"); }), "none.safetensors"));
}

TEST_CASE("a ViT file needs nothing else") {
  TempFolder folder;
  const std::string path = folder / "vit.safetensors";
  vit::VitConfig c = small();
  c.layer_scale = 0.25;
  vit::Vit model(c, {.seed = 4});
  vit::save_vit(model, path, f32, "{\"size\": 32}", "cat\ndog\nelk");
  auto loaded = vit::load_vit(path);
  CHECK(bytes_of(*loaded.model) == bytes_of(model));
  CHECK(loaded.preprocess == "{\"size\": 32}");
  CHECK(loaded.classes == "cat\ndog\nelk");
  CHECK(vit::to_json(loaded.model->config) == vit::to_json(c));
  const NoGrad off;
  const Tensor x = cast(images(), f32);
  CHECK(same_bits((*loaded.model)(x), model(x)));

  loaded = vit::load_vit(path, {.classes = 10, .image = 48});
  CHECK((*loaded.model)(zeros({1, 48, 48, 3})).shape() == Shape{1, 10});
  CHECK(close(loaded.model->pos_embed.value(), vit::resize_pos_embed(model.pos_embed.value(), 1, 6), 0));
  loaded = vit::load_vit(path, {.classes = 0, .image = 64, .patch = 16});
  CHECK((*loaded.model)(zeros({1, 64, 64, 3})).shape() == Shape{1, 64});
  CHECK(loaded.model->patch_embed.proj.weight.value().shape() == Shape{64, 16, 16, 3});
  CHECK(same_bits(loaded.model->pos_embed.value().detach(), model.pos_embed.value().detach()));

  nn::save_weights(model, path, f32);  // bare names, as timm's own files
  loaded = vit::load_vit(path, {.heads = 2});
  CHECK(same_bits((*loaded.model)(x), model(x)));
}

TEST_CASE("a size that only a file's text claims is not allocated") {
  TempFolder folder;
  const std::string path = folder / "vit.safetensors";
  vit::Vit model(small());
  vit::VitConfig claimed = small();
  claimed.dim = 4096;
  nn::save_weights(model, path, f32, {{"model", vit::to_json(claimed)}});
  Allocator& memory = allocator(kCpu);
  memory.reset_peak();
  const std::int64_t before = memory.stats().peak_bytes;
  const std::string text = error_of([&] { vit::load_vit(path); });
  CHECK_MESSAGE(starts_with(text, path + ": "), text);
  CHECK_MESSAGE(contains(text, "pos_embed must be f32 [1, 17, 4096], got f32 [1, 17, 64]"), text);
  CHECK(memory.stats().peak_bytes - before < (16 << 20));  // the claim: 1.6 GB
}

TEST_CASE("one batch is learnt by heart") {
  vit::VitConfig c = small();
  vit::Vit model(c, {.seed = 3});
  const Tensor x = cast(normal({6, 32, 32, 3}, "batch"), f32), y = labels(6);
  train::AdamW optimizer(model, {.weight_decay = 0});
  double loss = 0;
  for (int i = 0; i < 60; ++i) {
    optimizer.zero_grad();
    const Tensor l = cross_entropy(model(x), y);
    loss = l.item();
    backward(l);
    optimizer.step(2e-3);
  }
  CHECK(loss < 0.01);
}

TEST_CASE("the bits of training do not depend on the number of threads") {
  const auto run = [](int threads) {
    set_num_threads(threads);
    vit::VitConfig c = vit::config("vit_ti", 32, 4, 10);
    c.drop = 0.1;
    c.drop_path = 0.2;
    c.patch_drop = 0.3;
    vit::Vit model(c, {.seed = 9});
    model.train();
    train::AdamW optimizer(model);
    for (int i = 0; i < 3; ++i) {
      optimizer.zero_grad();
      backward(cross_entropy(model(cast(normal({6, 32, 32, 3}, cat("batch ", i)), f32)), labels(6)));
      optimizer.clip_grad_norm(1.0);
      optimizer.step(1e-3);
    }
    return bytes_of(model);
  };
  const ThreadsScope restore;
  const std::string one = run(1);
  for (int threads : {2, 3, 5}) CHECK(run(threads) == one);
}

TEST_CASE("forwards on several threads at once give the same bits") {
  vit::Vit model(small(), {.seed = 9});
  const Tensor x = cast(images(), f32);
  std::vector<double> want;
  {
    const NoGrad off;
    want = to_vector<double>(model(x));
  }
  std::vector<int> good(4, 0);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < good.size(); ++t)
    threads.emplace_back([&, t] {
      const NoGrad off;
      for (int i = 0; i < 20; ++i) good[t] += to_vector<double>(model(x)) == want;
    });
  for (auto& t : threads) t.join();
  CHECK(good == std::vector<int>(4, 20));
}
