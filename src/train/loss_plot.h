// The curves of a training run as one HTML page without scripts: language loss, indexer loss and
// learning rate over steps, held-out losses beside them.
#pragma once

#include <string>

namespace indexcache {

// Reads log.csv (train/train_log.h) and writes the page. A log without rows gives a page without
// curves.
void write_loss_plot(const std::string& log_path, const std::string& html_path,
                     const std::string& title);

}  // namespace indexcache
