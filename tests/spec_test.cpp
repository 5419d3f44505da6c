// Tuner specs and tuner files: what is accepted, and that everything else is refused by name and leaves nothing behind.
#include <doctest/doctest.h>

#include <capo/engine/sha256.h>
#include <capo/models/nn/state.h>
#include <capo/models/vit/vit.h>
#include <capo/ops/cross_entropy.h>
#include <capo/tests/op_test.h>
#include <capo/tests/temp_folder.h>
#include <capo/tuners/artifact.h>
#include <capo/tuners/presets.h>

#include <fstream>
#include <string>
#include <vector>

using namespace capo;
using namespace capo::testing;
using test::normal;
using test::same_bits;

namespace {

vit::VitConfig small() {
  vit::VitConfig c;
  c.image = 8;
  c.patch = 4;
  c.dim = 24;
  c.depth = 2;
  c.heads = 3;
  c.mlp_ratio = 2;
  c.classes = 5;
  return c;
}

void randomise(nn::Module& m) {
  const NoGrad off;
  for (nn::Parameter* p : m.parameters())
    if (p->trainable()) copy_into(p->value(), normal(p->value().shape(), p->path(), 0, 0.2));
}

}  // namespace

TEST_CASE("grammar") {
  const auto items = tuners::parse_spec(" blocks.*.attn : u_prefix( length = 5 ) ;\n head: train ; ");
  REQUIRE(items.size() == 2);
  CHECK(items[0].pattern == "blocks.*.attn");
  CHECK(items[0].action == "u_prefix");
  REQUIRE(items[0].args.size() == 1);
  CHECK(items[0].args[0].first == "length");
  CHECK(items[0].args[0].second == "5");
  CHECK(tuners::to_string(items) == "blocks.*.attn: u_prefix(length=5); head: train");
  CHECK(tuners::to_string(tuners::parse_spec("linear")) == "@head: train");
  CHECK(tuners::to_string(tuners::parse_spec("bitfit; **: u_adapter(dim=3,on=z)")) ==
        "**.bias: train; @head: train; **: u_adapter(dim=3, on=z)");
  CHECK(tuners::to_string(tuners::parse_spec("prompt-ffn; linear")) ==
        "blocks.*.mlp: u_prompt(length=10); @head: train; @head: train");
  for (const auto& m : tuners::kMethods) {
    CHECK(tuners::to_string(tuners::parse_spec(m.name)) == tuners::to_string(tuners::parse_spec(m.spec)));
    vit::Vit model(small());
    tuners::apply_spec(model, m.spec);
    CHECK_MESSAGE(nn::parameter_count(model, true) > 0, m.name);
    CHECK(tuners::find_method(m.name) == &m);
    vit::VitConfig two = small();
    two.distilled = true;
    vit::Vit distilled(two);
    tuners::apply_spec(distilled, m.spec);
    for (const nn::Head* head : {model.head.get(), distilled.head.get(), distilled.head_dist.get()})
      CHECK_MESSAGE((head->weight.trainable() && head->bias.trainable()), m.name << " " << head->path());
  }
  CHECK(tuners::find_method("nothing") == nullptr);
}

TEST_CASE("patterns") {
  CHECK(nn::matches("blocks.*.attn", "blocks.11.attn"));
  CHECK(!nn::matches("blocks.*", "blocks.1.attn"));
  CHECK(nn::matches("blocks.**", "blocks.1.attn"));
  CHECK(nn::matches("**.bias", "blocks.0.attn.qkv.bias"));
  CHECK(!nn::matches("*.bias", "blocks.0.bias"));
  CHECK(nn::matches("b*1*.norm?", "b1.norm?"));
  CHECK(nn::matches("**", "head"));
  CHECK(!nn::matches("", "head"));
  CHECK(nn::matches("*norm*", "norm"));
}

TEST_CASE("bad specs are refused by name and leave the model clean") {
  struct Bad {
    const char *spec, *text;
  };
  const Bad bad[] = {
      {"", "spec: is empty"},
      {" ; ;", "spec: is empty"},
      {"blocks.*.attn", "expected \"pattern: action\""},
      {"lineer", "expected \"pattern: action\" or a named method (linear, bitfit, lora, "},
      {": train", "must not be empty"},
      {"head:", "must not be empty"},
      {"head: trian", "unknown action \"trian\"; known: train, u_adapter"},
      {"head: train()", ""},  // accepted: no arguments
      {"head: train(lr=1)", "train takes no arguments"},
      {"blocks.*.mlp: u_adapter(dims=3)", "u_adapter has no argument \"dims\"; it has dim, scale"},
      {"blocks.*.mlp: u_adapter(dim=)", "dim must be an integer in [1, 65536], got \"\""},
      {"blocks.*.mlp: u_adapter(dim=0)", "dim must be an integer"},
      {"blocks.*.mlp: u_adapter(dim=-4)", "dim must be an integer"},
      {"blocks.*.mlp: u_adapter(dim=3.5)", "dim must be an integer"},
      {"blocks.*.mlp: u_adapter(dim=99999999999999999999)", "dim must be an integer"},
      {"blocks.*.mlp: u_adapter(dim=8 9)", "dim must be an integer"},
      {"blocks.*.mlp: u_adapter(scale=nan)", "scale must be a number"},
      {"blocks.*.mlp: u_adapter(scale=1e9)", "scale must be a number"},
      {"blocks.*.mlp: u_adapter(scale=0x10)", "scale must be a number"},
      {"blocks.*.mlp: u_adapter(scale)", "arguments are name=value, got \"scale\""},
      {"blocks.*.mlp: u_adapter(dim=3, dim=4)", "argument dim given twice"},
      {"blocks.*.mlp: u_adapter(on=w)", "on must be one of x, z, y, got \"w\""},
      {"blocks.*.mlp: u_adapter(act=swish)", "act must be one of none, relu"},
      {"blocks.*.mlp: u_adapter(dim=3", "lacks its closing parenthesis"},
      {"blocks.*.mlp: u_adapter(dim=3; head: train", "lacks its closing parenthesis"},
      {"blocks.*.mlp: u_adapter(dim=3) foo", "lacks its closing parenthesis"},
      {"blocks.*.mlp: u_adapter((dim=3))", "nested parentheses"},
      {"blocks.*.mlp: u_adapter)", "unknown action \"u_adapter)\""},
      {"block.*.mlp: u_adapter()", "\"block.*.mlp\" matches no module; near: blocks.0.mlp"},
      {"heda: train", "matches no module or parameter; near: head"},
      {"heda*: train", "\"heda*\" matches no module or parameter; near: head"},
      {"blocks.*.norm1: u_adapter()", "u_adapter: blocks.0.norm1 is no module that maps tokens to tokens"},
      {"blocks.*.attn.core: u_prefix()", "u_prefix: blocks.0.attn.core is no module"},
      {"blocks.*.mlp.fc1: u_prefix()", "maps width 24 to 48"},
      {"blocks: u_adapter()", "is only a container"},
      {"blocks.*: lora()", "lora: blocks.0 is no Linear"},
      {"blocks.*.attn: lora()", "say which slices"},
      {"blocks.*.attn.proj: lora(slices=qv)", "slices need a fused qkv"},
      {"blocks.*.attn: lora(slices=qz)", "slices must name q, k, v"},
      {"blocks.*.attn: lora(slices=qq)", "slices must name q, k, v at most once"},
      {"blocks.*.attn: lora(slices=+)", "slices must name q, k or v"},
      {"blocks.*.attn: lora(rank=0, slices=q)", "rank must be an integer"},
      {"blocks.*.attn: lora(dropout=1, slices=q)", "dropout must be a number"},
      {"blocks.*.attn: lora(rslora=yes, slices=q)", "rslora must be one of false, true"},
      {"blocks.*.mlp: u_adapter(); blocks.0.mlp: u_adapter()", "blocks.0.mlp carries u_adapter already"},
      {"blocks.*.attn: u_prefix(); **.attn: u_prefix()", "blocks.0.attn.core carries u_prefix already"},
      {"blocks.*.attn: lora(slices=q); blocks.1.attn.qkv: lora()", "blocks.1.attn.qkv carries lora already"},
      {"blocks.*.mlp: u_adapter(); blocks.*.attn: lora()", "say which slices"},
      {"blocks.*.mlp: u_adapter(); **.u_adapter: u_adapter()", "matches tuners only"},
  };
  vit::Vit model(small());
  const NoGrad off;
  const Tensor image = normal({1, 8, 8, 3}, "image");
  const Tensor x = cast(image, f32), before = model(x);
  for (const auto& b : bad) {
    const std::string text = error_of([&] { tuners::apply_spec(model, b.spec); });
    if (!*b.text) {
      CHECK(text == "no error");
      continue;
    }
    CHECK_MESSAGE(contains(text, b.text), cat("\"", b.spec, "\" gave: ") << text);
    CHECK_MESSAGE(tuners::tuners_of(model).empty(), std::string(b.spec));
    CHECK(nn::parameter_count(model, true) == 0);
    for (nn::Module* m : model.modules()) CHECK(!m->tapped());
  }
  CHECK(same_bits(model(x), before));
  CHECK(tuners::apply_spec(model, "blocks.*.mlp: u_adapter()").size() == 2);  // still usable
}

TEST_CASE("an error in a second spec keeps the first one's tuners") {
  vit::Vit model(small());
  tuners::apply_spec(model, "blocks.*.mlp: u_adapter()");
  CHECK_THROWS_AS(tuners::apply_spec(model, "blocks.0.attn: u_prefix(); blocks.0.mlp: u_adapter()"), Error);
  CHECK(tuners::tuners_of(model).size() == 2);
}

namespace {

struct SavedTuner {
  TempFolder folder;
  std::string path = folder / "tuner";
  tuners::TunerCard card;
  std::vector<double> logits;
};

const Tensor& image() {
  static const Tensor x = cast(normal({2, 8, 8, 3}, "image"), f32);
  return x;
}
std::vector<double> logits_of(vit::Vit& model) {
  const NoGrad off;
  return to_vector<double>(model(image()));
}

// A tuner "trained" on a base of seed 7.
void make(SavedTuner& s, const std::string& spec) {
  vit::Vit model(small(), {.seed = 7});
  s.card = {spec, nn::base_hash(model), vit::to_json(model.config), "", {"a", "b\"\n", "ü"}, {{"accuracy", "0.5"}}};
  tuners::apply_spec(model, spec);
  randomise(model);
  tuners::save_tuner(s.path, model, s.card);
  s.logits = logits_of(model);
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  REQUIRE_MESSAGE(at != std::string::npos, from);
  return text.replace(at, from.size(), to);
}

}  // namespace

TEST_CASE("a tuner goes to disk and comes back on its base") {
  for (const char* spec :
       {"linear", "bitfit", "blocks.*.attn: u_prefix(length=3); blocks.*.mlp: u_adapter(dim=4); head: train",
        "blocks.*.attn: lora(rank=2, slices=qv)", "patch_embed: train; blocks.*.mlp: u_prompt(length=2)"}) {
    SavedTuner s;
    make(s, spec);
    const tuners::TunerCard card = tuners::read_tuner_card(s.path);
    CHECK(card.spec == spec);
    CHECK(card.classes == s.card.classes);
    CHECK(card.notes == s.card.notes);
    CHECK(card.base_hash == s.card.base_hash);
    vit::Vit model(vit::config_from_json(card.model, s.path), {.seed = 7});
    tuners::load_tuner(s.path, model);
    CHECK_MESSAGE(logits_of(model) == s.logits, std::string(spec));
    CHECK(nn::parameter_count(model, true) > 0);
    const std::string again = error_of([&] { tuners::load_tuner(s.path, model); });
    if (!tuners::tuners_of(model).empty())
      CHECK(contains(again, "carries tuners already"));
    else if (card.spec == "bitfit")  // the base's biases are no longer the base's
      CHECK(contains(again, "was trained on a base"));
  }
}

TEST_CASE("the head does not belong to the base") {
  SavedTuner s;
  make(s, "linear");
  vit::VitConfig c = small();
  vit::Vit model(c, {.seed = 7});
  const NoGrad off;
  copy_into(model.head->weight.value(), normal({5, 24}, "another head"));
  tuners::load_tuner(s.path, model);
  CHECK(logits_of(model) == s.logits);
}

TEST_CASE("tuner files that do not fit are refused") {
  SavedTuner s;
  make(s, "blocks.*.mlp: u_adapter(dim=4); head: train");
  const std::string json = s.path + "/tuner.json", tensors = s.path + "/tuner.safetensors";
  const std::string good = read_file(json, 1 << 20), bytes = read_file(tensors, 1 << 24);
  const auto refused = [&](const std::string& text, std::uint64_t seed = 7) {
    vit::Vit model(small(), {.seed = seed});
    const std::string hash = nn::base_hash(model);
    const std::string got = error_of([&] { tuners::load_tuner(s.path, model); });
    CHECK_MESSAGE(contains(got, text), got);
    CHECK(tuners::tuners_of(model).empty());
    CHECK(nn::base_hash(model) == hash);
  };
  SUBCASE("another base") { refused("was trained on a base with SHA-256", 8); }
  SUBCASE("the tensors were changed") {
    std::string changed = bytes;
    changed.back() = static_cast<char>(changed.back() ^ 1);
    write_file_atomic(tensors, changed);
    refused("its SHA-256 is not the one tuner.json names");
  }
  SUBCASE("the tensors are not the spec's") {
    const auto store = [&](const nn::StateDict& dict) {
      nn::save_tensors(tensors, dict);
      const std::size_t at = good.find("\"tensors_sha256\": \"") + 19;
      write_file_atomic(json, std::string(good).replace(at, 64, sha256_file(tensors)));
    };
    const nn::StateDict dict = nn::read_tensors(tensors);
    nn::StateDict d = dict;
    d.pop_back();
    store(d);
    refused(cat("1 missing: ", dict.back().name));
    d = dict;
    d.push_back({"blocks.0.surplus", zeros({1})});
    store(d);
    refused("1 unexpected: blocks.0.surplus");
    d = dict;
    d[0].value = zeros({2, 2});
    store(d);
    refused(cat(d[0].name, " must be"));
    d = dict;
    d[0].value = cast(d[0].value, f64);
    store(d);
    refused(cat(d[0].name, " must be"));
    store(dict);
    vit::Vit model(small(), {.seed = 7});
    tuners::load_tuner(s.path, model);
  }
  SUBCASE("the card is wrong") {
    struct Bad {
      const char *from, *to, *text;
    };
    const Bad bad[] = {
        {"\"format\": \"capo-tuner-1\"", "\"format\": \"capo-tuner-9\"", "format must be capo-tuner-1"},
        {"\"format\": \"capo-tuner-1\"", "\"format\": 1", "needs the text \"format\""},
        {"\"format\": \"capo-tuner-1\"", "\"format\": \"capo-tuner-1\", \"format\": \"capo-tuner-1\"",
         "duplicate key, got \"format\" twice"},
        {"\"format\": \"capo-tuner-1\"", "\"formats\": \"capo-tuner-1\"", "unknown key \"formats\""},
        {"\"format\": \"capo-tuner-1\"", "\"format\": \"capo-tuner-1\", \"more\": {}", "unknown key \"more\""},
        {"\"accuracy\": \"0.5\"", "\"accuracy\": \"0.5\", \"accuracy\": \"0.6\"",
         "duplicate key, got \"accuracy\" twice"},
        {"\"accuracy\": \"0.5\"", "\"accuracy\": 0.5", "notes must be texts, got 0.5"},
        {"\"notes\": {", "\"notes\": [", "must be valid JSON"},
        {"\"classes\": [", "\"classes\": [3, ", "classes must be texts, got 3"},
        {"\"spec\": \"blocks", "\"spec\": \"; blocks", ""},
        {"\"spec\": \"blocks.*.mlp: u_adapter(dim=4); head: train\"", "\"spec\": \"\"", "spec: is empty"},
        {"\"spec\": \"blocks.*.mlp: u_adapter(dim=4); head: train\"", "\"spec\": 3", "needs the text \"spec\""},
        {"u_adapter(dim=4)", "u_adapter(dim=5)", "must be"},
        {"u_adapter(dim=4)", "u_surplus(dim=4)", "unknown action"},
        {"\"base_sha256\": \"", "\"base_sha256\": \"z", "must be 64 hex digits"},
        {"\"tensors_sha256\": \"", "\"tensors_sha256\": \"0", "must be 64 hex digits"},
        {"{", "[", "must be a JSON object, got array"},
        {"}\n", "} x", "must be valid JSON"},
        {"0.5", "\xff", "must be valid JSON"},
    };
    for (const auto& b : bad) {
      write_file_atomic(json, replaced(good, b.from, b.to));
      if (*b.text) {
        refused(b.text);
      } else {
        vit::Vit model(small(), {.seed = 7});
        tuners::load_tuner(s.path, model);
      }
    }
    write_file_atomic(json, "");
    refused("must be valid JSON");
    write_file_atomic(json, "[]");
    refused("must be a JSON object, got array");
    write_file_atomic(json, good + std::string("\0x", 2));
    refused("got a NUL byte");
    std::string deep = "{\"notes\":";
    for (int i = 0; i < 100000; ++i) deep += "[";
    write_file_atomic(json, deep);
    refused("nesting is too deep");
    deep = "{\"notes\":";
    for (int i = 0; i < 1000; ++i) deep += "{\"a\":";
    for (int i = 0; i < 1000; ++i) deep += i ? "}" : "1}";
    write_file_atomic(json, deep + "}");
    refused("nesting is too deep");
  }
  SUBCASE("bytes are flipped and cut: an Error or the same tuner") {
    for (std::uint64_t i = 0; i < 400; ++i) {
      std::string text = good;
      const Philox4 r = philox(11, 3, i);
      const std::size_t at = r.v[0] % text.size();
      if (i % 4 == 0)
        text.resize(at);
      else if (i % 4 == 1)
        text.erase(at, 1 + r.v[1] % 8);
      else
        text[at] = static_cast<char>(r.v[1]);
      std::ofstream(json, std::ios::binary) << text;  // no fsync
      try {
        const tuners::TunerCard card = tuners::read_tuner_card(s.path);
        vit::Vit model(small(), {.seed = 7});
        tuners::load_tuner(s.path, model);
        CHECK(logits_of(model) == s.logits);
      } catch (const Error&) {
      }
    }
  }
}

TEST_CASE("what save_tuner refuses") {
  TempFolder folder;
  vit::Vit model(small());
  tuners::TunerCard card{"blocks.*.attn: lora(slices=q)", nn::base_hash(model), "", "", {}, {}};
  tuners::apply_spec(model, card.spec);
  const auto refused = [&](const tuners::TunerCard& c, const std::string& at, const std::string& text) {
    const std::string got = error_of([&] { tuners::save_tuner(at, model, c); });
    CHECK_MESSAGE(contains(got, text), got);
  };
  tuners::TunerCard c = card;
  c.base_hash = "abc";
  refused(c, folder / "a", "base_hash must be");
  c = card;
  c.spec = "";
  refused(c, folder / "a", "spec: is empty");
  c = card;
  c.notes["x"] = "\xff";
  refused(c, folder / "a", "must be UTF-8");
  refused(card, folder / "no/such/place", "cannot make the folder");
  tuners::merge_tuners(model);
  refused(card, folder / "a", "is merged; unmerge first");
}
