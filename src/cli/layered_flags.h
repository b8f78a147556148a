// Flags that may also stand in the environment or in a file: the command line wins over the
// environment, the environment over the file, the file over the default.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace indexcache {

// Fills every option of `command` that was not given on the command line: from INDEXCACHE_NAME
// (--max-running is INDEXCACHE_MAX_RUNNING), else from the JSON object in `file` (key
// "max-running"; empty: no file). Values are checked as flags are. Error for a key that is no flag,
// with the nearest one.
void fill_from_environment_and_file(CLI::App* command, const std::string& file);

}  // namespace indexcache
