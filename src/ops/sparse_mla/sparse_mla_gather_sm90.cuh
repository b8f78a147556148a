// The gathering half of sparse_mla_sm90.cu: what a block works on, where its tiles lie in shared
// memory, and the warpgroup that fills them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ops/kit/sm90_barrier.cuh"
#include "ops/kit/sm90_tma.cuh"
#include "ops/sparse_mla/sparse_mla_sm90.cuh"

namespace indexcache::sm90 {

constexpr int kTileKeys = 64;
constexpr int kPanels = kLatentRow / 64;  // of 64 bf16 = 128 bytes
constexpr int kValuePanels = kLatentDim / 64;
constexpr int kPanelBytes = kTileKeys * 128;
constexpr int kStages = 2;
constexpr int kRowBytes = kLatentRow * 2;
constexpr int kFp8RopeAt = kLatentDim + kLatentDim / 128 * 4;
constexpr int kFp8RowBytes = kFp8RopeAt + (kLatentRow - kLatentDim) * 2;
static_assert(kFp8RowBytes == 656);
constexpr int kNoKey = (1 << 30) - 1;  // no context reaches this position

enum class Mode { kSplitKeys, kSplitHeads };

template <int kN, Mode kMode>
struct Shared {
  static constexpr int kQueries = kMode == Mode::kSplitKeys ? 1 : 2;
  alignas(1024) uint8_t rows[kStages][kPanels][kPanelBytes];
  alignas(1024) uint8_t q[kQueries][kPanels][kN * 128];
  alignas(128) uint8_t weights[2][kTileKeys * kN * 2];  // P^T, see blocks_n_major
  alignas(16) float warp_values[2][4][kN];
  uint64_t full[kStages], empty[kStages];
};

struct Params {
  SparseMlaSm90Args args;
  int num_head_groups;  // each of kN heads, or 2 kN with kSplitHeads
  int num_parts;        // of a token's selection
  int part_keys;        // a multiple of the tile
  float* part_out;      // with several parts: [tokens][heads][parts][512], normalised
  float* part_lse;      // [tokens][heads][parts], log2 of the sum of 2^(score), -infinity if empty
  int num_items;
};

// What one block works on at a time: a list of keys, and who wants them.
struct Item {
  const int32_t* keys;  // positions
  const int32_t* pages;
  int num_keys;
  int token;
  int first_head;
  int part;

  __device__ __forceinline__ int num_tiles() const {
    return (num_keys + kTileKeys - 1) / kTileKeys;
  }
};

template <int kN, Mode kMode>
__device__ Item find_item(const Params& params, int index) {
  const SparseMlaSm90Args& args = params.args;
  Item item = {};
  item.part = index % params.num_parts;
  const int rest = index / params.num_parts;
  item.first_head = rest % params.num_head_groups * (kMode == Mode::kSplitHeads ? 2 * kN : kN);
  item.token = rest / params.num_head_groups;
  const int begin = item.part * params.part_keys;
  item.keys = args.positions + static_cast<int64_t>(item.token) * args.k + begin;
  item.num_keys = min(max(args.counts[item.token] - begin, 0), params.part_keys);
  int low = 0, high = args.num_seqs - 1;  // the last run that begins no later than the token
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (args.seqs[middle].token_begin <= item.token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  item.pages = args.seqs[low].pages;
  return item;
}

// --- bf16 rows ---

// Eight threads copy a row, 16 bytes each of every panel; a thread has four rows of a tile.
template <int kN, Mode kMode>
__device__ void gather_bf16(const Params& params, Shared<kN, kMode>& shared) {
  const SparseMlaSm90Args& args = params.args;
  const int thread = threadIdx.x % 128, unit = thread % 8, first_row = thread / 8;
  const uint32_t offset = first_row * 128 + ((unit ^ (first_row % 8)) << 4);
  RingPosition<kStages> at;

  // The keys of a tile are read while the tile before it is copied, so that finding its rows waits
  // for the page table only.
  int keys[4];
  const uint8_t* from[4];
  const auto read_keys = [&](const Item& item, int tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = tile * kTileKeys + first_row + 16 * i;
      keys[i] = key < item.num_keys ? item.keys[key] : kNoKey;
    }
  };
  const auto find_rows = [&](const Item& item) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      from[i] = nullptr;
      if (keys[i] == kNoKey) continue;
      from[i] = args.rows + item.pages[keys[i] / kPageTokens] * args.page_bytes +
                keys[i] % kPageTokens * kRowBytes + unit * 16;
    }
  };

  for (int index = blockIdx.x; index < params.num_items; index += gridDim.x) {
    const Item item = find_item<kN, kMode>(params, index);
    const int num_tiles = item.num_tiles();
    read_keys(item, 0);
    for (int tile = 0; tile < num_tiles; ++tile) {
      find_rows(item);
      read_keys(item, tile + 1);
      barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
      const uint32_t to = shared_address(shared.rows[at.stage]) + offset;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Rows that are not there become zeros: their weight is 0, and 0 times what lies there
        // could be NaN.
        const bool valid = from[i] != nullptr;
        const uint8_t* row = valid ? from[i] : args.rows;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          copy_16_or_zero(to + i * 16 * 128 + panel * kPanelBytes, row + panel * 128, valid);
        }
      }
      barrier_arrive_after_copies(&shared.full[at.stage]);
      at.advance();
    }
  }
}

// --- fp8 rows: 512 e4m3, four scales, 64 bf16 ---

// What a lane has of a row: elements 16 lane .. 16 lane + 15, and the scale of their block.
struct HeldPart {
  uint32_t bytes[4];
  float scale;
};

constexpr uint32_t kNoRow = 0xFFFFFFFFu;

// `row` counts units of 16 bytes. A row that is not there becomes zeros: its weight is 0, and 0
// times what lies there could be NaN. Volatile, so that loads stay ahead of the work on the rows
// before.
__device__ __forceinline__ void load_part(HeldPart& part, const uint8_t* rows, uint32_t row,
                                          int lane) {
  const uint8_t* from = rows + static_cast<uint64_t>(row) * 16;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %7, 0xFFFFFFFF;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, "
      "0;\nmov.b32 %4, 0;\n"
      "@p ld.global.nc.L2::128B.v4.b32 {%0, %1, %2, %3}, [%5];\n"
      "@p ld.global.nc.b32 %4, [%6];\n"
      "}\n"
      : "=&r"(part.bytes[0]), "=&r"(part.bytes[1]), "=&r"(part.bytes[2]), "=&r"(part.bytes[3]),
        "=&f"(part.scale)
      : "l"(from + lane * 16), "l"(from + kLatentDim + lane / 8 * 4), "r"(row));
}

// Eight e4m3 times their scale, as bf16.
__device__ __forceinline__ uint4 dequantised(uint32_t low, uint32_t high, float scale) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t four = i < 2 ? low : high;
    uint32_t halves;  // exact
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;"
        : "=r"(halves)
        : "h"(static_cast<uint16_t>(i % 2 == 0 ? four : four >> 16)));
    const float2 values = __half22float2(*reinterpret_cast<const __half2*>(&halves));
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values.x * scale, values.y * scale);
    pairs[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

__device__ __forceinline__ void store_16(uint32_t to, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

// The tiles of all items of this block, one after the other.
template <int kN, Mode kMode>
struct TileKeys {
  Item item = {};
  int next_index = static_cast<int>(blockIdx.x), tile = -1;

  // False after the last tile.
  __device__ __forceinline__ bool advance(const Params& params) {
    ++tile;
    while (tile >= item.num_tiles()) {
      if (next_index >= params.num_items) return false;
      item = find_item<kN, kMode>(params, next_index);
      next_index += static_cast<int>(gridDim.x);
      tile = 0;
    }
    return true;
  }
  __device__ __forceinline__ int key(int row) const {
    const int at = tile * kTileKeys + row;
    return at < item.num_keys ? item.keys[at] : kNoKey;
  }
};

// How many rows a warp has asked for and not yet written: with 16 it holds a whole tile of its own.
template <int kN>
constexpr int kRowsAhead = kN <= 24 ? 16 : 8;

// A warp has 16 rows of each tile. All its lanes load a row, 512 bytes side by side; each
// multiplies its 16 elements and stores them as two units of a panel. The rows kRowsAhead further,
// of the next tile too, are on their way meanwhile; page numbers are read one tile before that, and
// keys one before those. The bf16 part is copied as in gather_bf16.
//
// Threads arrive twice at `full`: for what they have stored, which the fence shows to the tensor
// cores, and when their copies have landed.
template <int kN, Mode kMode>
__device__ void gather_fp8(const Params& params, Shared<kN, kMode>& shared) {
  constexpr int kWarpRows = kTileKeys / 4, kAhead = kRowsAhead<kN>;
  static_assert(kWarpRows % kAhead == 0);
  const SparseMlaSm90Args& args = params.args;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const auto page_units = static_cast<uint32_t>(args.page_bytes / 16);
  // Lane l stores units 2 (l % 4) and 2 (l % 4) + 1 of panel l / 4. Lanes of odd panels begin with
  // the second one, so that eight neighbours, of two panels, use all banks.
  const bool swapped = lane / 4 % 2 == 1;
  const uint32_t offset =
      lane / 4 * kPanelBytes + warp * kWarpRows * 128 + ((2 * (lane % 4) + (swapped ? 1 : 0)) << 4);
  const uint32_t rope_offset = kValuePanels * kPanelBytes + warp * kWarpRows * 128;
  RingPosition<kStages> at;

  TileKeys<kN, kMode> keys;
  // Lanes l and l + 16 look for row l of the warp.
  const auto read_key = [&](bool& there, int& key, const int32_t*& pages) {
    there = keys.advance(params);
    key = keys.key(warp * kWarpRows + lane % kWarpRows);
    pages = keys.item.pages;
  };
  const auto page_of = [&](int key, const int32_t* pages) {
    return key == kNoKey ? 0 : pages[key / kPageTokens];
  };
  const auto row_of = [&](int key, int page) {
    return key == kNoKey ? kNoRow
                         : static_cast<uint32_t>(page) * page_units +
                               static_cast<uint32_t>(key % kPageTokens) * (kFp8RowBytes / 16);
  };

  bool there, there_next, there_second;
  int key, key_second;
  const int32_t* pages;
  const int32_t* pages_second;
  read_key(there, key, pages);
  uint32_t rows = row_of(key, page_of(key, pages));
  read_key(there_next, key, pages);
  uint32_t rows_next = row_of(key, page_of(key, pages));
  read_key(there_second, key_second, pages_second);

  HeldPart held[kAhead];
#pragma unroll
  for (int r = 0; r < kAhead; ++r)
    load_part(held[r], args.rows, __shfl_sync(0xFFFFFFFFu, rows, r), lane);

  while (there) {
    const int page_second = page_of(key_second, pages_second);
    bool there_third;
    int key_third;
    const int32_t* pages_third;
    read_key(there_third, key_third, pages_third);

    barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
    const uint32_t stage = shared_address(shared.rows[at.stage]);
#pragma unroll
    for (int i = 0; i < kWarpRows / 4; ++i) {
      const int r = 4 * i + lane / 8, unit = lane % 8;
      const uint32_t row = __shfl_sync(0xFFFFFFFFu, rows, r);
      const bool valid = row != kNoRow;
      copy_16_or_zero(
          stage + rope_offset + r * 128 + ((unit ^ (r % 8)) << 4),
          args.rows + (valid ? static_cast<uint64_t>(row) * 16 + kFp8RopeAt : 0) + unit * 16,
          valid);
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      HeldPart& part = held[r % kAhead];
      const uint32_t to = ((stage + offset) ^ ((r % 8) << 4)) + r * 128;
      store_16(to, dequantised(swapped ? part.bytes[2] : part.bytes[0],
                               swapped ? part.bytes[3] : part.bytes[1], part.scale));
      store_16(to ^ 16, dequantised(swapped ? part.bytes[0] : part.bytes[2],
                                    swapped ? part.bytes[1] : part.bytes[3], part.scale));
      const int ahead = r + kAhead;
      load_part(part, args.rows,
                __shfl_sync(0xFFFFFFFFu, ahead < kWarpRows ? rows : rows_next, ahead % kWarpRows),
                lane);
    }
    fence_async_proxy();
    barrier_arrive(&shared.full[at.stage]);
    barrier_arrive_after_copies(&shared.full[at.stage]);
    at.advance();

    rows = rows_next;
    rows_next = row_of(key_second, page_second);
    key_second = key_third;
    pages_second = pages_third;
    there = there_next;
    there_next = there_second;
    there_second = there_third;
  }
}

}  // namespace indexcache::sm90
