// What a reader of JSON files may rely on before it parses. (The parser is private to .cpp files: nlohmann/json.hpp.)
#pragma once

#include <string>
#include <string_view>

namespace capo {

// Throws unless text is one JSON object, without a NUL byte, in which no object holds a key twice and values lie at
// most `depth` levels deep (1: in the object itself, 2: in its lists and objects as well). Errors begin with name, a
// file. A parser's tree would silently keep the last of two equal keys.
void check_json_object(std::string_view text, const std::string& name, int depth);

}  // namespace capo
