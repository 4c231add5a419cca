// Columns mixed in blocks by a Hadamard matrix, which is its own inverse: what one column alone has
// of size is spread over its block, so that rounding to few bits costs the others nothing.
#pragma once

#include "simd.h"

namespace OPSIN_ISA {

// Row i, column j: minus where i and j share an odd number of bits.
struct Signs {
  alignas(64) float of[16][16];
  constexpr Signs() : of() {
    for (int i = 0; i < 16; i++) {
      for (int j = 0; j < 16; j++) {
        const int b = i & j, pairs = b ^ (b >> 2), odd = pairs ^ (pairs >> 1);
        of[i][j] = odd & 1 ? -1.0f : 1.0f;
      }
    }
  }
};

static constexpr Signs kSigns;

// x (k) in blocks of 64 or 32 columns, of which k is a multiple; out may be x. Whole vectors are
// mixed first, then the sixteen columns of each, in one order on every instruction set.
static void rotate(const float* x, int k, int block, float* out) {
  const F norm = set1(block == 64 ? 0.125f : 0.17677669529663687f);
  const int vectors = block / 16;
  for (int at = 0; at < k; at += block) {
    alignas(64) float mixed[64];
    const F a = load(x + at), b = load(x + at + 16);
    const F plus = add(a, b), minus = sub(a, b);
    if (block == 64) {
      const F c = load(x + at + 32), d = load(x + at + 48);
      const F third = add(c, d), fourth = sub(c, d);
      store(mixed, add(plus, third));
      store(mixed + 16, add(minus, fourth));
      store(mixed + 32, sub(plus, third));
      store(mixed + 48, sub(minus, fourth));
    } else {
      store(mixed, plus);
      store(mixed + 16, minus);
      store(mixed + 32, set1(0.0f));
      store(mixed + 48, set1(0.0f));
    }
    F sum[4];
    for (int v = 0; v < 4; v++) sum[v] = set1(mixed[16 * v]);
    for (int j = 1; j < 16; j++) {
      const F sign = load(kSigns.of[j]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) sum[v] = fma(set1(mixed[16 * v + j]), sign, sum[v]);
    }
    for (int v = 0; v < vectors; v++) store(out + at + 16 * v, mul(sum[v], norm));
  }
}

}  // namespace OPSIN_ISA
