// The table of one build; a file per instruction set defines OPSIN_ISA and includes this.
#pragma once

#include "matmul.h"
#include "elementwise.h"
#include "attention.h"
#include "fit.h"

namespace OPSIN_ISA {

// Runs the arithmetic of one kind of product on registers or tiles alone; returns operations.
static double peak(int kind, int64_t iterations) {
#if defined(__AMX_INT8__)
  alignas(64) static uint8_t zeros[1024];
  configure(16, 16);
  TILE_LOAD(4, zeros, 64);
  TILE_LOAD(5, zeros, 64);
  for (int64_t i = 0; i < iterations; i++) {
    if (kind == opsin::kBf16) {
      _tile_dpbf16ps(0, 5, 4);
      _tile_dpbf16ps(1, 5, 4);
      _tile_dpbf16ps(2, 5, 4);
      _tile_dpbf16ps(3, 5, 4);
    } else {
      _tile_dpbsud(0, 5, 4);
      _tile_dpbsud(1, 5, 4);
      _tile_dpbsud(2, 5, 4);
      _tile_dpbsud(3, 5, 4);
    }
  }
  _tile_release();
  return (double)iterations * 4 * 2 * 16 * 16 * (kind == opsin::kBf16 ? 32 : 64);
#else
  constexpr int kChains = 12;  // two units times the longest latency there is
  F f[kChains];
  I s[kChains];
  for (int i = 0; i < kChains; i++) {
    f[i] = set1(0.0f);
    s[i] = izero();
  }
  const V x = bcast4("\1\2\3\4");
  for (int64_t n = 0; n < iterations; n++) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) {
      if (kind == opsin::kBf16) {
        f[i] = dot_bf16(f[i], x, x);
      } else {
        s[i] = dot_u7(s[i], x, x);
      }
    }
  }
  volatile float sink = 0.0f;
  for (int i = 0; i < kChains; i++) sink = sink + hsum(f[i]) + (float)ihsum(s[i]);
  return (double)iterations * kChains * 2 * (kind == opsin::kBf16 ? 32 : 64);
#endif
}

static const opsin::Kernels table = {
    OPSIN_ISA_NAME, quantize, narrow,  widen, lay_lanes, kPaired, gather, pack, unpack_one, tile,    pair,     matmul_begin, matmul_end,     kPanel,   kPanelBf16, kCodeRows, kByLaneFrom, kTiledFrom, rms_norm,
    layer_norm,     emit,     activate, rope,   to_bf16,      from_bf16,      axpy,     argmax,
    softmax,        attention, pack_row, dequantize_row,  read_sum,     peak,
    fit_eight,      fit_few,  affine_codes, rotate,
};

}  // namespace OPSIN_ISA
