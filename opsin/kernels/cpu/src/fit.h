// Scales, biases and codes of quantised groups, of sixteen rows side by side: lane = row.
#pragma once

#include "simd.h"

namespace OPSIN_ISA {

OPSIN_INLINE F magnitude(F x) { return max(x, sub(set1(0.0f), x)); }

// Where fresh is smaller than best, chosen becomes other, lane by lane.
OPSIN_INLINE F smaller_of(F best, F fresh, F chosen, F other) {
  const F yes = zero_below(set1(1.0f), sub(best, fresh), 0.0f);
  return fma(yes, sub(other, chosen), chosen);
}

// Eight bits: symmetric about code 128. tile (columns, 16), scale and bias (16)
static void fit_eight(const float* tile, int columns, float* scale, float* bias) {
  F most = set1(0.0f);
  for (int c = 0; c < columns; c++) most = max(most, magnitude(load(tile + 16 * c)));
  const F s = div(most, set1(127.0f));
  store(scale, s);
  store(bias, mul(s, set1(-128.0f)));
}

// Codes up to top: the scale and bias of the smallest squared error among those that least squares
// finds from several starts, each a part of the group's range; many codes lose nothing by one. Zero
// stays within what codes can say.
static void fit_few(const float* tile, int columns, float top, float* scale, float* bias) {
  F low = set1(0.0f), high = set1(0.0f), sum = set1(0.0f), squares = set1(0.0f);
  for (int c = 0; c < columns; c++) {
    const F w = load(tile + 16 * c);
    low = min(low, w);
    high = max(high, w);
    sum = add(sum, w);
    squares = fma(w, w, squares);
  }
  const F range = mul(sub(high, low), set1(1.0f / top)), count = set1((float)columns);
  F best = set1(3.0e38f), best_scale = range, best_bias = low;
  const int starts = top < 31.0f ? 3 : 1;
  for (int start = 0; start < starts; start++) {
    const F part = set1(1.0f - 0.1f * (float)start);
    F s = mul(range, part), b = mul(low, part);
    for (int turn = 0; turn < 3; turn++) {
      const F inverse = div(set1(1.0f), max(s, set1(1e-30f)));
      F x = set1(0.0f), xx = set1(0.0f), xy = set1(0.0f);
      for (int c = 0; c < columns; c++) {
        const F w = load(tile + 16 * c);
        F q = round_even(mul(sub(w, b), inverse));
        q = min(max(q, set1(0.0f)), set1(top));
        x = add(x, q);
        xx = fma(q, q, xx);
        xy = fma(q, w, xy);
      }
      // The scale and bias that fit these codes best; a group of one code keeps its scale.
      const F all = mul(count, xx), spare = sub(all, mul(x, x));
      const F fitted = div(sub(mul(count, xy), mul(x, sum)), max(spare, set1(1e-30f)));
      s = smaller_of(spare, mul(all, set1(1e-5f)), s, fitted);
      b = div(sub(sum, mul(s, x)), count);
      // sum of (w - s q - b)^2
      const F two = set1(2.0f);
      const F crossed = sub(mul(two, xy), fma(s, xx, mul(two, mul(b, x))));
      const F shifted = sub(mul(two, sum), mul(b, count));
      const F beyond = max(b, sub(set1(0.0f), fma(set1(top), s, b)));
      const F error = max(sub(sub(squares, mul(s, crossed)), mul(b, shifted)),
                          zero_below(set1(3.0e38f), beyond, 1e-37f));
      best_scale = smaller_of(best, error, best_scale, s);
      best_bias = smaller_of(best, error, best_bias, b);
      best = min(best, error);
    }
  }
  store(scale, best_scale);
  store(bias, best_bias);
}

// codes (columns, 16), from 0 to top, of weights code * scale + bias
static void affine_codes(const float* tile, int columns, const float* scale, const float* bias,
                         float top, uint8_t* codes) {
  float inverse[16];
  for (int r = 0; r < 16; r++) inverse[r] = scale[r] > 0.0f ? 1.0f / scale[r] : 0.0f;
  const F by = load(inverse), b = load(bias), middle = set1(128.0f);
  for (int c = 0; c < columns; c++) {
    const F q = round_even(mul(sub(load(tile + 16 * c), b), by));
    const F kept = min(max(q, set1(0.0f)), set1(top));
    store_i8((int8_t*)codes + 16 * c, round_int(sub(kept, middle)));
  }
  for (int i = 0; i < 16 * columns; i++) codes[i] ^= 0x80;
}

}  // namespace OPSIN_ISA
