// What a reader of JSON files may rely on before it parses. (The parser is private to .cpp files: nlohmann/json.hpp.)
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace capo {

// Throws unless text is one JSON object, without a NUL byte, in which no object holds a key twice and values lie at
// most `depth` levels deep (1: in the object itself, 2: in its lists and objects as well). Errors begin with name, a
// file. A parser's tree would silently keep the last of two equal keys.
void check_json_object(std::string_view text, const std::string& name, int depth);

// The values of one JSON object (numbers, flags, texts, lists of whole numbers), taken key by key:
//
//   JsonFields f(text, "recipe.json");
//   f.take("epochs", epochs, 1, 1000);
//   f.finish();
//
// A key that is not there leaves its variable as it is. Values of another type or outside [low, high] throw, and
// finish() throws on a key that nobody asked for: "<name>: <key> must be .., got ..".
class JsonFields {
 public:
  JsonFields(std::string_view text, const std::string& name);
  ~JsonFields();
  JsonFields(const JsonFields&) = delete;
  JsonFields& operator=(const JsonFields&) = delete;

  void take(const char* key, bool& value);
  void take(const char* key, int& value, int low, int high);
  void take(const char* key, std::int64_t& value, std::int64_t low, std::int64_t high);
  void take(const char* key, double& value, double low, double high);
  void take(const char* key, std::string& value);
  void take(const char* key, std::vector<int>& value, int low, int high);  // 1 to 64 of them
  // One of the texts: its place among them.
  template <class Enum>
  void choose(const char* key, Enum& value, std::initializer_list<const char*> texts) {
    value = static_cast<Enum>(place(key, static_cast<int>(value), texts));
  }
  void finish() const;

 private:
  int place(const char* key, int value, std::initializer_list<const char*> texts);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace capo
