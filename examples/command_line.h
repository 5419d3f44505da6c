// What the example programs share about their command lines.
#pragma once

#include <CLI/CLI.hpp>

namespace capo::examples {

// CLI::PositiveNumber's message prints the largest double in full.
inline CLI::Range at_least_one() { return CLI::Range(1, 1 << 30, "AT LEAST 1"); }

// Reads the command line; --help shows the defaults. Returns what main returns when that was all, 0 after --help and 2
// after a wrong one; -1: go on.
inline int read_command_line(CLI::App& app, int argc, char** argv) {
  try {
    app.parse(argc, argv);
    return -1;
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
}

}  // namespace capo::examples
