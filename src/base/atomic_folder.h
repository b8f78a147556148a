// A folder that appears under its name whole or not at all: filled under a temporary name beside
// it, then renamed. Destruction without commit() removes everything that was written.
//
// Errors: a path at which something exists already (a folder is never replaced or added to), and
// every failure of the system, with the path and its reason.
#pragma once

#include <string>

namespace indexcache {

class AtomicFolder {
 public:
  explicit AtomicFolder(const std::string& path);
  ~AtomicFolder();
  AtomicFolder(const AtomicFolder&) = delete;
  AtomicFolder& operator=(const AtomicFolder&) = delete;

  const std::string& temporary_path() const { return temporary_path_; }  // write here
  void commit();

 private:
  std::string path_;
  std::string temporary_path_;
  bool committed_ = false;
};

}  // namespace indexcache
