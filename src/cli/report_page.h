// Pages that commands write, and the command line that goes with a result.
#pragma once

#include <string>
#include <vector>

#include "analysis/report.h"

namespace indexcache {

// How this process was called, quoted for a shell.
std::string command_line();

void write_report(const std::string& path, const std::string& title,
                  const std::vector<ReportPart>& parts);

}  // namespace indexcache
