// Columns mixed in blocks by a Hadamard matrix, which is its own inverse: what one column alone has
// of size is spread over its block, so that rounding to few bits costs the others nothing.
#pragma once

#include "simd.h"

namespace OPSIN_ISA {

OPSIN_INLINE F mix_lanes(F x) {
  return butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(x))));
}

// x (k) in blocks of 64 or 32 columns, of which k is a multiple; out may be x. Whole vectors are
// mixed first, then the sixteen columns of each, in one order on every instruction set.
static void rotate(const float* x, int k, int block, float* out) {
  const F norm = set1(block == 64 ? 0.125f : 0.17677669529663687f);
  for (int at = 0; at < k; at += block) {
    const F a = load(x + at), b = load(x + at + 16);
    F mixed[4] = {add(a, b), sub(a, b)};
    if (block == 64) {
      const F c = load(x + at + 32), d = load(x + at + 48);
      const F plus = mixed[0], minus = mixed[1], third = add(c, d), fourth = sub(c, d);
      mixed[0] = add(plus, third);
      mixed[1] = add(minus, fourth);
      mixed[2] = sub(plus, third);
      mixed[3] = sub(minus, fourth);
    }
    for (int v = 0; v < block / 16; v++) store(out + at + 16 * v, mul(mix_lanes(mixed[v]), norm));
  }
}

}  // namespace OPSIN_ISA
