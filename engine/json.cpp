#include <capo/engine/error.h>
#include <capo/engine/json.h>

#include <nlohmann/json.hpp>

#include <cstdint>
#include <set>
#include <vector>

namespace capo {
namespace {

using Json = nlohmann::json;

// Receives the tokens, keeps the keys of the open objects.
class ObjectSax {
 public:
  ObjectSax(const std::string& name, int depth) : name_(name), most_(static_cast<std::size_t>(depth)) {}

  bool null() { return value("null"); }
  bool boolean(bool) { return value("boolean"); }
  bool number_integer(std::int64_t) { return value("number"); }
  bool number_unsigned(std::uint64_t) { return value("number"); }
  bool number_float(double, const std::string&) { return value("number"); }
  bool string(std::string&) { return value("string"); }
  bool binary(Json::binary_t&) { return value("binary"); }

  bool start_object(std::size_t) { return open(); }
  bool end_object() { return close(); }
  bool start_array(std::size_t) {
    value("array");
    return open();
  }
  bool end_array() { return close(); }

  bool key(std::string& k) {
    CAPO_CHECK(open_.back().insert(k).second, name_, ": duplicate key, got \"", k.substr(0, 200), "\" twice");
    return true;
  }

  bool parse_error(std::size_t, const std::string&, const Json::exception& e) {
    const std::string_view text = e.what();
    const auto at = text.find("] ");  // after "[json.exception.parse_error.101] "
    CAPO_CHECK(false, name_, ": must be valid JSON, got ", text.substr(at == text.npos ? 0 : at + 2).substr(0, 300));
    return false;
  }

 private:
  bool value(const char* type) {
    CAPO_CHECK(!open_.empty(), name_, ": must be a JSON object, got ", type);
    return true;
  }
  bool open() {
    CAPO_CHECK(open_.size() < most_, name_, ": JSON nesting is too deep, at most ", most_, " levels are accepted");
    open_.emplace_back();
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  const std::string& name_;
  std::size_t most_;
  std::vector<std::set<std::string>> open_;  // empty sets for lists
};

}  // namespace

void check_json_object(std::string_view text, const std::string& name, int depth) {
  CAPO_CHECK(text.find('\0') == text.npos, name, ": must be valid JSON, got a NUL byte");  // the parser stops at one
  ObjectSax sax(name, depth);
  Json::sax_parse(text.begin(), text.end(), &sax);
}

struct JsonFields::Impl {
  std::string name;
  Json object;
  std::set<std::string> taken = {};

  const Json* find(const char* key) {
    taken.insert(key);
    const auto it = object.find(key);
    return it == object.end() ? nullptr : &*it;
  }
  std::int64_t whole(const char* key, const Json& v, std::int64_t low, std::int64_t high) const {
    const bool fits = v.is_number_integer() && (!v.is_number_unsigned() || v.get<std::uint64_t>() <= INT64_MAX);
    CAPO_CHECK(fits && v.get<std::int64_t>() >= low && v.get<std::int64_t>() <= high, name, ": ", key,
               " must be a whole number in [", low, ", ", high, "], got ", v.dump().substr(0, 200));
    return v.get<std::int64_t>();
  }
};

JsonFields::JsonFields(std::string_view text, const std::string& name) {
  check_json_object(text, name, 2);
  impl_ = std::make_unique<Impl>(Impl{name, Json::parse(text)});
}
JsonFields::~JsonFields() = default;

void JsonFields::take(const char* key, bool& value) {
  const Json* v = impl_->find(key);
  if (!v) return;
  CAPO_CHECK(v->is_boolean(), impl_->name, ": ", key, " must be true or false, got ", v->dump().substr(0, 200));
  value = v->get<bool>();
}

void JsonFields::take(const char* key, std::int64_t& value, std::int64_t low, std::int64_t high) {
  if (const Json* v = impl_->find(key)) value = impl_->whole(key, *v, low, high);
}

void JsonFields::take(const char* key, int& value, int low, int high) {
  if (const Json* v = impl_->find(key)) value = static_cast<int>(impl_->whole(key, *v, low, high));
}

void JsonFields::take(const char* key, double& value, double low, double high) {
  const Json* v = impl_->find(key);
  if (!v) return;
  CAPO_CHECK(v->is_number() && v->get<double>() >= low && v->get<double>() <= high, impl_->name, ": ", key,
             " must be a number in [", low, ", ", high, "], got ", v->dump().substr(0, 200));
  value = v->get<double>();
}

void JsonFields::take(const char* key, std::string& value) {
  const Json* v = impl_->find(key);
  if (!v) return;
  CAPO_CHECK(v->is_string(), impl_->name, ": ", key, " must be a text, got ", v->dump().substr(0, 200));
  value = v->get<std::string>();
}

void JsonFields::take(const char* key, std::vector<int>& value, int low, int high) {
  const Json* v = impl_->find(key);
  if (!v) return;
  CAPO_CHECK(v->is_array() && !v->empty() && v->size() <= 64, impl_->name, ": ", key,
             " must be a list of 1 to 64 whole numbers, got ", v->dump().substr(0, 200));
  value.clear();
  for (const Json& x : *v) value.push_back(static_cast<int>(impl_->whole(key, x, low, high)));
}

int JsonFields::place(const char* key, int value, std::initializer_list<const char*> texts) {
  const Json* v = impl_->find(key);
  if (!v) return value;
  int i = 0;
  std::string all;
  for (const char* t : texts) {
    if (v->is_string() && *v == t) return i;
    all += cat(i++ ? ", " : "", t);
  }
  detail::fail(impl_->name, ": ", key, " must be one of ", all, ", got ", v->dump().substr(0, 200));
}

void JsonFields::finish() const {
  for (const auto& [key, v] : impl_->object.items())
    CAPO_CHECK(impl_->taken.count(key), impl_->name, ": unknown key \"", key.substr(0, 200), "\"");
}

}  // namespace capo
