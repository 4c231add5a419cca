// Products of bfloat16 weights that lie row by row, as checkpoints store them.
//
// Sums keep one order over the columns, whatever rows of activations are beside each other.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "tiles.h"

namespace OPSIN_ISA {

using opsin::Activations;
using opsin::kLaneRows;
using opsin::kPackedBytes;
using opsin::kPackedColumns;
using opsin::Matrix;

// Of weights: bytes between their use and their prefetch, and how near lines are fetched (3: to the
// first cache, 2: to the second). As is fastest where a build runs: the one with BF16 instructions
// and no tiles is for AMD's processors.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
constexpr int kAhead = 8192, kNearness = 3;
#else
constexpr int kAhead = 2048, kNearness = 2;
#endif

// Fetches `lines` cache lines at p.
OPSIN_INLINE void prefetch_lines(const uint8_t* p, int lines) {
  for (int i = 0; i < lines; i++) __builtin_prefetch(p + 64 * i, 0, kNearness);
}

// Bytes between rows of bfloat16.
OPSIN_INLINE int64_t plain_stride(const Matrix* m) {
  return m->kind == opsin::kBf13 ? 2 * (int64_t)m->padded_k : m->row_bytes;
}

// A row of a bf13 matrix: packed, or bfloat16 as it is.
struct Row {
  const uint8_t* at;
  int16_t least;
  bool is_plain;
};

OPSIN_INLINE Row row_of(const Matrix* m, int b, int r) {
  const uint8_t* block = m->data + b * m->block_bytes;
  Row row = {block + 64 + r * m->row_bytes, ((const int16_t*)block)[r], false};
  if (row.least == opsin::kElsewhere) {
    uint32_t number;
    __builtin_memcpy(&number, row.at, 4);
    if (number < (uint32_t)m->elsewhere) {  // else it is damaged, and any numbers will do
      row.at = m->data + m->bytes + number * plain_stride(m);
      row.is_plain = true;
    }
  }
  return row;
}

static void unpack(const Matrix* m, const Row& row, uint8_t* out) {
  if (row.is_plain) {
    __builtin_memcpy(out, row.at, plain_stride(m));
    return;
  }
  const uint8_t* w = row.at;
  for (int c = 0; c < m->padded_k; c += kPackedColumns, w += kPackedBytes, out += 128) {
    V part[2];
    prefetch_lines(w + kAhead, 2);
    unpack64(w, row.least, part);
    vstore(out, part[0]);
    vstore(out + 64, part[1]);
  }
}

static void unpack_one(const Matrix* m, int row, uint8_t* out) {
  unpack(m, row_of(m, row / 16, row % 16), out);
}

// A row of bfloat16 in thirteen bits; false if it cannot be.
static bool pack(const uint16_t* w, int k, uint8_t* out, int16_t* least) {
  int16_t top = 0, bottom = 255;  // of exponents, but for 0
  for (int c = 0; c < k; c++) {
    const int16_t e = (int16_t)(w[c] >> 7 & 255), low = e ? e : 255;
    top = e > top ? e : top;
    bottom = low < bottom ? low : bottom;
  }
  const int16_t base = (int16_t)(top - 31);
  if (bottom <= base) return false;
  *least = (int16_t)(base * 128);
  for (int from = 0; from < k; from += kPackedColumns, out += kPackedBytes) {
    uint8_t own[64], code[64];
    for (int c = 0; c < 64; c++) {
      const uint16_t x = w[from + c];
      const int16_t e = (int16_t)(x >> 7 & 255);
      own[c] = (uint8_t)((x >> 8 & 0x80) | (x & 0x7f));
      code[c] = (uint8_t)(e ? e - base : 0);
    }
    for (int i = 0; i < 4; i++) {
      __builtin_memcpy(out + 16 * i, own + 8 * i, 8);
      __builtin_memcpy(out + 16 * i + 8, own + 32 + 8 * i, 8);
    }
    for (int c = 0; c < 32; c++) out[64 + c] = (uint8_t)((code[c] & 15) | code[32 + c] << 4);
    for (int i = 0; i < 8; i++) {
      uint64_t eight;
      __builtin_memcpy(&eight, code + 8 * i, 8);
      eight = eight >> 4 & 0x0101010101010101u;  // each to the bit of its column in the last byte
      out[96 + i] = (uint8_t)(eight * 0x0102040810204080u >> 56);
    }
  }
  return true;
}

// The rows of a block: where they lie as bfloat16, or unpacked to `plain`.
static const uint8_t* plain_rows(const Matrix* m, int b, uint8_t* plain) {
  if (m->kind == opsin::kBf16) return m->at[b];
  for (int r = 0; r < 16; r++) unpack(m, row_of(m, b, r), plain + r * plain_stride(m));
  return plain;
}

#if defined(__AMX_BF16__)

// Activations lie in panels of up to sixteen rows, pairs of columns beside each other:
// (k / 2, rows, 2), so that weights as they are stored are a tile's other factor.
constexpr bool kPaired = true;
constexpr int kPanelBf16 = 64, kByLaneFrom = 0;
constexpr auto widen = nullptr;
constexpr auto lay_lanes = nullptr;

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
static void gather(const Matrix* m, int b, uint8_t* out, uint8_t* plain) {
  const int steps = m->padded_k / 32;
  const uint8_t* rows = plain_rows(m, b, plain);
  for (int r = 0; r < 16; r++) {
    const uint8_t* w = rows + r * plain_stride(m);
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
    if (next) prefetch_lines(next + 1024 * s, 16);
    TILE_LOAD(4, w + step * s, stride);
    TILE_LOAD(6, panel + 16 * width * s, width);
    _tile_dpbf16ps(0, 4, 6);
  }
  TILE_STORE(0, sums, width);
  turn(sums, rows, out);
}

static void tile_bf16(const Matrix* m, int b, const Activations* x, int row, int count,
                      float* out, uint8_t* scratch) {
  const int steps = m->padded_k / 32, rows = x->panel_rows;
  const uint8_t* w = plain_rows(m, b, scratch);
  const uint8_t* next = b + 1 < m->blocks && m->at ? m->at[b + 1] : nullptr;
  for (int done = 0; done < count; done += rows) {
    const uint8_t* panel = x->data + (row + done) / rows * x->stride;
    const auto multiply = m->step_bytes == 64 ? multiply_bf16<false> : multiply_bf16<true>;
    multiply(w, plain_stride(m), panel, rows, steps, done ? nullptr : next, out + 16 * done);
  }
}

// Two blocks with more than sixteen rows of activations: what is loaded serves two products.
static void pair_bf16(const Matrix* m, int b, const Activations* x, int row, int count, float* out,
                      float* second, uint8_t* scratch) {
  alignas(64) float sums[4 * 256];
  const int steps = m->padded_k / 32;
  const int64_t stride = plain_stride(m), step = m->step_bytes;
  const uint8_t* w = plain_rows(m, b, scratch);
  const uint8_t* other = plain_rows(m, b + 1, scratch + 16 * stride);
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

// Rows of activations: that are multiplied together, up to which a block of bf13 is not unpacked
// first, and from which there are lanes. Rows of weights that are read side by side: processors that
// run the build with BF16 instructions read one row after the other faster than several.
#if defined(__AVX512BF16__)
constexpr int rows_at_once(int rows) { return rows == 1 ? 1 : 4; }
constexpr int kFewRows = 4, kPackedRows = 8, kByLaneFrom = 40;
#elif defined(__AVX512F__)
constexpr int rows_at_once(int) { return 4; }
constexpr int kFewRows = 4, kPackedRows = 2, kByLaneFrom = 40;
#else
constexpr int rows_at_once(int) { return 2; }
constexpr int kFewRows = 2, kPackedRows = 2, kByLaneFrom = 12;
#endif
constexpr int kPanelBf16 = 96;
constexpr int64_t kStep = 64 * kPairSteps;  // bytes of 32 columns of an activation

#if defined(__AVX512BF16__)

constexpr auto widen = nullptr;

// Adds 32 columns of a row of weights times MT activations.
template <int MT>
OPSIN_INLINE void add_columns(V weight, const uint8_t* x, int64_t x_stride, F (&acc)[MT]) {
#pragma GCC unroll 8
  for (int t = 0; t < MT; t++) acc[t] = dot_bf16(acc[t], weight, vload(x + t * x_stride));
}

#else

// Bfloat16 as floats, of each 32 the odd ones first, which dot_bf16 adds first.
static void widen(const uint16_t* x, int padded_k, float* out) {
  for (int c = 0; c < padded_k; c += 32) {
    const V halves = vload(x + c);
    store(out + c, odd_bf16(halves));
    store(out + c + 16, even_bf16(halves));
  }
}

template <int MT>
OPSIN_INLINE void add_columns(V weight, const uint8_t* x, int64_t x_stride, F (&acc)[MT]) {
  const F odd = odd_bf16(weight), even = even_bf16(weight);
#pragma GCC unroll 8
  for (int t = 0; t < MT; t++) {
    const float* factor = (const float*)(x + t * x_stride);
    acc[t] = fma(even, load(factor + 16), fma(odd, load(factor), acc[t]));
  }
}

#endif

// Where lanes lie of those that reduce16 adds up as quarters: in the order in which it adds.
constexpr int kOrder[4] = {0, 2, 1, 3};

// The first W of sixteen rows lane by lane: (16, steps, W, 4 bytes). The last step of a pair is its
// first element, which dot_bf16 adds last.
template <int W>
OPSIN_INLINE void to_lanes(const uint16_t* const* rows, int padded_k, uint8_t* out) {
  const int64_t steps = (int64_t)padded_k / 32 * kPairSteps;
  for (int s = 0; s < padded_k / 32; s++, out += 4 * W * kPairSteps) {
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; quarter++) {
      V pairs[4];
      transpose_quads([&](int i) { return rows[i] + 32 * s + 8 * quarter; }, pairs);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        uint8_t* lane = out + 4 * W * steps * (4 * quarter + kOrder[i]);
        Step parts[kPairSteps];
        split(pairs[i], parts);
        for (int j = 0; j < kPairSteps; j++) {
          keep_first<W>(lane + 4 * W * j, parts[kPairSteps - 1 - j]);
        }
      }
    }
  }
}

// Activations of many rows, (kLaneRows, padded_k), to (16, steps, kLaneRows, 4 bytes).
static void lay_lanes(const uint16_t* x, int padded_k, uint8_t* out) {
  const uint16_t* rows[16];
  for (int r = 0; r < 16; r++) rows[r] = x + (r < kLaneRows ? r : 0) * padded_k;
  to_lanes<kLaneRows>(rows, padded_k, out);
}

// The same of the sixteen rows of a block.
static void gather(const Matrix* m, int b, uint8_t* out, uint8_t* plain) {
  const uint8_t* block = plain_rows(m, b, plain);
  const uint16_t* rows[16];
  for (int r = 0; r < 16; r++) rows[r] = (const uint16_t*)(block + r * plain_stride(m));
  to_lanes<16>(rows, m->padded_k, out);
}

// R rows of a block times MT rows of activations: sums (MT, 16).
template <int R, int MT>
static void multiply_bf16(const uint8_t* w, int64_t stride, const uint8_t* x, int64_t x_stride,
                          int steps, F* sums) {
  F acc[R][MT];
  for (int r = 0; r < R; r++) {
    for (int t = 0; t < MT; t++) acc[r][t] = set1(0.0f);
  }
  const uint8_t* next = w + R * stride;
  for (int s = 0; s < steps; s++) {
    prefetch_lines(next + 64 * R * s, R);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      add_columns<MT>(vload(w + r * stride + 64 * s), x + kStep * s, x_stride, acc[r]);
    }
  }
  for (int r = 0; r < R; r++) {
    for (int t = 0; t < MT; t++) sums[16 * t + r] = acc[r][t];
  }
}

// The same of one packed row.
template <int MT>
static void multiply_packed(const Row& row, const uint8_t* x, int64_t x_stride, int columns,
                            F* sums) {
  F acc[MT];
  for (int t = 0; t < MT; t++) acc[t] = set1(0.0f);
  const uint8_t* w = row.at;
  for (int c = 0; c < columns; c += kPackedColumns, w += kPackedBytes, x += 2 * kStep) {
    V part[2];
    prefetch_lines(w + kAhead, 2);
    unpack64(w, row.least, part);
    add_columns<MT>(part[0], x, x_stride, acc);
    add_columns<MT>(part[1], x + kStep, x_stride, acc);
  }
  for (int t = 0; t < MT; t++) sums[16 * t] = acc[t];
}

// Sixteen rows of bfloat16, `stride` apart, times MT rows of activations.
template <int MT>
static void few_bf16(const uint8_t* rows, int64_t stride, int steps, const uint8_t* x,
                     int64_t x_stride, float* out) {
  F sums[16 * MT];
  constexpr int kTogether = rows_at_once(MT);
  for (int r = 0; r < 16; r += kTogether) {
    multiply_bf16<kTogether, MT>(rows + r * stride, stride, x, x_stride, steps, sums + r);
  }
  for (int t = 0; t < MT; t++) store(out + 16 * t, reduce16(sums + 16 * t));
}

// A block of bf13 times MT rows of activations.
template <int MT>
static void few_packed(const Matrix* m, int b, const uint8_t* x, int64_t x_stride, float* out) {
  F sums[16 * MT];
  for (int r = 0; r < 16; r++) {
    const Row row = row_of(m, b, r);
    if (row.is_plain) {
      multiply_bf16<1, MT>(row.at, 0, x, x_stride, m->padded_k / 32, sums + r);
    } else {
      multiply_packed<MT>(row, x, x_stride, m->padded_k, sums + r);
    }
  }
  for (int t = 0; t < MT; t++) store(out + 16 * t, reduce16(sums + 16 * t));
}

static void tile_packed(const Matrix* m, int b, const uint8_t* x, int64_t x_stride, int count,
                        float* out) {
  switch (count) {
#if defined(__AVX512BF16__)
    case 8: few_packed<8>(m, b, x, x_stride, out); break;
    case 7: few_packed<7>(m, b, x, x_stride, out); break;
    case 6: few_packed<6>(m, b, x, x_stride, out); break;
    case 5: few_packed<5>(m, b, x, x_stride, out); break;
    case 4: few_packed<4>(m, b, x, x_stride, out); break;
    case 3: few_packed<3>(m, b, x, x_stride, out); break;
#endif
    case 2: few_packed<2>(m, b, x, x_stride, out); break;
    default: few_packed<1>(m, b, x, x_stride, out); break;
  }
}

// Many rows: one after the other, the sixteen lanes that sums of few rows have, as vectors of
// sixteen rows of weights. Those are laid out (and widened, where bfloat16 is) once for all rows of
// activations, which lie lane by lane too. Every sum is added up as of few rows.
#if defined(__AVX512F__)
constexpr int kWideRows = 12;
#elif defined(__AVX2__)
constexpr int kWideRows = 6;
#else
constexpr int kWideRows = 2;
#endif
constexpr int kStripRows = 48;  // that meet a lane of weights while it is in the first cache
static_assert(kStripRows % kLaneRows == 0 && kPanelBf16 % kLaneRows == 0);  // panels stay whole

// Sums of one, two, four and eight lanes that wait for as many others.
template <int B>
struct Waiting {
  F sums[4][kStripRows][B];
};

// One lane of the sums of R rows of activations and B blocks that lie `block` bytes apart.
template <int B, int R>
OPSIN_INLINE void lane_sums(const uint8_t* w, int64_t block, const uint8_t* x, int64_t steps,
                            F (&acc)[R][B]) {
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int n = 0; n < B; n++) acc[r][n] = set1(0.0f);
  }
  constexpr int kWide = 4 * kLaneRows;
  const uint8_t* next = x + 16 * steps * kWide;  // the same lane of the panel after this one
  for (const uint8_t* end = x + steps * kWide; x < end; w += 64) {
    Step weight[B];
    prefetch(next);
#pragma GCC unroll 2
    for (int n = 0; n < B; n++) weight[n] = lanes_at(w + block * n);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
      for (int n = 0; n < B; n++) acc[r][n] = plus(acc[r][n], weight[n], x + 4 * r);
    }
    x += kWide;
    next += kWide;
  }
}

// One lane of rows [row, row + R) of a strip, added to those before it as reduce16 does: lanes
// (0, 2), (1, 3), both pairs, and so with fours and eights.
template <int B, int R>
static void add_lane(const uint8_t* w, int64_t block, const uint8_t* x, int64_t steps, int lane,
                     int row, Waiting<B>* waiting, float* const* out) {
  F acc[R][B];
  lane_sums<B, R>(w, block, x, steps, acc);
  int level = 0;
  for (; lane >> level & 1; level++) {
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
      for (int n = 0; n < B; n++) acc[r][n] = add(waiting->sums[level][row + r][n], acc[r][n]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int n = 0; n < B; n++) {
      if (level < 4) {
        waiting->sums[level][row + r][n] = acc[r][n];
      } else {
        store(out[n] + 16 * (row + r), acc[r][n]);
      }
    }
  }
}

// `count` rows of activations from the beginning of a panel on times B gathered blocks; out: B of
// (count, 16).
template <int B>
static void strip_bf16(const uint8_t* w, int64_t block, const uint8_t* x, int64_t steps, int count,
                       float* const* out) {
  Waiting<B> waiting;
  constexpr int kWide = 4 * kLaneRows;
  for (int lane = 0; lane < 16; lane++) {
    int done = 0;
    const auto multiply = [&](int rows, auto kernel) {
      for (; done + rows <= count; done += rows) {
        const uint8_t* panel = x + done / kLaneRows * 16 * steps * kWide;
        kernel(w + 64 * steps * lane, block, panel + steps * kWide * lane + done % kLaneRows * 4,
               steps, lane, done, &waiting, out);
      }
    };
    multiply(kWideRows, add_lane<B, kWideRows>);
    if (kWideRows > 4) multiply(4, add_lane<B, 4>);
    multiply(1, add_lane<B, 1>);
  }
}

// Gathered blocks [b, b + B) times `count` rows of activations that lie lane by lane.
template <int B>
static void many_bf16(const Matrix* m, int b, const Activations* x, int row, int count,
                      float* const* out) {
  const uint8_t* w = m->at[b];
  const int64_t block = m->at[b + B - 1] - w, steps = (int64_t)m->padded_k / 32 * kPairSteps;
  for (int done = 0; done < count; done += kStripRows) {
    const uint8_t* panel = x->data + (row + done) / kLaneRows * x->stride;
    float* to[] = {out[0] + 16 * done, out[B - 1] + 16 * done};
    const int rows = count - done < kStripRows ? count - done : kStripRows;
    strip_bf16<B>(w, block, panel, steps, rows, to);
  }
}

static void tile_bf16(const Matrix* m, int b, const Activations* x, int row, int count,
                      float* out, uint8_t* scratch) {
  if (x->tiled) {
    many_bf16<1>(m, b, x, row, count, &out);
    return;
  }
  if (m->kind == opsin::kBf13 && count <= kPackedRows) {
    tile_packed(m, b, x->data + row * x->stride, x->stride, count, out);
    return;
  }
  const uint8_t* rows = plain_rows(m, b, scratch);
  const int64_t stride = plain_stride(m);
  const int steps = m->padded_k / 32;
  for (int done = 0; done < count; done += kFewRows) {
    const uint8_t* at = x->data + (row + done) * x->stride;
    float* to = out + 16 * done;
    switch (count - done < kFewRows ? count - done : kFewRows) {
#if defined(__AVX512F__)
      case 4: few_bf16<4>(rows, stride, steps, at, x->stride, to); break;
      case 3: few_bf16<3>(rows, stride, steps, at, x->stride, to); break;
#endif
      case 2: few_bf16<2>(rows, stride, steps, at, x->stride, to); break;
      default: few_bf16<1>(rows, stride, steps, at, x->stride, to); break;
    }
  }
}

static bool pair_bf16(const Matrix* m, int b, const Activations* x, int row, int count, float* out,
                      float* second, uint8_t*) {
#if defined(__AVX512F__)
  if (x->tiled) {
    float* const to[] = {out, second};
    many_bf16<2>(m, b, x, row, count, to);
    return true;
  }
#endif
  return false;
}

#endif

}  // namespace OPSIN_ISA
