// How codes, and their scales and biases, are read from a packed block: kernels.h says how they lie.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace OPSIN_ISA {

struct Scales {
  F scale, bias;
};

// Of one group of sixteen rows, from its head; rows' floats lie at the block's start.
template <bool BYTES>
OPSIN_INLINE Scales load_scales(const uint8_t* head, const uint8_t* block, int kind, bool f16) {
  if (BYTES) {
    const F scale = mul(load_u8(head), load((const float*)block));
    const F step = set1(-1.0f / (float)(256 >> opsin::code_bits(kind)));
    return {scale, mul(mul(load_u8(head + 16), step), scale)};
  }
  const uint16_t* p = (const uint16_t*)head;
  if (f16) return {load_f16(p), load_f16(p + 16)};
  return {load_bf16(p), load_bf16(p + 16)};
}

// One step of codes: vectors of four columns each, of sixteen rows.
template <int KIND>
struct Codes;
template <>
struct Codes<opsin::kQ4> {
  static constexpr int kVectors = 2, kBytes = 64;
  static void read(const uint8_t* p, V* out) {
    const V v = vload(p);
    out[0] = low_nibbles(v);
    out[1] = high_nibbles(v);
  }
};
template <>
struct Codes<opsin::kQ6> {
  static constexpr int kVectors = 4, kBytes = 192;
  static void read(const uint8_t* p, V* out) {
    const V a = vload(p), b = vload(p + 64), c = vload(p + 128);
    out[0] = low_sixes(a);
    out[1] = low_sixes(b);
    out[2] = low_sixes(c);
    out[3] = high_sixes(a, b, c);
  }
};
template <>
struct Codes<opsin::kQ5> {
  static constexpr int kVectors = 8, kBytes = 320;
  static void read(const uint8_t* p, V* out) {
    V v[5];
#pragma GCC unroll 5
    for (int i = 0; i < 5; i++) {
      v[i] = vload(p + 64 * i);
      out[i] = low_fives(v[i]);
    }
    high_fives(v[0], v[1], v[2], v[3], v[4], out + 5);
  }
};
template <>
struct Codes<opsin::kQ8> {
  static constexpr int kVectors = 2, kBytes = 128;
  static void read(const uint8_t* p, V* out) {
    out[0] = vload(p);
    out[1] = vload(p + 64);
  }
};

// The code of a column among four, from where the first four of a group have it.
template <int KIND>
OPSIN_INLINE int code_at(const uint8_t* p, int fours) {
  constexpr int kBits = opsin::code_bits(KIND), kMask = (1 << kBits) - 1;
  constexpr int kParts = opsin::code_parts(KIND), kFours = kParts * 8 / kBits;
  p += fours / kFours * kParts * 64;
  fours %= kFours;
  if (fours < kParts) return p[fours * 64] & kMask;
  int above = 0;
  for (int i = 0; i < kParts; i++) above |= p[i * 64] >> kBits << i * (8 - kBits);
  return above >> (fours - kParts) * kBits & kMask;
}

}  // namespace OPSIN_ISA
