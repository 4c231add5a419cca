// Where one unit of attention finds keys and values, and its scratch memory.
#pragma once

#include "kernels.h"
#include "packed_rows.h"
#include "simd.h"

namespace OPSIN_ISA {

using opsin::AttentionShape;
using opsin::AttentionUnit;
using opsin::kAttentionRows;
using opsin::kKeptBlocks;
using opsin::kKeyBlock;

constexpr int64_t kNoSlot = INT64_MAX;  // of a key whose block was given back: nobody sees it

// Scratch of one unit; every part starts on 64 bytes.
struct Scratch {
  uint16_t* keys;    // (64, dim)
  uint16_t* turned;  // kKeptBlocks of 64 keys, see turn_keys
  uint16_t* values;  // (value_dim / 16, 32 pairs, 16, 2) with tiles, else kKeptBlocks: pack_lanes
  uint16_t* query;   // (tiles, dim / 32, 16 pairs, 16, 2) with tiles, else (rows, dim) floats
  float* scores;     // (tiles, 64, 16) with tiles, else (rows, 64)
  uint16_t* weights; // (tiles, 16, 64)
  uint16_t* rows;    // (64, value_dim): values read from quantised rows, or padded with zeros
  float* part;       // (rows, value_dim) of the current segment
  uint16_t* zero;    // (dim)
  bool* made;        // (kKeptBlocks, 2) whether a block's keys and values are as above
};

OPSIN_INLINE int padded(int dim) { return (dim + 31) / 32 * 32; }

static Scratch carve(uint8_t* p, int dim, int value_dim) {
  Scratch s;
  const int widest = dim > value_dim ? dim : value_dim;
  s.keys = (uint16_t*)p;
  p += kKeyBlock * dim * 2;
  s.turned = (uint16_t*)p;
  p += kKeptBlocks * kKeyBlock * dim * 4;
  s.values = (uint16_t*)p;
  p += kKeptBlocks * (kKeyBlock + 1) * value_dim * 4;
  s.rows = (uint16_t*)p;
  p += kKeyBlock * value_dim * 2;
  s.query = (uint16_t*)p;
  p += kAttentionRows * dim * 4;
  s.scores = (float*)p;
  p += kKeyBlock * kAttentionRows * 4;
  s.weights = (uint16_t*)p;
  p += kAttentionRows * kKeyBlock * 2;
  s.part = (float*)p;
  p += kAttentionRows * value_dim * 4;
  s.zero = (uint16_t*)p;
  __builtin_memset(s.zero, 0, widest * 2);
  p += (widest * 2 + 63) / 64 * 64;
  s.made = (bool*)p;
  return s;
}

OPSIN_INLINE int64_t slot(const AttentionShape* s, const int32_t* table, int key) {
  if (s->block_size == 0) return key;
  return (int64_t)table[key / s->block_size] * s->block_rows + key % s->block_size;
}

// The slot of a key where rows are quantised: -1 - slot of a quantised one.
static int64_t packed_slot(const AttentionShape* s, const AttentionUnit* u, int key) {
  const opsin::PackedShape& p = s->packed;
  const int late = key - p.early_blocks * p.early_size;
  const int size = late < 0 ? p.early_size : s->block_size;
  const int within = late < 0 ? key : late;
  const int block = u->block_table[within / size + (late < 0 ? 0 : p.early_blocks)];
  if (block < 0) return kNoSlot;
  const int64_t place = (int64_t)block * size + within % size;
  return late < 0 ? place : -1 - place;
}

// Slots of rows that are not quantised, as find_slots has them.
static void plain_slots(const AttentionShape* s, const int32_t* table, int from, int count,
                        int64_t* slots) {
  const bool whole = s->block_size % 16 == 0;  // sixteen neighbours lie in one block
  for (int k = 0; k < count; k += 16) {
    const int64_t first = slot(s, table, from + k);
    for (int i = 0; i < 16; i++) {
      slots[k + i] = whole || k + i >= count ? first + i : slot(s, table, from + k + i);
    }
  }
  for (int k = count; k < kKeyBlock; k++) slots[k] = slots[count - 1];
}

// Slots of the 64 keys from `from` on; past `count` the last one again.
static void find_slots(const AttentionShape* s, const AttentionUnit* u, int from, int count,
                       int64_t* slots) {
  if (s->packed.bits) {
    for (int k = 0; k < kKeyBlock; k++) {
      slots[k] = k < count ? packed_slot(s, u, from + k) : slots[count - 1];
    }
    return;
  }
  plain_slots(s, u->block_table, from, count, slots);
}

// 64 rows that are read after those at work: where those of a head lie apart, or in another block,
// the machine does not foresee them. `from` is null where there is nothing to fetch.
struct Ahead {
  const uint16_t* from;
  int64_t stride;
  const int64_t* slots;
  int dim;

  void fetch(int key) const {
    const uint16_t* row = from + slots[key] * stride;
    for (int d = 0; d < dim; d += 32) prefetch(row + d);
  }
  void fetch_all() const {
    for (int k = 0; from && k < kKeyBlock; k++) fetch(k);
  }
};

struct AheadBoth {
  Ahead keys, values;
};

// Of the unit at work, whose keys are at `slots`.
static AheadBoth ahead_of(const AttentionShape* s, const AttentionUnit* u, const int64_t* slots) {
  return {{u->keys, s->key_stride, slots, s->head_dim},
          {u->values, s->value_stride, slots, s->value_dim}};
}

static void prefetch_packed(const AttentionShape* s, const AttentionUnit* u,
                            const int64_t* slots) {
  const int bytes = s->head_dim * s->packed.bits / 8;
  for (int k = 0; k < kKeyBlock; k++) {
    if (slots[k] >= 0) continue;
    const int64_t slot = -1 - slots[k];
    for (int d = 0; d < bytes; d += 64) {
      prefetch(u->key_codes + slot * s->packed.code_stride + d);
      prefetch(u->value_codes + slot * s->packed.code_stride + d);
    }
    prefetch(u->key_scales + slot * s->packed.scale_stride);
    prefetch(u->value_scales + slot * s->packed.scale_stride);
  }
}

// The row of one key, plain or quantised, or zeros where there is none: (padded dim).
static void expand_row(const AttentionShape* s, int64_t slot, const uint16_t* plain, int64_t stride,
                       const uint8_t* codes, const uint16_t* scales, uint16_t* out) {
  const int dim = s->head_dim;
  if (slot == kNoSlot) {
    __builtin_memset(out, 0, 2 * padded(dim));
    return;
  }
  if (slot >= 0) {
    __builtin_memcpy(out, plain + slot * stride, 2 * dim);
  } else {
    unpack_row(codes + (-1 - slot) * s->packed.code_stride,
               scales + (-1 - slot) * s->packed.scale_stride, dim, s->packed.groups,
               s->packed.bits, out);
  }
  __builtin_memset(out + dim, 0, 2 * (padded(dim) - dim));
}

// Keys and values of 64 keys from a cache that quantises, into the scratch.
static void expand(const AttentionShape* s, const AttentionUnit* u, const Scratch* scratch,
                   const int64_t* slots, int count) {
  const int dim = padded(s->head_dim);
  for (int k = 0; k < kKeyBlock; k++) {
    const int64_t slot = k < count ? slots[k] : kNoSlot;
    expand_row(s, slot, u->keys, s->key_stride, u->key_codes, u->key_scales,
               scratch->keys + k * dim);
    expand_row(s, slot, u->values, s->value_stride, u->value_codes, u->value_scales,
               scratch->rows + k * dim);
  }
}

// The first that the unit after this one reads; slots is room for where.
static AheadBoth ahead_of_next(const AttentionShape* s, const AttentionUnit* u, int64_t* slots) {
  const int left = u->next_keys ? u->next_num_keys - u->next_from : 0;
  if (left <= 0) return AheadBoth{};
  plain_slots(s, u->next_table, u->next_from, left < kKeyBlock ? left : kKeyBlock, slots);
  return {{u->next_keys, s->key_stride, slots, s->head_dim},
          {u->next_values, s->value_stride, slots, s->value_dim}};
}

// Keys or values side by side, padded with zeros: (wanted, padded dim).
static void copy_rows(const uint16_t* from, int64_t stride, int own_dim, uint16_t* out,
                      const int64_t* slots, int count, int wanted) {
  const int dim = padded(own_dim), whole = own_dim / 32 * 32;
  alignas(64) uint16_t tail[32];
  __builtin_memset(tail, 0, sizeof tail);
  for (int key = 0; key < wanted; key++, out += dim) {
    const uint16_t* row = key < count ? from + slots[key] * stride : nullptr;
    if (!row) {
      __builtin_memset(out, 0, 2 * dim);
      continue;
    }
    for (int d = 0; d < whole; d += 32) vstore(out + d, vload(row + d));
    if (whole == dim) continue;
    __builtin_memcpy(tail, row + whole, 2 * (own_dim - whole));
    vstore(out + whole, vload(tail));
  }
}

}  // namespace OPSIN_ISA
