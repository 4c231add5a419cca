// Products of bfloat16 weights that lie row by row, as checkpoints store them.
//
// Sums keep one order over the columns, whatever rows of activations are beside each other.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "tiles.h"

namespace OPSIN_ISA {

using opsin::Activations;
using opsin::Matrix;

// Fetches `lines` cache lines at p to the second cache.
OPSIN_INLINE void prefetch_far(const uint8_t* p, int lines) {
  for (int i = 0; i < lines; i++) __builtin_prefetch(p + 64 * i, 0, 2);
}

#if defined(__AMX_BF16__)

// Activations lie in panels of up to sixteen rows, pairs of columns beside each other:
// (k / 2, rows, 2), so that weights as they are stored are a tile's other factor.
constexpr bool kPaired = true;
constexpr auto widen = nullptr;

// Sixteen sums a row, (16, columns), to (columns, 16).
static void turn(const float* sums, int columns, float* out) {
  if (columns < 16) {
    for (int r = 0; r < 16; r++) {
      for (int t = 0; t < columns; t++) out[16 * t + r] = sums[columns * r + t];
    }
    return;
  }
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(sums + 16 * i);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d p = _mm512_castps_pd(b[i]), q = _mm512_castps_pd(b[i + 1]);
    const __m512d r = _mm512_castps_pd(b[i + 2]), s = _mm512_castps_pd(b[i + 3]);
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, r));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, r));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(q, s));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(q, s));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_ps(out + 16 * i, _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_ps(out + 16 * (i + 8), _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
    _mm512_storeu_ps(out + 16 * (i + 4), _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88));
    _mm512_storeu_ps(out + 16 * (i + 12), _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd));
  }
}

// A block tile by tile: what lies at its rows' distances falls on few sets of the caches, and on two
// lines each where the file does not begin on one. Worth it where many panels pass by.
static void gather(const Matrix* m, int b, uint8_t* out) {
  const int steps = m->padded_k / 32;
  for (int r = 0; r < 16; r++) {
    const uint8_t* w = m->at[b] + r * m->row_bytes;
    for (int s = 0; s < steps; s++) vstore(out + 1024 * s + 64 * r, vload(w + 64 * s));
  }
}

// One block times one panel of `rows` activations; fetches the block at `next` meanwhile.
template <bool GATHERED>
static void multiply_bf16(const uint8_t* w, int64_t stride, const uint8_t* panel, int rows,
                          int steps, const uint8_t* next, float* out) {
  constexpr int64_t step = GATHERED ? 1024 : 64;
  alignas(64) float sums[256];
  const int64_t width = 4 * rows;
  _tile_zero(0);
  for (int s = 0; s < steps; s++) {
    if (next) prefetch_far(next + 1024 * s, 16);
    TILE_LOAD(4, w + step * s, stride);
    TILE_LOAD(6, panel + 16 * width * s, width);
    _tile_dpbf16ps(0, 4, 6);
  }
  TILE_STORE(0, sums, width);
  turn(sums, rows, out);
}

static void tile_bf16(const Matrix* m, int b, const Activations* x, int row, int count, float* out,
                      uint8_t*) {
  const int steps = m->padded_k / 32, rows = x->panel_rows;
  const uint8_t* next = b + 1 < m->blocks ? m->at[b + 1] : nullptr;
  for (int done = 0; done < count; done += rows) {
    const uint8_t* panel = x->data + (row + done) / rows * x->stride;
    const auto multiply = m->step_bytes == 64 ? multiply_bf16<false> : multiply_bf16<true>;
    multiply(m->at[b], m->row_bytes, panel, rows, steps, done ? nullptr : next, out + 16 * done);
  }
}

// Two blocks with more than sixteen rows of activations: what is loaded serves two products.
static void pair_bf16(const Matrix* m, int b, const Activations* x, int row, int count, float* out,
                      float* second) {
  alignas(64) float sums[4 * 256];
  const int steps = m->padded_k / 32;
  const int64_t stride = m->row_bytes, step = m->step_bytes;
  const uint8_t *w = m->at[b], *other = m->at[b + 1];
  for (int done = 0; done < count; done += 32) {
    const uint8_t* panel = x->data + (row + done) / 16 * x->stride;
    const uint8_t* next = panel + x->stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < steps; s++) {
      TILE_LOAD(4, w + step * s, stride);
      TILE_LOAD(6, panel + 1024 * s, 64);
      _tile_dpbf16ps(0, 4, 6);
      TILE_LOAD(5, other + step * s, stride);
      _tile_dpbf16ps(1, 5, 6);
      TILE_LOAD(7, next + 1024 * s, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    TILE_STORE(0, sums, 64);
    TILE_STORE(1, sums + 256, 64);
    TILE_STORE(2, sums + 512, 64);
    TILE_STORE(3, sums + 768, 64);
    turn(sums, 16, out + 16 * done);
    turn(sums + 256, 16, second + 16 * done);
    turn(sums + 512, 16, out + 16 * done + 256);
    turn(sums + 768, 16, second + 16 * done + 256);
  }
}

#else

constexpr bool kPaired = false;
static void gather(const Matrix*, int, uint8_t*) {}

#if defined(__AVX512BF16__)

constexpr int kRowsAtOnce = 4, kFewRows = 4;
constexpr int64_t kStep = 64;  // bytes of 32 columns of an activation
constexpr auto widen = nullptr;

// Adds 32 columns of R rows of weights times MT activations.
template <int R, int MT>
OPSIN_INLINE void add_columns(const uint8_t* w, int64_t stride, const uint8_t* x, int64_t x_stride,
                              F (&acc)[R][MT]) {
  V factor[MT];
#pragma GCC unroll 4
  for (int t = 0; t < MT; t++) factor[t] = vload(x + t * x_stride);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    const V weight = vload(w + r * stride);
#pragma GCC unroll 4
    for (int t = 0; t < MT; t++) acc[r][t] = dot_bf16(acc[r][t], weight, factor[t]);
  }
}

#else

#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 4, kFewRows = 4;
#else
constexpr int kRowsAtOnce = 2, kFewRows = 2;
#endif
constexpr int64_t kStep = 128;

// Bfloat16 as floats, of each 32 the odd ones first, which dot_bf16 adds first.
OPSIN_INLINE void widen32(const void* x, float* out) {
  const V halves = vload(x);
  store(out, odd_bf16(halves));
  store(out + 16, even_bf16(halves));
}

static void widen(const uint16_t* x, int padded_k, float* out) {
  for (int c = 0; c < padded_k; c += 32) widen32(x + c, out + c);
}

template <int R, int MT>
OPSIN_INLINE void add_columns(const uint8_t* w, int64_t stride, const uint8_t* x, int64_t x_stride,
                              F (&acc)[R][MT]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    const V weight = vload(w + r * stride);
    const F odd = odd_bf16(weight), even = even_bf16(weight);
#pragma GCC unroll 4
    for (int t = 0; t < MT; t++) {
      const float* factor = (const float*)(x + t * x_stride);
      acc[r][t] = fma(even, load(factor + 16), fma(odd, load(factor), acc[r][t]));
    }
  }
}

#endif

// Rows [first, first + kRowsAtOnce) of a block times MT rows of activations: sums (MT, 16).
template <int MT>
static void multiply_bf16(const uint8_t* w, int64_t stride, const uint8_t* x, int64_t x_stride,
                          int steps, F* sums) {
  F acc[kRowsAtOnce][MT];
  for (int r = 0; r < kRowsAtOnce; r++) {
    for (int t = 0; t < MT; t++) acc[r][t] = set1(0.0f);
  }
  const uint8_t* next = w + kRowsAtOnce * stride;
  for (int s = 0; s < steps; s++) {
    prefetch_far(next + 64 * kRowsAtOnce * s, kRowsAtOnce);
    add_columns<kRowsAtOnce, MT>(w + 64 * s, stride, x + kStep * s, x_stride, acc);
  }
  for (int r = 0; r < kRowsAtOnce; r++) {
    for (int t = 0; t < MT; t++) sums[16 * t + r] = acc[r][t];
  }
}

template <int MT>
static void few_bf16(const Matrix* m, int b, const uint8_t* x, int64_t x_stride, float* out) {
  F sums[16 * MT];
  for (int r = 0; r < 16; r += kRowsAtOnce) {
    multiply_bf16<MT>(m->at[b] + r * m->row_bytes, m->row_bytes, x, x_stride, m->padded_k / 32,
                      sums + r);
  }
  for (int t = 0; t < MT; t++) store(out + 16 * t, reduce16(sums + 16 * t));
}

#if !defined(__AVX512BF16__)

// Many rows: eight rows of weights are widened once for all of them, in runs of columns that stay
// in the first cache. Between runs the sixteen lanes of each sum lie in `lanes` (rows, 16, 16), so
// that every sum is added up as of few rows.
#if defined(__AVX512F__)
constexpr int kWideRows = 8, kWideAtOnce = 3;
#elif defined(__AVX2__)
constexpr int kWideRows = 4, kWideAtOnce = 3;
#else
constexpr int kWideRows = 2, kWideAtOnce = 2;
#endif
constexpr int kRunColumns = 768;
constexpr int kManyRows = 8;

// kWideRows rows of weights (8, kRunColumns) times MT rows of activations: some lanes of the sums.
template <int MT>
OPSIN_INLINE void wide_lanes(const float* w, const uint8_t* x, int64_t x_stride, int columns,
                             bool first, float* lanes) {
  Lanes acc[kWideRows][MT];
#pragma GCC unroll 8
  for (int r = 0; r < kWideRows; r++) {
#pragma GCC unroll 3
    for (int t = 0; t < MT; t++) {
      acc[r][t] = first ? Lanes{} : load_lanes(lanes + 256 * t + 16 * r);
    }
  }
  for (int c = 0; c < columns; c += 16) {
    Lanes factor[MT];
#pragma GCC unroll 3
    for (int t = 0; t < MT; t++) factor[t] = load_lanes((const float*)(x + t * x_stride) + c);
#pragma GCC unroll 8
    for (int r = 0; r < kWideRows; r++) {
      const Lanes weight = in_register(load_lanes(w + kRunColumns * r + c));
#pragma GCC unroll 3
      for (int t = 0; t < MT; t++) acc[r][t] = fma(weight, factor[t], acc[r][t]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kWideRows; r++) {
#pragma GCC unroll 3
    for (int t = 0; t < MT; t++) store(lanes + 256 * t + 16 * r, acc[r][t]);
  }
}

template <int MT>
static void wide_rows(const float* w, const uint8_t* x, int64_t x_stride, int columns, bool first,
                      float* lanes) {
  for (int i = 0; i < 16; i += kLanes) {
    wide_lanes<MT>(w + i, x + 4 * i, x_stride, columns, first, lanes + i);
  }
}

// Rows [row, row + 8) of a block and a run of columns.
static void wide_run(const Matrix* m, int b, int row, int from, const uint8_t* x, int64_t x_stride,
                     int count, float* weights, float* lanes) {
  const int left = m->padded_k - from, columns = left < kRunColumns ? left : kRunColumns;
  for (int r = 0; r < 8; r++) {
    const uint8_t* w = m->at[b] + (row + r) * m->row_bytes + 2 * from;
    for (int c = 0; c < columns; c += 32) widen32(w + 2 * c, weights + kRunColumns * r + c);
  }
  for (int t = 0; t < count; t += kWideAtOnce) {
    const uint8_t* rows = x + t * x_stride + 4 * from;
    for (int r = 0; r < 8; r += kWideRows) {
      const float* w = weights + kRunColumns * r;
      float* to = lanes + 256 * t + 16 * (row + r);
      switch (count - t < kWideAtOnce ? count - t : kWideAtOnce) {
        case 1: wide_rows<1>(w, rows, x_stride, columns, from == 0, to); break;
        case 2: wide_rows<2>(w, rows, x_stride, columns, from == 0, to); break;
        default: wide_rows<kWideAtOnce>(w, rows, x_stride, columns, from == 0, to);
      }
    }
  }
}

static void many_bf16(const Matrix* m, int b, const uint8_t* x, int64_t x_stride, int count,
                      float* out, uint8_t* scratch) {
  float* weights = (float*)scratch;
  float* lanes = weights + 8 * kRunColumns;
  for (int row = 0; row < 16; row += 8) {
    for (int from = 0; from < m->padded_k; from += kRunColumns) {
      wide_run(m, b, row, from, x, x_stride, count, weights, lanes);
    }
  }
  F sums[16];
  for (int t = 0; t < count; t++) {
    for (int r = 0; r < 16; r++) sums[r] = load(lanes + 256 * t + 16 * r);
    store(out + 16 * t, reduce16(sums));
  }
}

#endif

static void tile_bf16(const Matrix* m, int b, const Activations* x, int row, int count, float* out,
                      uint8_t* scratch) {
  const uint8_t* at = x->data + row * x->stride;
#if !defined(__AVX512BF16__)
  if (count >= kManyRows) {
    many_bf16(m, b, at, x->stride, count, out, scratch);
    return;
  }
#endif
  int done = 0;
  for (; done + kFewRows <= count; done += kFewRows) {
    few_bf16<kFewRows>(m, b, at + done * x->stride, x->stride, out + 16 * done);
  }
  for (; done < count; done++) few_bf16<1>(m, b, at + done * x->stride, x->stride, out + 16 * done);
}

#endif

}  // namespace OPSIN_ISA
