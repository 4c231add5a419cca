// Rows of keys and values at 8 or 4 bits: how they are made, and read back as bfloat16.
//
// A group of a row has a scale and a bias, in turn, as bfloat16; at 4 bits byte i of a group holds
// codes i and i + size / 2. The twin is opsin/kernels/packed_rows.py, which gives the same bits.
#pragma once

#include "simd.h"

namespace OPSIN_ISA {

static void pack_row(const float* x, int dim, int groups, int bits, uint8_t* codes,
                     uint16_t* scales) {
  const int size = dim / groups, half = size / 2;
  const float levels = bits == 8 ? 255.0f : 15.0f;
  for (int g = 0; g < groups; g++, x += size, codes += size * bits / 8) {
    float low = bf16_to_f32(f32_to_bf16(x[0])), high = low;
    for (int i = 1; i < size; i++) {
      const float v = bf16_to_f32(f32_to_bf16(x[i]));
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
    const uint16_t stored = f32_to_bf16((high - low) / levels);
    const float scale = bf16_to_f32(stored);
    scales[2 * g] = stored;
    scales[2 * g + 1] = f32_to_bf16(low);
    const float divisor = scale > 0.0f ? scale : 1.0f;
    const auto code = [&](int i) -> uint8_t {
      float c = __builtin_rintf((bf16_to_f32(f32_to_bf16(x[i])) - low) / divisor);
      c = c < levels ? c : levels;
      return c > 0.0f ? (uint8_t)c : 0;  // also where c is not a number
    };
    if (bits == 8) {
      for (int i = 0; i < size; i++) codes[i] = code(i);
    } else {
      for (int i = 0; i < half; i++) codes[i] = (uint8_t)(code(i) | code(i + half) << 4);
    }
  }
}

OPSIN_INLINE void unpack_run(const uint8_t* codes, int count, int shift, int mask, float scale,
                             float bias, uint16_t* out) {
  int i = 0;
  for (; i + 16 <= count; i += 16) {
    alignas(64) int32_t wide[16];
    for (int j = 0; j < 16; j++) wide[j] = codes[i + j] >> shift & mask;
    store_bf16(out + i, add(mul(from_int(iload(wide)), set1(scale)), set1(bias)));
  }
  for (; i < count; i++) out[i] = f32_to_bf16((float)(codes[i] >> shift & mask) * scale + bias);
}

static void unpack_row(const uint8_t* codes, const uint16_t* scales, int dim, int groups, int bits,
                       uint16_t* out) {
  const int size = dim / groups, half = size / 2;
  for (int g = 0; g < groups; g++, out += size, codes += size * bits / 8) {
    const float scale = bf16_to_f32(scales[2 * g]), bias = bf16_to_f32(scales[2 * g + 1]);
    if (bits == 8) {
      unpack_run(codes, size, 0, 255, scale, bias, out);
    } else {
      unpack_run(codes, half, 0, 15, scale, bias, out);
      unpack_run(codes, half, 4, 15, scale, bias, out + half);
    }
  }
}

}  // namespace OPSIN_ISA
