// Known model shapes by name, for generated checkpoints, memory estimates and benchmarks. Random
// weights in these shapes cost what the named model costs.
//
//   tiny                8 layers, index_topk 256: seconds on a laptop
//   peer-a, peer-b      the shapes that other C++ engines were measured with
//   glm-4.7-flash-dsa   the 30B model of the IndexCache paper; its index heads are not published,
//   32 x 128 is assumed glm-5, glm-5.2, deepseek-v3.2
#pragma once

#include <string>
#include <vector>

#include "checkpoint/config.h"

namespace indexcache {

std::vector<std::string> shape_names();

// Error for an unknown name, listing the known ones.
ModelConfig named_shape(const std::string& name);

}  // namespace indexcache
