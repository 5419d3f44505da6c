#include <capo/tuners/conv_tuners.h>
#include <capo/tuners/presets.h>
#include <capo/tuners/select.h>
#include <capo/tuners/spec.h>

#include <charconv>

namespace capo::tuners {
namespace {

std::string_view trim(std::string_view s) {
  while (!s.empty() && (s.front() == ' ' || s.front() == '\t' || s.front() == '\n')) s.remove_prefix(1);
  while (!s.empty() && (s.back() == ' ' || s.back() == '\t' || s.back() == '\n')) s.remove_suffix(1);
  return s;
}

// Splits at `separator` outside parentheses.
std::vector<std::string_view> split(std::string_view s, char separator) {
  std::vector<std::string_view> parts;
  int depth = 0;
  std::size_t begin = 0;
  for (std::size_t i = 0; i <= s.size(); ++i) {
    if (i < s.size() && s[i] == '(') ++depth;
    if (i < s.size() && s[i] == ')') --depth;
    if (i == s.size() || (s[i] == separator && depth == 0)) {
      parts.push_back(trim(s.substr(begin, i - begin)));
      begin = i + 1;
    }
  }
  return parts;
}

constexpr const char* kActions = "train, u_adapter, u_prefix, u_prompt, lora, residual_adapter";

SpecItem parse_item(std::string_view text) {
  const std::size_t colon = text.find(':');
  CAPO_CHECK(colon != std::string_view::npos,
             "spec: expected \"pattern: action\" or a named method (", method_names(), "), got \"", text, "\"");
  SpecItem item;
  item.pattern = trim(text.substr(0, colon));
  std::string_view action = trim(text.substr(colon + 1));
  CAPO_CHECK(!item.pattern.empty() && !action.empty(), "spec: pattern and action must not be empty, got \"", text,
             "\"");
  const std::size_t open = action.find('(');
  item.action = trim(action.substr(0, open));
  if (open == std::string_view::npos) return item;
  CAPO_CHECK(action.back() == ')', "spec: \"", action, "\" lacks its closing parenthesis");
  const std::string_view inside = trim(action.substr(open + 1, action.size() - open - 2));
  CAPO_CHECK(inside.find('(') == std::string_view::npos && inside.find(')') == std::string_view::npos,
             "spec: nested parentheses in \"", action, "\"");
  if (inside.empty()) return item;
  for (const auto arg : split(inside, ',')) {
    const std::size_t equals = arg.find('=');
    CAPO_CHECK(equals != std::string_view::npos, "spec: arguments are name=value, got \"", arg, "\" in \"", action,
               "\"");
    item.args.emplace_back(trim(arg.substr(0, equals)), trim(arg.substr(equals + 1)));
    for (std::size_t i = 0; i + 1 < item.args.size(); ++i)
      CAPO_CHECK(item.args[i].first != item.args.back().first, "spec: argument ", item.args.back().first,
                 " given twice in \"", action, "\"");
  }
  return item;
}

// Reads an action's arguments; what was not asked for by the end is unknown.
class Arguments {
 public:
  explicit Arguments(const SpecItem& item) : item_(item), used_(item.args.size(), false) {}

  double number(const char* name, double otherwise, double low, double high) {
    const std::string* text = find(name);
    if (!text) return otherwise;
    double v = 0;  // from_chars: whatever the program's locale
    const auto r = std::from_chars(text->data(), text->data() + text->size(), v);
    CAPO_CHECK(r.ec == std::errc() && r.ptr == text->data() + text->size() && v >= low && v <= high,
               "spec: ", item_.action, " ", name, " must be a number in [", low, ", ", high, "], got \"", *text, "\"");
    return v;
  }
  std::int64_t integer(const char* name, std::int64_t otherwise, std::int64_t low, std::int64_t high) {
    const std::string* text = find(name);
    if (!text) return otherwise;
    std::int64_t v = 0;
    const auto r = std::from_chars(text->data(), text->data() + text->size(), v);
    CAPO_CHECK(r.ec == std::errc() && r.ptr == text->data() + text->size() && v >= low && v <= high,
               "spec: ", item_.action, " ", name, " must be an integer in [", low, ", ", high, "], got \"", *text,
               "\"");
    return v;
  }
  // Index of the value in `choices` (a null-terminated list).
  int choice(const char* name, int otherwise, std::initializer_list<const char*> choices) {
    const std::string* text = find(name);
    if (!text) return otherwise;
    int i = 0;
    std::string all;
    for (const char* c : choices) {
      if (*text == c) return i;
      all += cat(i++ ? ", " : "", c);
    }
    detail::fail("spec: ", item_.action, " ", name, " must be one of ", all, ", got \"", *text, "\"");
  }
  std::string text(const char* name, const char* otherwise) {
    const std::string* t = find(name);
    return t ? *t : otherwise;
  }
  void finish(const char* known) const {
    for (std::size_t i = 0; i < used_.size(); ++i)
      CAPO_CHECK(used_[i], "spec: ", item_.action, " has no argument \"", item_.args[i].first, "\"; it has ", known);
  }

 private:
  const std::string* find(const char* name) {
    for (std::size_t i = 0; i < item_.args.size(); ++i)
      if (item_.args[i].first == name) {
        used_[i] = true;
        return &item_.args[i].second;
      }
    return nullptr;
  }
  const SpecItem& item_;
  std::vector<bool> used_;
};

Tuner& attach(nn::Module& target, const SpecItem& item) {
  Arguments args(item);
  const nn::AttentionPlace* place = target.attention_place();
  const auto once = [&item](nn::Module& where) -> nn::Module& {
    CAPO_CHECK(!where.tap(item.action), "spec: ", where.path(), " carries ", item.action, " already");
    return where;
  };
  if (item.action == "u_adapter") {
    AdapterOptions o;
    o.dim = args.integer("dim", o.dim, 1, 65536);
    o.scale = args.number("scale", o.scale, -1e3, 1e3);
    o.reads = static_cast<Reads>(args.choice("on", 2, {"x", "z", "y"}));
    o.act = static_cast<Activation>(args.choice("act", 2, {"none", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu"}));
    o.zero_up = args.choice("init", 0, {"zero", "xavier"}) == 0;
    args.finish("dim, scale, on, act, init");
    return once(target).attach<UAdapter>("u_adapter", o);
  }
  if (item.action == "u_prefix" || item.action == "u_prompt") {
    TokenOptions o;
    o.length = args.integer("length", o.length, 1, 65536);
    args.finish("length");
    if (item.action == "u_prefix")
      return place ? static_cast<Tuner&>(once(*place->core).attach<UPrefix>("u_prefix", *place, o))
                   : once(target).attach<UPrefixBeside>("u_prefix", o);
    return place ? static_cast<Tuner&>(once(*place->core).attach<UPrompt>("u_prompt", *place, o))
                 : once(target).attach<UPromptBeside>("u_prompt", o);
  }
  if (item.action == "lora") {
    LoraOptions o;
    o.rank = args.integer("rank", o.rank, 1, 65536);
    o.alpha = args.number("alpha", 0, 0, 1e6);
    o.slices = args.text("slices", "");
    o.rslora = args.choice("rslora", 0, {"false", "true"}) == 1;
    o.dropout = args.number("dropout", 0, 0, 0.999);
    args.finish("rank, alpha, slices, rslora, dropout");
    nn::Module* linear =
        place && !o.slices.empty() ? place->qkv : &target;  // "blocks.*.attn: lora(slices=qv)" means its qkv
    if (dynamic_cast<nn::Conv*>(linear)) return once(*linear).attach<ConvLora>("lora", o);
    return once(*linear).attach<Lora>("lora", o);
  }
  if (item.action == "residual_adapter") {
    ResidualAdapterOptions o;
    o.scale = args.number("scale", o.scale, -1e3, 1e3);
    args.finish("scale");
    return once(target).attach<ResidualAdapter>("residual_adapter", o);
  }
  detail::fail("spec: unknown action \"", item.action, "\"; known: ", kActions);
}

}  // namespace

std::vector<SpecItem> parse_spec(std::string_view text) {
  std::vector<SpecItem> items;
  for (const auto part : split(text, ';')) {
    if (part.empty()) continue;
    const Method* method = find_method(part);
    if (!method) {
      items.push_back(parse_item(part));
      continue;
    }
    for (const auto& item : parse_spec(method->spec)) items.push_back(item);
  }
  CAPO_CHECK(!items.empty(), "spec: is empty; give \"pattern: action\" or a named method (", method_names(), ")");
  return items;
}

std::string to_string(const std::vector<SpecItem>& items) {
  std::string out;
  for (const auto& item : items) {
    out += cat(out.empty() ? "" : "; ", item.pattern, ": ", item.action);
    for (std::size_t i = 0; i < item.args.size(); ++i)
      out += cat(i ? ", " : "(", item.args[i].first, "=", item.args[i].second, i + 1 == item.args.size() ? ")" : "");
  }
  return out;
}

std::vector<Tuner*> apply_spec(nn::Module& model, std::string_view spec) {
  model.set_trainable(false);
  const auto items = parse_spec(spec);
  std::vector<Tuner*> attached;
  try {
    for (const auto& item : items) {
      if (item.action == "train") {
        CAPO_CHECK(item.args.empty(), "spec: train takes no arguments, got \"", to_string({item}), "\"");
        if (!names_kind(item.pattern)) nn::unfreeze(model, item.pattern);  // may name single parameters
        else
          for (nn::Module* m : select(model, item.pattern)) m->set_trainable(true);
        continue;
      }
      for (nn::Module* m : select(model, item.pattern)) attached.push_back(&attach(*m, item));
    }
  } catch (...) {
    for (Tuner* t : attached) t->target().detach(t->name());
    model.set_trainable(false);
    throw;
  }
  return attached;
}

std::vector<Tuner*> tuners_of(nn::Module& model) {
  std::vector<Tuner*> found;
  for (nn::Module* m : model.modules())
    if (auto* t = dynamic_cast<Tuner*>(m)) found.push_back(t);
  return found;
}

void merge_tuners(nn::Module& model) {
  for (Tuner* t : tuners_of(model)) t->merge();
}
void unmerge_tuners(nn::Module& model) {
  auto all = tuners_of(model);
  for (auto t = all.rbegin(); t != all.rend(); ++t)
    if ((*t)->merged()) (*t)->unmerge();
}
void detach_tuners(nn::Module& model) {
  unmerge_tuners(model);
  for (Tuner* t : tuners_of(model)) t->target().detach(t->name());
}

}  // namespace capo::tuners
