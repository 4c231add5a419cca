// Norms, rotary positions, gated activations and the small helpers of sampling.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace OPSIN_ISA {

OPSIN_INLINE F load_tail(const float* x, int count, float fill) {
  float t[16];
  store(t, set1(fill));
  __builtin_memcpy(t, x, sizeof(float) * count);
  return load(t);
}

OPSIN_INLINE void store_tail(float* out, int count, F a) {
  float t[16];
  store(t, a);
  __builtin_memcpy(out, t, sizeof(float) * count);
}

// Calls body(offset, count) for runs of sixteen and then the rest.
#define OPSIN_RUNS(i, count, n) \
  for (int i = 0, count = 16; i < (n) && (count = (n) - i < 16 ? (n) - i : 16); i += 16)

OPSIN_INLINE F load_run(const float* x, int count, float fill) {
  return count == 16 ? load(x) : load_tail(x, count, fill);
}

OPSIN_INLINE void store_run(float* out, int count, F a) {
  if (count == 16) {
    store(out, a);
  } else {
    store_tail(out, count, a);
  }
}

static void rms_norm(const float* x, const float* weight, float eps, int dim, float* out) {
  F sum = set1(0.0f);
  OPSIN_RUNS(i, count, dim) {
    F a = load_run(x + i, count, 0.0f);
    sum = fma(a, a, sum);
  }
  const F factor = set1(1.0f / __builtin_sqrtf(hsum(sum) / (float)dim + eps));
  OPSIN_RUNS(i, count, dim) {
    F a = mul(load_run(x + i, count, 0.0f), factor);
    if (weight) a = mul(a, load_run(weight + i, count, 0.0f));
    store_run(out + i, count, a);
  }
}

static void layer_norm(const float* x, const float* weight, const float* bias, float eps, int dim,
                       float* out) {
  F sum = set1(0.0f);
  OPSIN_RUNS(i, count, dim) sum = add(sum, load_run(x + i, count, 0.0f));
  const float mean = hsum(sum) / (float)dim;
  F square = set1(0.0f);
  OPSIN_RUNS(i, count, dim) {
    F a = sub(load_run(x + i, count, mean), set1(mean));
    square = fma(a, a, square);
  }
  const F factor = set1(1.0f / __builtin_sqrtf(hsum(square) / (float)dim + eps));
  OPSIN_RUNS(i, count, dim) {
    F a = mul(sub(load_run(x + i, count, 0.0f), set1(mean)), factor);
    if (weight) a = mul(a, load_run(weight + i, count, 0.0f));
    if (bias) a = add(a, load_run(bias + i, count, 0.0f));
    store_run(out + i, count, a);
  }
}

enum { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3, kRelu2 = 4, kQuickGelu = 5 };

// Abramowitz and Stegun 7.1.26, within 1.5e-7.
OPSIN_INLINE F erf(F x) {
  F a = max(x, sub(set1(0.0f), x));
  F t = div(set1(1.0f), fma(set1(0.3275911f), a, set1(1.0f)));
  F p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  F y = sub(set1(1.0f), mul(mul(p, t), exp(sub(set1(0.0f), mul(a, a)))));
  F sign = sub(set1(0.0f), y);
  // y where x >= 0, else -y
  return add(zero_below(y, x, 0.0f), sub(sign, zero_below(sign, x, 0.0f)));
}

OPSIN_INLINE F activation(int kind, F x) {
  switch (kind) {
    case kSilu: return mul(x, sigmoid(x));
    case kGeluTanh: {
      F inner = mul(x, fma(mul(x, x), set1(0.035677408136f), set1(0.7978845608028654f)));
      return mul(x, sigmoid(mul(set1(2.0f), inner)));
    }
    case kGelu: return mul(mul(x, set1(0.5f)), add(set1(1.0f), erf(mul(x, set1(0.70710678f)))));
    case kRelu: return max(x, set1(0.0f));
    case kRelu2: {
      F r = max(x, set1(0.0f));
      return mul(r, r);
    }
    default: return mul(x, sigmoid(mul(x, set1(1.702f))));
  }
}

static void activate(int kind, const float* gate, const float* up, int n, float* out) {
  OPSIN_RUNS(i, count, n) {
    F a = activation(kind, load_run(gate + i, count, 0.0f));
    if (up) a = mul(a, load_run(up + i, count, 0.0f));
    store_run(out + i, count, a);
  }
}

constexpr int kRowsAhead = 4;  // of results, whose lines are fetched before they are written

// One row of one block, `columns` of it.
OPSIN_INLINE void emit_run(const opsin::Emit& e, F a, int64_t at, int columns) {
  if (e.accumulate) {
    float* out = (float*)e.out + at;
    store_run(out, columns, fma(a, set1(e.scale), load_run(out, columns, 0.0f)));
    return;
  }
  a = mul(a, set1(e.scale));
  if (!e.bf16) {
    store_run((float*)e.out + at, columns, a);
  } else if (columns == 16) {
    store_bf16((uint16_t*)e.out + at, a);
  } else {
    uint16_t half[16];
    store_bf16(half, a);
    __builtin_memcpy((uint16_t*)e.out + at, half, 2 * columns);
  }
}

// Row by row, so that what is written at once lies together; the rows lie far apart, and their
// lines are asked for beforehand.
template <int KIND>
static void emit_rows(const opsin::Emit* from) {
  const opsin::Emit e = *from;  // which no row that is written can change
  for (int r = 0; r < e.count; r++) {
    for (int b = 0; b < e.blocks; b++) {
      const int64_t later = (r + kRowsAhead) * e.stride + 16 * b;
      if (r + kRowsAhead < e.count) {
        __builtin_prefetch(e.bf16 ? (void*)((uint16_t*)e.out + later) : (float*)e.out + later, 1);
      }
      const int64_t slot = (int64_t)(b * e.slot_rows + r) * 16;
      const int left = e.columns - 16 * b;
      F a = add(load(e.tile + slot), e.bias ? load(e.bias + b * e.bias_step) : set1(0.0f));
      if (KIND >= 0) a = activation(KIND, a);
      if (e.second) {
        const F bias = e.second_bias ? load(e.second_bias + b * e.bias_step) : set1(0.0f);
        a = mul(a, add(load(e.second + slot), bias));
      }
      emit_run(e, a, r * e.stride + 16 * b, left < 16 ? left : 16);
    }
  }
}

static void emit(const opsin::Emit* e) {
  switch (e->activation) {
    case -1: return emit_rows<-1>(e);
    case kSilu: return emit_rows<kSilu>(e);
    case kGeluTanh: return emit_rows<kGeluTanh>(e);
    case kGelu: return emit_rows<kGelu>(e);
    case kRelu: return emit_rows<kRelu>(e);
    case kRelu2: return emit_rows<kRelu2>(e);
    default: return emit_rows<kQuickGelu>(e);
  }
}

// Rotates the first rotary_dim of one head; cos and sin hold rotary_dim / 2 values.
static void rope(float* x, const float* cos, const float* sin, int rotary_dim, int interleaved) {
  const int half = rotary_dim / 2;
  if (interleaved) {
    for (int i = 0; i < half; i++) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
  OPSIN_RUNS(i, count, half) {
    F a = load_run(x + i, count, 0.0f), b = load_run(x + half + i, count, 0.0f);
    F c = load_run(cos + i, count, 0.0f), s = load_run(sin + i, count, 0.0f);
    store_run(x + i, count, sub(mul(a, c), mul(b, s)));
    store_run(x + half + i, count, add(mul(b, c), mul(a, s)));
  }
}

static void to_bf16(const float* x, int n, uint16_t* out) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store_bf16(out + i, load(x + i));
  for (; i < n; i++) out[i] = f32_to_bf16(x[i]);
}

static void from_bf16(const uint16_t* x, int n, float* out) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, load_bf16(x + i));
  for (; i < n; i++) out[i] = bf16_to_f32(x[i]);
}

static void axpy(const float* x, float scale, int n, float* out) {
  OPSIN_RUNS(i, count, n) {
    F a = fma(load_run(x + i, count, 0.0f), set1(scale), load_run(out + i, count, 0.0f));
    store_run(out + i, count, a);
  }
}

// The first largest; a NaN is larger than any number, as it is to torch and NumPy.
static int64_t argmax(const float* x, int64_t n) {
  constexpr int kRun = 256;  // only one run is looked through for the place
  const F lowest = set1(-__builtin_inff());
  float top = -__builtin_inff();
  int64_t at = 0;
  for (int64_t i = 0; i < n; i += kRun) {
    const int count = n - i < kRun ? (int)(n - i) : kRun;
    int odd = 0;
    for (int j = 0; j < count; j++) odd |= x[i + j] != x[i + j];
    if (odd) {
      while (x[i] == x[i]) i++;
      return i;
    }
    F best = lowest;
    for (int j = 0; j < count; j += 16) {
      const int left = count - j;
      best = max(left < 16 ? load_run(x + i + j, left, -__builtin_inff()) : load(x + i + j), best);
    }
    const float most = hmax(best);
    if (most > top) {
      top = most;
      at = i;
    }
  }
  while (at < n && x[at] != top) at++;
  return n > 0 ? at : -1;
}

// softmax(x / temperature); returns the logarithm of the sum of e^(x / temperature).
static double softmax(const float* x, int64_t n, float temperature, float* out) {
  if (n <= 0) return 0.0;
  const int64_t at = argmax(x, n);
  const F top = set1(x[at]), inverse = set1(1.0f / temperature);
  double sum = 0.0;
  for (int64_t i = 0; i < n; i += 16) {
    const int count = n - i < 16 ? (int)(n - i) : 16;
    F a = exp(mul(sub(load_run(x + i, count, -__builtin_inff()), top), inverse));
    sum += (double)hsum(a);
    store_run(out + i, count, a);
  }
  const F factor = set1((float)(1.0 / sum));
  for (int64_t i = 0; i < n; i += 16) {
    const int count = n - i < 16 ? (int)(n - i) : 16;
    store_run(out + i, count, mul(load_run(out + i, count, 0.0f), factor));
  }
  return (double)x[at] / (double)temperature + __builtin_log(sum);
}

// Reads memory as fast as it comes: the yardstick of the products at one row.
static float read_sum(const uint8_t* p, int64_t bytes) {
  I a = izero(), b = izero(), c = izero(), d = izero();
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    prefetch(p + i + 4096);
    prefetch(p + i + 4160);
    prefetch(p + i + 4224);
    prefetch(p + i + 4288);
    a = imax(a, iload((const int32_t*)(p + i)));
    b = imax(b, iload((const int32_t*)(p + i + 64)));
    c = imax(c, iload((const int32_t*)(p + i + 128)));
    d = imax(d, iload((const int32_t*)(p + i + 192)));
  }
  return (float)ihmax(imax(imax(a, b), imax(c, d)));
}

}  // namespace OPSIN_ISA
