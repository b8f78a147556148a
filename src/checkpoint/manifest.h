// The SHA-256 sums of a model's files, as `sha256sum` writes and reads them: a bit that flipped in
// a weight is seen by nothing else.
//
// A model's files are all files below its folder, each named by its path there. Names that begin
// with a dot are left out, as are folders of such names: a download tool's caches.
//
// Errors: what cannot be read, is not a regular file or leads outside the folder (checkpoint.h); a
// name that cannot stand in a line.
#pragma once

#include <cstddef>
#include <string>

namespace indexcache {

// One line a file, "SUM  NAME", by name.
std::string sha256_manifest(const std::string& folder, int num_threads);

// Error that lists each file which differs from the manifest, is missing or surplus. A manifest
// that lies in the folder is not one of the files. Returns how many were compared.
size_t verify_manifest(const std::string& folder, const std::string& manifest_path,
                       int num_threads);

}  // namespace indexcache
