// One HTML page, complete in itself (no network, no scripts), that shows what the commands of this
// program found: plan files, and the JSON of `overlap`, `eval` and `bench`.
#pragma once

#include <string>
#include <vector>

#include "base/json.h"

namespace indexcache {

struct ReportPart {
  std::string where;  // names the document in errors and on the page
  Json json;
};

// What each document is follows from its fields. Errors: a document that is none of the four, or
// that lacks what its kind must have.
std::string report_html(const std::string& title, const std::vector<ReportPart>& parts);

}  // namespace indexcache
