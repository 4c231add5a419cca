// Attention of a few query rows over paged or contiguous keys and values, by online softmax.
//
// Keys are taken in blocks of 64 at fixed positions and merged in segments of 512, so that a
// row's result is the same bits in a decode step, in any chunk and beside any other rows.
#pragma once

#include "attention_keys.h"
#include "elementwise.h"
#include "kernels.h"
#include "simd.h"
#if !defined(__AMX_BF16__)
#include "attention_rows.h"
#endif

namespace OPSIN_ISA {

using opsin::kSegment;

struct Running {
  float top[kAttentionRows], sum[kAttentionRows];        // of the current segment
  float all_top[kAttentionRows], all_sum[kAttentionRows];  // of those before it
};

constexpr float kLog2E = 1.44269504088896341f;

// What a score is multiplied by to be an exponent of two; capped scores are scaled already.
OPSIN_INLINE float exponent_unit(const AttentionShape* s) {
  return s->softcap > 0.0f ? kLog2E : s->scale * kLog2E;
}

OPSIN_INLINE F cap_scores(const AttentionShape* s, F raw) {
  return mul(tanh(div(mul(raw, set1(s->scale)), set1(s->softcap))), set1(s->softcap));
}

// Adds a finished segment to what came before it.
static void merge(const AttentionUnit* u, const Scratch* scratch, Running* run, int dim) {
  alignas(64) float before[kAttentionRows], now[kAttentionRows], seen[kAttentionRows];
  const F none = set1(-__builtin_inff()), least = set1(-3.0e38f);
  for (int r = 0; r < u->rows; r += 16) {
    const F old = load(run->all_top + r), own = load(run->top + r);
    const F top = max(old, own), base = max(top, least);  // -inf less -inf would not be a number
    const F kept = exp2(sub(old, base)), added = exp2(sub(own, base));
    store(before + r, kept);
    store(now + r, added);
    store(seen + r, own);
    store(run->all_sum + r, fma(load(run->sum + r), added, mul(load(run->all_sum + r), kept)));
    store(run->all_top + r, top);
    store(run->top + r, none);
    store(run->sum + r, set1(0.0f));
  }
  for (int r = 0; r < u->rows; r++) {
    if (seen[r] == -__builtin_inff()) continue;
    float* out = u->out + r * dim;
    float* part = scratch->part + r * dim;
    const F kept = set1(before[r]), added = set1(now[r]);
    for (int d = 0; d < dim; d += 16) {
      store(out + d, fma(load(part + d), added, mul(load(out + d), kept)));
      store(part + d, set1(0.0f));
    }
  }
}

#if defined(__AMX_BF16__)

OPSIN_INLINE void transpose16(const uint32_t* in, int64_t stride, uint32_t* out,
                              int64_t out_stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(in + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
    b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
    _mm512_storeu_si512(out + (8 + i) * out_stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
    _mm512_storeu_si512(out + (4 + i) * out_stride,
                        _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88));
    _mm512_storeu_si512(out + (12 + i) * out_stride,
                        _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xdd));
  }
}

// Values of 64 keys as pairs of keys; keys past `count` are zero, whatever memory holds there.
static void pack_values(const AttentionShape* s, const AttentionUnit* u, const Scratch* scratch,
                        const int64_t* slots, int count) {
  const int dim = padded(s->value_dim);
  alignas(64) uint16_t a[32], b[32];
  for (int pair = 0; pair < kKeyBlock / 2; pair++) {
    const uint16_t* rows[2];
    for (int i = 0; i < 2; i++) {
      const int key = 2 * pair + i;
      if (s->packed.bits) {
        rows[i] = scratch->rows + key * dim;
      } else {
        rows[i] = key < count ? u->values + slots[key] * s->value_stride : scratch->zero;
      }
    }
    for (int d = 0; d < dim; d += 32) {
      V x, y, first, second;
      if (d + 32 <= s->value_dim) {
        x = vload(rows[0] + d);
        y = vload(rows[1] + d);
      } else {
        __builtin_memset(a, 0, sizeof a);
        __builtin_memset(b, 0, sizeof b);
        __builtin_memcpy(a, rows[0] + d, 2 * (s->value_dim - d));
        __builtin_memcpy(b, rows[1] + d, 2 * (s->value_dim - d));
        x = vload(a);
        y = vload(b);
      }
      interleave16(x, y, &first, &second);
      vstore(scratch->values + ((d / 16) * 32 + pair) * 32, first);
      vstore(scratch->values + ((d / 16 + 1) * 32 + pair) * 32, second);
    }
  }
}

static void pack_queries(const AttentionUnit* u, const Scratch* scratch, int dim) {
  alignas(64) uint16_t rows[16 * 32];
  for (int tile = 0; tile * 16 < u->rows; tile++) {
    for (int d = 0; d < dim; d += 32) {
      __builtin_memset(rows, 0, sizeof rows);
      for (int r = 0; r < 16 && tile * 16 + r < u->rows; r++) {
        __builtin_memcpy(rows + 32 * r, u->queries + (tile * 16 + r) * dim + d, 64);
      }
      uint16_t* out = scratch->query + (tile * (dim / 32) + d / 32) * 512;
      transpose16((const uint32_t*)rows, 16, (uint32_t*)out, 16);
    }
  }
}

// scores (64 keys, 16 queries) of one tile of queries
static void tile_scores(const uint16_t* const* keys, const int64_t* stride, const uint16_t* query,
                        int dim, float* scores) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int c = 0; c < dim / 32; c++) {
    TILE_LOAD(4, query + 512 * c, 64);
    TILE_LOAD(5, keys[0] + 32 * c, stride[0]);
    _tile_dpbf16ps(0, 5, 4);
    TILE_LOAD(6, keys[1] + 32 * c, stride[1]);
    _tile_dpbf16ps(1, 6, 4);
    TILE_LOAD(7, keys[2] + 32 * c, stride[2]);
    _tile_dpbf16ps(2, 7, 4);
    TILE_LOAD(5, keys[3] + 32 * c, stride[3]);
    _tile_dpbf16ps(3, 5, 4);
  }
  TILE_STORE(0, scores, 64);
  TILE_STORE(1, scores + 256, 64);
  TILE_STORE(2, scores + 512, 64);
  TILE_STORE(3, scores + 768, 64);
}

// Caps the scores and hides the keys that a query does not see; lanes are queries.
static void tile_mask(const AttentionShape* s, float* scores, int from, I lo, I hi) {
  const __mmask16 all = _mm512_cmple_epi32_mask(lo.v, _mm512_set1_epi32(from)) &
                        _mm512_cmpge_epi32_mask(hi.v, _mm512_set1_epi32(from + kKeyBlock));
  if (s->softcap > 0.0f) {
    for (int k = 0; k < kKeyBlock; k++) store(scores + 16 * k, cap_scores(s, load(scores + 16 * k)));
  }
  if (all == 0xffff) return;
  const F none = set1(-__builtin_inff());
  for (int k = 0; k < kKeyBlock; k++) {
    store(scores + 16 * k, select_range(load(scores + 16 * k), none, iset1(from + k), lo, hi));
  }
}

// Exponents of 64 keys as pairs of bfloat16 (32 pairs, 16 queries); returns the sum added to total.
static F tile_exponents(const float* scores, F unit, F base, F total, uint32_t* pairs) {
  static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = _mm512_loadu_si512(order);
  const F down = sub(set1(0.0f), base);
  for (int k = 0; k < kKeyBlock; k += 2) {
    const F a = exp2(fma(load(scores + 16 * k), unit, down));
    const F b = exp2(fma(load(scores + 16 * k + 16), unit, down));
    total = add(total, add(a, b));
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
    vstore(pairs + 8 * k, {_mm512_permutexvar_epi16(both, halves)});
  }
  return total;
}

// One step of the online softmax; lanes are queries. False when no query sees any of the keys.
static bool tile_softmax(const AttentionShape* s, float* scores, uint16_t* weights, int from,
                         I lo, I hi, float* top, float* sum, float* part, int dim) {
  alignas(64) uint32_t pairs[32 * 16];
  const __m512 none = _mm512_set1_ps(-__builtin_inff());
  tile_mask(s, scores, from, lo, hi);
  F best = {none}, other = {none};
  for (int k = 0; k < kKeyBlock; k += 2) {
    best = max(best, load(scores + 16 * k));
    other = max(other, load(scores + 16 * k + 16));
  }
  best = max(best, other);
  if (_mm512_cmp_ps_mask(best.v, none, _CMP_NEQ_UQ) == 0) return false;
  const F unit = set1(exponent_unit(s));
  const F old = load(top), now = max(old, mul(best, unit));
  // A query that has seen nothing yet keeps -inf; its exponents are taken from 0 instead.
  const F base = {_mm512_mask_mov_ps(now.v, _mm512_cmp_ps_mask(now.v, none, _CMP_EQ_OQ),
                                     _mm512_setzero_ps())};
  const F alpha = exp2(sub(old, base));
  const F total = tile_exponents(scores, unit, base, mul(load(sum), alpha), pairs);
  transpose16(pairs, 16, (uint32_t*)weights, 32);
  transpose16(pairs + 256, 16, (uint32_t*)weights + 16, 32);
  store(top, now);
  store(sum, total);
  float factor[16];
  store(factor, alpha);
  for (int r = 0; r < 16; r++) {
    if (factor[r] == 1.0f) continue;
    for (int d = 0; d < dim; d += 16) {
      store(part + r * dim + d, mul(load(part + r * dim + d), set1(factor[r])));
    }
  }
  return true;
}

// part (16, dim) += weights (16, 64) times values
static void tile_values(const uint16_t* weights, const uint16_t* values, float* part, int dim) {
  TILE_LOAD(6, weights, 128);
  TILE_LOAD(7, weights + 32, 128);
  for (int d = 0; d < dim / 16; d += 2) {
    TILE_LOAD(0, part + 16 * d, dim * 4);
    TILE_LOAD(1, part + 16 * d + 16, dim * 4);
    TILE_LOAD(4, values + 1024 * d, 64);
    _tile_dpbf16ps(0, 6, 4);
    TILE_LOAD(5, values + 1024 * d + 1024, 64);
    _tile_dpbf16ps(1, 6, 5);
    TILE_LOAD(4, values + 1024 * d + 512, 64);
    _tile_dpbf16ps(0, 7, 4);
    TILE_LOAD(5, values + 1024 * d + 1536, 64);
    _tile_dpbf16ps(1, 7, 5);
    TILE_STORE(0, part + 16 * d, dim * 4);
    TILE_STORE(1, part + 16 * d + 16, dim * 4);
  }
}

static void attend_block(const AttentionShape* s, const AttentionUnit* u, const Scratch* scratch,
                         Running* run, const int32_t* lo, const int32_t* hi, int from, int count,
                         const int64_t* slots, const AheadBoth& ahead) {
  ahead.keys.fetch_all();
  ahead.values.fetch_all();
  const int dim = padded(s->head_dim), value_dim = padded(s->value_dim);
  // More rows than a tile's read the keys again: then they are worth copying side by side.
  const bool packed = s->packed.bits != 0;
  const bool direct = dim == s->head_dim && s->block_size % 16 == 0 && u->rows <= 16 && !packed;
  if (packed) expand(s, u, scratch, slots, count);
  const uint16_t* keys[4];
  int64_t stride[4];
  for (int kt = 0; kt < 4; kt++) {
    if (direct && kt * 16 + 16 <= count) {
      keys[kt] = u->keys + slots[kt * 16] * s->key_stride;
      stride[kt] = s->key_stride * 2;
    } else {
      uint16_t* copy = scratch->keys + kt * 16 * dim;
      if (!packed) {
        copy_rows(u->keys, s->key_stride, s->head_dim, copy, slots + kt * 16, count - kt * 16, 16);
      }
      keys[kt] = copy;
      stride[kt] = dim * 2;
    }
  }
  pack_values(s, u, scratch, slots, count);
  // Each stage for all tiles before the next, so that none waits for what it has just stored.
  const int tiles = (u->rows + 15) / 16;
  bool seen[kAttentionRows / 16];
  for (int t = 0; t < tiles; t++) {
    tile_scores(keys, stride, scratch->query + t * 16 * dim, dim, scratch->scores + t * 1024);
  }
  for (int t = 0; t < tiles; t++) {
    seen[t] = tile_softmax(s, scratch->scores + t * 1024, scratch->weights + t * 1024, from,
                           iload(lo + 16 * t), iload(hi + 16 * t), run->top + 16 * t,
                           run->sum + 16 * t, scratch->part + t * 16 * value_dim, value_dim);
  }
  for (int t = 0; t < tiles; t++) {
    if (!seen[t]) continue;
    tile_values(scratch->weights + t * 1024, scratch->values, scratch->part + t * 16 * value_dim,
                value_dim);
  }
}

static void attention_begin(const AttentionUnit* u, const Scratch* scratch, int dim) {
  configure(16, 16);
  pack_queries(u, scratch, dim);
}
static void attention_end() { _tile_release(); }
static void order_values(float*, int) {}

#else

OPSIN_INLINE const uint8_t* query_row(const AttentionUnit* u, const Scratch* scratch, int row,
                                      int dim) {
#if defined(__AVX512BF16__)
  return (const uint8_t*)(u->queries + row * dim);
#else
  return (const uint8_t*)((const float*)scratch->query + row * dim);
#endif
}

OPSIN_INLINE void store_weights(uint8_t* weights, int at, F p) {
#if defined(__AVX512BF16__)
  store_bf16((uint16_t*)weights + at, p);
#else
  store((float*)weights + at, p);
#endif
}

// Caps the scores of one row, hides the keys that it does not see; returns the highest of them.
static float row_top(const AttentionShape* s, float* scores, int from, int lo, int hi) {
  static const int32_t lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const bool capped = s->softcap > 0.0f, hides = lo > from || hi < from + kKeyBlock;
  const F none = set1(-__builtin_inff());
  F best = none;
  for (int k = 0; k < kKeyBlock; k += 16) {
    F score = load(scores + k);
    if (capped) score = cap_scores(s, score);
    if (hides) {
      const I position = iadd(iload(lane), iset1(from + k));
      score = select_range(score, none, position, iset1(lo), iset1(hi));
    }
    if (capped || hides) store(scores + k, score);
    best = max(best, score);
  }
  return hmax(best);
}

// Turns the scores of one row into weights, where they lie; returns their sum.
static float row_weights(float* scores, F unit, float top) {
  const F down = set1(-top);
  F total = set1(0.0f);
  for (int k = 0; k < kKeyBlock; k += 16) {
    const F p = exp2(fma(load(scores + k), unit, down));
    total = add(total, p);
    store_weights((uint8_t*)scores, k, p);
  }
  return hsum(total);
}

// Turns the scores of rows `row_of` into products with values, of those that see some of the keys;
// returns how many. Each stage for all rows before the next, so that none waits for a row's sums.
static int softmax_rows(const AttentionShape* s, const Scratch* scratch, Running* run,
                        const int32_t* lo, const int32_t* hi, int from, const int* row_of,
                        int count, RowProduct* rows) {
  alignas(64) float before[kAttentionRows], best[kAttentionRows], kept[kAttentionRows];
  for (int i = 0; i < count; i++) {
    const int r = row_of[i];
    before[i] = run->top[r];
    best[i] = row_top(s, scratch->scores + i * kKeyBlock, from, lo[r], hi[r]);
  }
  const F unit = set1(exponent_unit(s));
  for (int i = count; i % 16 != 0; i++) before[i] = best[i] = 0.0f;
  for (int i = 0; i < count; i += 16) {
    const F old = load(before + i), top = max(old, mul(load(best + i), unit));
    store(before + i, top);
    store(kept + i, exp2(sub(old, top)));
  }
  int seen = 0;
  for (int i = 0; i < count; i++) {
    if (best[i] == -__builtin_inff()) continue;
    const int r = row_of[i];
    float* scores = scratch->scores + i * kKeyBlock;
    run->sum[r] = run->sum[r] * kept[i] + row_weights(scores, unit, before[i]);
    run->top[r] = before[i];
    rows[seen++] = {(const uint8_t*)scores, scratch->part + r * padded(s->value_dim), kept[i]};
  }
  return seen;
}

// Where 64 rows of keys or values lie, each whole vectors long; there are zeros past `count`. Rows
// that are quantised are in `copies` already; such as are no sixteen neighbours are copied there.
static void find_rows(const AttentionShape* s, const Scratch* scratch, const uint16_t* from,
                      int64_t stride, int dim, uint16_t* copies, const int64_t* slots, int count,
                      Sixteen* rows) {
  const int wide = padded(dim);
  const bool whole = wide == dim && s->block_size % 16 == 0;
  for (int k = 0; k < kKeyBlock; k += 16, rows++, copies += 16 * wide) {
    *rows = {copies, wide};
    if (s->packed.bits) continue;
    if (k >= count) {
      *rows = {scratch->zero, 0};
    } else if (whole && k + 16 <= count) {
      *rows = {from + slots[k] * stride, stride};
    } else {
      copy_rows(from, stride, dim, copies, slots + k, count - k, 16);
    }
  }
}

// Where the lanes of a block's keys and values are, made already or not.
struct BlockLanes {
  Lanes keys, values;
};

static BlockLanes lanes_of(const AttentionShape* s, const AttentionUnit* u, const Scratch* scratch,
                           int from) {
  const int block = u->keep ? from / kKeyBlock : 0;
  const int64_t keys = (int64_t)block * kKeyBlock * padded(s->head_dim) * 4;
  const int64_t values = (int64_t)block * (kKeyBlock + 1) * padded(s->value_dim) * 4;
  bool* made = scratch->made + 2 * block;
  if (!u->keep) made[0] = made[1] = false;
  return {{(uint8_t*)scratch->turned + keys, made}, {(uint8_t*)scratch->values + values, made + 1}};
}

static void key_products(const AttentionShape* s, const AttentionUnit* u, const Scratch* scratch,
                         const int64_t* slots, int visible, Lanes lanes, const RowProduct* rows,
                         int count, const Ahead& ahead) {
  Sixteen keys[kKeyBlock / 16];
  if (s->packed.bits) expand(s, u, scratch, slots, visible);
  if (!*lanes.made || count <= kDirectRows) {
    find_rows(s, scratch, u->keys, s->key_stride, s->head_dim, scratch->keys, slots, visible, keys);
  }
  multiply_keys(keys, padded(s->head_dim), lanes, rows, count, ahead);
}

static void value_products(const AttentionShape* s, const AttentionUnit* u,
                           const Scratch* scratch, const int64_t* slots, int visible, Lanes lanes,
                           const RowProduct* rows, int count, const Ahead& ahead) {
  Sixteen values[kKeyBlock / 16];
  if (!*lanes.made || count <= kDirectRows) {
    find_rows(s, scratch, u->values, s->value_stride, s->value_dim, scratch->rows, slots, visible,
              values);
  }
  multiply_values(values, visible, padded(s->value_dim), lanes, rows, count, ahead);
}

static void attend_block(const AttentionShape* s, const AttentionUnit* u, const Scratch* scratch,
                         Running* run, const int32_t* lo, const int32_t* hi, int from, int count,
                         const int64_t* slots, const AheadBoth& ahead) {
  const int dim = padded(s->head_dim);
  RowProduct rows[kAttentionRows];
  int row_of[kAttentionRows], seeing = 0;
  for (int r = 0; r < u->rows; r++) {
    if (lo[r] >= from + kKeyBlock || hi[r] <= from) continue;
    rows[seeing] = {query_row(u, scratch, r, dim), scratch->scores + seeing * kKeyBlock, 0.0f};
    row_of[seeing++] = r;
  }
  const BlockLanes lanes = lanes_of(s, u, scratch, from);
  key_products(s, u, scratch, slots, count, lanes.keys, rows, seeing, ahead.keys);
  seeing = softmax_rows(s, scratch, run, lo, hi, from, row_of, seeing, rows);
  value_products(s, u, scratch, slots, count, lanes.values, rows, seeing, ahead.values);
}

static void attention_begin(const AttentionUnit* u, const Scratch* scratch, int dim) {
  if (!u->again) __builtin_memset(scratch->made, 0, 2 * kKeptBlocks);
#if !defined(__AVX512BF16__)
  float* out = (float*)scratch->query;
  for (int d = 0; d < u->rows * dim; d += 16) store(out + d, load_bf16(u->queries + d));
#endif
}

static void attention_end() {}

#endif

OPSIN_INLINE int keys_left(const AttentionUnit* u, int from) {
  const int left = u->num_keys - from;
  return left < kKeyBlock ? left : kKeyBlock;
}

// The first keys, which rows see beside those of their windows, as a segment of their own.
static void attend_first(const AttentionShape* s, const AttentionUnit* u, const Scratch* scratch,
                         Running* run, int value_dim) {
  alignas(64) int32_t lo[kAttentionRows], hi[kAttentionRows];
  int64_t slots[kKeyBlock];
  for (int r = 0; r < kAttentionRows; r++) {
    lo[r] = r < u->rows ? u->first_lo[r] : 0;
    hi[r] = r < u->rows ? u->first_hi[r] : 0x7fffffff;
  }
  find_slots(s, u, 0, keys_left(u, 0), slots);
  attend_block(s, u, scratch, run, lo, hi, 0, keys_left(u, 0), slots, AheadBoth{});
  merge(u, scratch, run, value_dim);
}

static void attention(const AttentionShape* s, const AttentionUnit* u) {
  const int dim = padded(s->head_dim), value_dim = padded(s->value_dim);
  const Scratch scratch = carve(u->scratch, dim, value_dim);
  alignas(64) Running run;
  alignas(64) int32_t lo[kAttentionRows], hi[kAttentionRows];
  int first = u->num_keys, last = 0;
  for (int r = 0; r < kAttentionRows; r++) {
    run.top[r] = run.all_top[r] = -__builtin_inff();
    run.sum[r] = run.all_sum[r] = 0.0f;
    lo[r] = 0;  // rows that only fill a tile see everything: nothing to hide
    hi[r] = 0x7fffffff;
    if (r >= u->rows) continue;
    lo[r] = u->lo[r] > 0 ? u->lo[r] : 0;
    hi[r] = u->hi[r] < u->num_keys ? u->hi[r] : u->num_keys;
    if (lo[r] >= hi[r]) continue;
    first = lo[r] < first ? lo[r] : first;
    last = hi[r] > last ? hi[r] : last;
  }
  __builtin_memset(scratch.part, 0, sizeof(float) * ((u->rows + 15) / 16 * 16) * value_dim);
  __builtin_memset(u->out, 0, sizeof(float) * u->rows * value_dim);
  attention_begin(u, &scratch, dim);
  if (u->first_lo) attend_first(s, u, &scratch, &run, value_dim);
  int64_t slots[2][kKeyBlock];
  int from = first / kKeyBlock * kKeyBlock, at = 0;
  if (from < last) find_slots(s, u, from, keys_left(u, from), slots[0]);
  for (; from < last; from += kKeyBlock, at ^= 1) {
    const int next = from + kKeyBlock;
    AheadBoth ahead{};
    if (next < last) {
      find_slots(s, u, next, keys_left(u, next), slots[at ^ 1]);
      if (s->packed.bits) {
        prefetch_packed(s, u, slots[at ^ 1]);
      } else if (u->rows <= 16) {
        ahead = ahead_of(s, u, slots[at ^ 1]);
      }
    } else {
      ahead = ahead_of_next(s, u, slots[at ^ 1]);
    }
    attend_block(s, u, &scratch, &run, lo, hi, from, keys_left(u, from), slots[at], ahead);
    if (next % kSegment == 0) merge(u, &scratch, &run, value_dim);
  }
  attention_end();
  merge(u, &scratch, &run, value_dim);
  for (int r = 0; r < u->rows; r++) {
    float inverse = run.all_sum[r] > 0.0f ? 1.0f / run.all_sum[r] : 0.0f;
    if (u->sinks && run.all_sum[r] > 0.0f) {
      const float sink = u->sinks[r] * kLog2E, top = run.all_top[r] > sink ? run.all_top[r] : sink;
      const float kept = exp2_of(run.all_top[r] - top);
      inverse = kept / (run.all_sum[r] * kept + exp2_of(sink - top));
    }
    float* out = u->out + r * value_dim;
    // Adding 0 turns -0 into 0, the one bit that empty steps could change.
    for (int d = 0; d < value_dim; d += 16) {
      store(out + d, add(mul(load(out + d), set1(inverse)), set1(0.0f)));
    }
    order_values(out, value_dim);
  }
}

}  // namespace OPSIN_ISA
