// Selections of neighbouring tokens, joined. Internal to sparse MLA on Hopper.
#pragma once

#include "ops/sparse_mla/sparse_mla_sm90.cuh"

namespace indexcache::sm90 {

// The low bits of an entry are the slot of a row: 64 * page of the pool + row of the page.
inline constexpr int kSlotMask = (1 << 30) - 1;

// Tokens 2p and 2p + 1 become slots[p * 2k ...] with counts[p] entries. Bit 30 is set if the first
// token wants the row, bit 31 if the second does. Ascending positions; of tokens in different
// sequences first all of the one, then all of the other. Pools have up to 2^24 pages.
cudaError_t join_selections(const SparseMlaSm90Args& args, int32_t* slots, int32_t* counts,
                            cudaStream_t stream);

}  // namespace indexcache::sm90
