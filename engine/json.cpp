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

}  // namespace capo
