// Which instruction sets this CPU and operating system offer.
#pragma once

#include <string>

namespace indexcache {

struct CpuFeatures {
  bool avx2 = false;         // AVX2 + FMA + F16C
  bool avx512 = false;       // F, BW, DQ, VL
  bool avx512_bf16 = false;  // vdpbf16ps
  bool avx512_vnni = false;  // vpdpbusd
  bool amx_bf16 = false;     // tiles, used through oneDNN
};

const CpuFeatures& cpu_features();

std::string cpu_name();       // "AMD EPYC 9554"; "unknown CPU" where /proc does not say
std::string cpu_isa_names();  // "avx2 avx512 avx512_bf16", best last

}  // namespace indexcache
