// AMX tiles: how they are configured, loaded and stored.
#pragma once

#include "simd.h"

#if defined(__AMX_INT8__)

namespace OPSIN_ISA {

// The compiler's own intrinsics do not say that a tile load reads memory, or how much of it.
#define TILE_LOAD(tile, base, stride)                                             \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile                             \
                   :                                                              \
                   : "r"((const void*)(base)), "r"((int64_t)(stride))             \
                   : "memory")
#define TILE_STORE(tile, base, stride)                                            \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)"                         \
                   :                                                              \
                   : "r"((void*)(base)), "r"((int64_t)(stride))                   \
                   : "memory")

struct TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
};

// Sixteen rows of weights times up to sixteen of activations. Tiles 0-3 sums, 4-7 factors.
//
// Whole numbers: tile 4 weights (depth, 16, 4), tiles 5-7 activations (rows, depth, 4), sums
// (rows, 16); depth: 4-byte steps of one multiplication. In pairs tile 5 holds weights, too, and
// everything is 16 x 64 bytes.
static void configure(int depth, int rows) {
  TileConfig c;
  __builtin_memset(&c, 0, sizeof c);
  c.palette = 1;
  for (int i = 0; i < 8; i++) {
    c.rows[i] = i == 4 ? depth : rows;
    c.colsb[i] = i > 4 ? depth * 4 : 64;
  }
  __asm__ volatile("ldtilecfg (%0)" : : "r"(&c) : "memory");
}

// bfloat16: tiles 4 and 5 weights (16, 32), tiles 6 and 7 activations (16, rows, 2), sums
// (16, rows), rows up to 16.
static void configure_bf16(int rows) {
  TileConfig c;
  __builtin_memset(&c, 0, sizeof c);
  c.palette = 1;
  for (int i = 0; i < 8; i++) {
    c.rows[i] = 16;
    c.colsb[i] = i == 4 || i == 5 ? 64 : rows * 4;
  }
  __asm__ volatile("ldtilecfg (%0)" : : "r"(&c) : "memory");
}

}  // namespace OPSIN_ISA

#endif
