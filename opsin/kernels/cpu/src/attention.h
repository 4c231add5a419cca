// Attention of a few query rows over paged or contiguous keys and values, by online softmax.
//
// Keys are taken in blocks of 64 at fixed positions and merged in segments of 512, so that a
// row's result is the same bits in a decode step, in any chunk and beside any other rows.
#pragma once

#include "elementwise.h"
#include "kernels.h"
#include "simd.h"

namespace OPSIN_ISA {

using opsin::AttentionShape;
using opsin::AttentionUnit;
using opsin::kAttentionRows;
using opsin::kKeyBlock;
using opsin::kSegment;

// Scratch of one unit; every part starts on 64 bytes.
struct Scratch {
  uint16_t* keys;    // (64, dim)
  uint16_t* values;  // (value_dim / 16, 32 pairs, 16, 2)
  uint16_t* query;   // (tiles, dim / 32, 16 pairs, 16, 2), tiles only
  float* scores;     // (64, 16)
  uint16_t* weights; // (16, 64)
  float* part;       // (rows, value_dim) of the current segment
  uint16_t* zero;    // (dim)
};

struct Running {
  float top[kAttentionRows], sum[kAttentionRows];        // of the current segment
  float all_top[kAttentionRows], all_sum[kAttentionRows];  // of those before it
};

OPSIN_INLINE int padded(int dim) { return (dim + 31) / 32 * 32; }

static Scratch carve(uint8_t* p, int dim, int value_dim) {
  Scratch s;
  const int widest = dim > value_dim ? dim : value_dim;
  s.keys = (uint16_t*)p;
  p += kKeyBlock * dim * 2;
  s.values = (uint16_t*)p;
  p += kKeyBlock * value_dim * 2;
  s.query = (uint16_t*)p;
  p += kAttentionRows * dim * 2;
  s.scores = (float*)p;
  p += kKeyBlock * 16 * 4;
  s.weights = (uint16_t*)p;
  p += 16 * kKeyBlock * 2;
  s.part = (float*)p;
  p += kAttentionRows * value_dim * 4;
  s.zero = (uint16_t*)p;
  __builtin_memset(s.zero, 0, widest * 2);
  return s;
}

OPSIN_INLINE int64_t slot(const AttentionShape* s, const AttentionUnit* u, int key) {
  if (s->block_size == 0) return key;
  return (int64_t)u->block_table[key / s->block_size] * s->block_size + key % s->block_size;
}

// Slots of the 64 keys from `from` on; past `count` the last one again.
static void find_slots(const AttentionShape* s, const AttentionUnit* u, int from, int count,
                       int64_t* slots) {
  const bool whole = s->block_size % 16 == 0;  // sixteen neighbours lie in one block
  for (int k = 0; k < kKeyBlock; k++) {
    if (k >= count) {
      slots[k] = slots[count - 1];
    } else {
      slots[k] = whole && k % 16 != 0 ? slots[k - 1] + 1 : slot(s, u, from + k);
    }
  }
}

// The rows of a head lie far apart, so that the machine does not foresee the next ones.
static void prefetch_rows(const uint16_t* base, int64_t stride, int dim, const int64_t* slots) {
  for (int k = 0; k < kKeyBlock; k++) {
    const uint16_t* row = base + slots[k] * stride;
    for (int d = 0; d < dim; d += 32) prefetch(row + d);
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
      rows[i] = key < count ? u->values + slots[key] * s->value_stride : scratch->zero;
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

static void copy_keys(const AttentionShape* s, const AttentionUnit* u, uint16_t* out,
                      const int64_t* slots, int count, int wanted) {
  const int dim = padded(s->head_dim);
  for (int key = 0; key < wanted; key++) {
    uint16_t* o = out + key * dim;
    __builtin_memset(o, 0, 2 * dim);
    if (key >= count) continue;
    __builtin_memcpy(o, u->keys + slots[key] * s->key_stride, 2 * s->head_dim);
  }
}

OPSIN_INLINE F finish_scores(const AttentionShape* s, F raw) {
  F a = mul(raw, set1(s->scale));
  if (s->softcap > 0.0f) a = mul(tanh(div(a, set1(s->softcap))), set1(s->softcap));
  return a;
}

// Adds a finished segment to what came before it.
static void merge(const AttentionUnit* u, const Scratch* scratch, Running* run, int dim) {
  for (int r = 0; r < u->rows; r++) {
    if (run->top[r] == -__builtin_inff()) continue;
    const float top = run->all_top[r] > run->top[r] ? run->all_top[r] : run->top[r];
    const float before = exp1(run->all_top[r] - top), now = exp1(run->top[r] - top);
    run->all_sum[r] = run->all_sum[r] * before + run->sum[r] * now;
    run->all_top[r] = top;
    float* out = u->out + r * dim;
    float* part = scratch->part + r * dim;
    for (int d = 0; d < dim; d += 16) {
      store(out + d, add(mul(load(out + d), set1(before)), mul(load(part + d), set1(now))));
      store(part + d, set1(0.0f));
    }
    run->top[r] = -__builtin_inff();
    run->sum[r] = 0.0f;
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
  for (int kt = 0; kt < 4; kt++) {
    _tile_zero(0);
    for (int c = 0; c < dim / 32; c++) {
      TILE_LOAD(5, keys[kt] + 32 * c, stride[kt]);
      TILE_LOAD(4, query + 512 * c, 64);
      _tile_dpbf16ps(0, 5, 4);
    }
    TILE_STORE(0, scores + 256 * kt, 64);
  }
}

// One step of the online softmax; lanes are queries. False when no query sees any of the keys.
static bool tile_softmax(const AttentionShape* s, float* scores, uint16_t* weights, int from,
                         I lo, I hi, float* top, float* sum, float* part, int dim) {
  const float none = -__builtin_inff();
  alignas(64) uint32_t pairs[32 * 16];
  F best = set1(none);
  for (int k = 0; k < kKeyBlock; k++) {
    F a = finish_scores(s, load(scores + 16 * k));
    a = select_range(a, set1(none), iset1(from + k), lo, hi);
    best = max(best, a);
    store(scores + 16 * k, a);
  }
  if (hmax(best) == none) return false;
  const F old = load(top);
  F now = max(old, best);
  // A query that has seen nothing yet keeps -inf; its exponents are taken from 0 instead.
  const F base = {_mm512_mask_mov_ps(
      now.v, _mm512_cmp_ps_mask(now.v, _mm512_set1_ps(none), _CMP_EQ_OQ), _mm512_setzero_ps())};
  const F alpha = exp(sub(old, base));
  F total = mul(load(sum), alpha);
  for (int k = 0; k < kKeyBlock; k += 2) {
    F a = exp(sub(load(scores + 16 * k), base)), b = exp(sub(load(scores + 16 * k + 16), base));
    total = add(add(total, a), b);
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a.v));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b.v));
    vstore(pairs + 8 * k, {_mm512_or_si512(low, _mm512_slli_epi32(high, 16))});
  }
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

static void tile_values(const uint16_t* weights, const uint16_t* values, float* part, int dim) {
  TILE_LOAD(5, weights, 128);
  TILE_LOAD(6, weights + 32, 128);
  for (int d = 0; d < dim / 16; d++) {
    TILE_LOAD(0, part + 16 * d, dim * 4);
    TILE_LOAD(4, values + 1024 * d, 64);
    _tile_dpbf16ps(0, 5, 4);
    TILE_LOAD(4, values + 1024 * d + 512, 64);
    _tile_dpbf16ps(0, 6, 4);
    TILE_STORE(0, part + 16 * d, dim * 4);
  }
}

static void attend_block(const AttentionShape* s, const AttentionUnit* u, const Scratch* scratch,
                         Running* run, const int32_t* lo, const int32_t* hi, int from, int count,
                         const int64_t* slots) {
  const int dim = padded(s->head_dim), value_dim = padded(s->value_dim);
  const bool direct = dim == s->head_dim && s->block_size % 16 == 0;
  const uint16_t* keys[4];
  int64_t stride[4];
  for (int kt = 0; kt < 4; kt++) {
    if (direct && kt * 16 + 16 <= count) {
      keys[kt] = u->keys + slots[kt * 16] * s->key_stride;
      stride[kt] = s->key_stride * 2;
    } else {
      uint16_t* copy = scratch->keys + kt * 16 * dim;
      copy_keys(s, u, copy, slots + kt * 16, count - kt * 16, 16);
      keys[kt] = copy;
      stride[kt] = dim * 2;
    }
  }
  pack_values(s, u, scratch, slots, count);
  for (int tile = 0; tile * 16 < u->rows; tile++) {
    const uint16_t* query = scratch->query + tile * 16 * dim;
    float* part = scratch->part + tile * 16 * value_dim;
    tile_scores(keys, stride, query, dim, scratch->scores);
    if (tile_softmax(s, scratch->scores, scratch->weights, from, iload(lo + 16 * tile),
                     iload(hi + 16 * tile), run->top + 16 * tile, run->sum + 16 * tile, part,
                     value_dim)) {
      tile_values(scratch->weights, scratch->values, part, value_dim);
    }
  }
}

static void attention_begin(const AttentionUnit* u, const Scratch* scratch, int dim) {
  configure(16, 16);
  pack_queries(u, scratch, dim);
}
static void attention_end() { _tile_release(); }

#else

// weights (64) of one row; returns the factor for what it has, or -1 when it sees none of the keys
static float row_softmax(const AttentionShape* s, F* score, uint16_t* weights, int from, int lo,
                         int hi, float* top, float* sum) {
  const float none = -__builtin_inff();
  static const int32_t lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  F best = set1(none);
  for (int kt = 0; kt < 4; kt++) {
    const I position = iadd(iload(lane), iset1(from + 16 * kt));
    score[kt] = select_range(finish_scores(s, score[kt]), set1(none), position, iset1(lo),
                             iset1(hi));
    best = max(best, score[kt]);
  }
  const float most = hmax(best);
  if (most == none) return -1.0f;
  const float now = most > *top ? most : *top;
  const float alpha = exp1(*top - now);
  F total = set1(0.0f);
  for (int kt = 0; kt < 4; kt++) {
    F p = exp(sub(score[kt], set1(now)));
    total = add(total, p);
    store_bf16(weights + 16 * kt, p);
  }
  *sum = *sum * alpha + hsum(total);
  *top = now;
  return alpha;
}

template <int N>
OPSIN_INLINE void row_values(const uint16_t* weights, const uint16_t* values, float alpha,
                             float* part) {
  F acc[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; i++) acc[i] = mul(load(part + 16 * i), set1(alpha));
  for (int pair = 0; pair < kKeyBlock / 2; pair++) {
    const V p = bcast4(weights + 2 * pair);
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) acc[i] = dot_bf16(acc[i], vload(values + 1024 * i + 32 * pair), p);
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; i++) store(part + 16 * i, acc[i]);
}

static void attend_block(const AttentionShape* s, const AttentionUnit* u, const Scratch* scratch,
                         Running* run, const int32_t* lo, const int32_t* hi, int from, int count,
                         const int64_t* slots) {
  const int dim = padded(s->head_dim), value_dim = padded(s->value_dim);
  const uint16_t* keys[kKeyBlock];
  if (dim != s->head_dim) copy_keys(s, u, scratch->keys, slots, count, kKeyBlock);
  for (int k = 0; k < kKeyBlock; k++) {
    if (dim != s->head_dim) {
      keys[k] = scratch->keys + k * dim;
    } else {
      keys[k] = k < count ? u->keys + slots[k] * s->key_stride : scratch->zero;
    }
  }
  pack_values(s, u, scratch, slots, count);
  for (int r = 0; r < u->rows; r++) {
    if (lo[r] >= from + kKeyBlock || hi[r] <= from) continue;
    const uint16_t* q = u->queries + r * dim;
    F score[4];
    for (int kt = 0; kt < 4; kt++) {
      F acc[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++) acc[k] = set1(0.0f);
      for (int d = 0; d < dim; d += 32) {
        const V x = vload(q + d);
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++) {
          acc[k] = dot_bf16(acc[k], vload(keys[16 * kt + k] + d), x);
        }
      }
      score[kt] = reduce16(acc);
    }
    const float alpha = row_softmax(s, score, scratch->weights, from, lo[r], hi[r], run->top + r,
                                    run->sum + r);
    if (alpha < 0.0f) continue;
    float* part = scratch->part + r * value_dim;
    int d = 0;
    for (; d + 64 <= value_dim; d += 64) {
      row_values<4>(scratch->weights, scratch->values + 64 * d, alpha, part + d);
    }
    for (; d < value_dim; d += 32) {
      row_values<2>(scratch->weights, scratch->values + 64 * d, alpha, part + d);
    }
  }
}

static void attention_begin(const AttentionUnit*, const Scratch*, int) {}
static void attention_end() {}

#endif

OPSIN_INLINE int keys_left(const AttentionUnit* u, int from) {
  const int left = u->num_keys - from;
  return left < kKeyBlock ? left : kKeyBlock;
}

static void attention(const AttentionShape* s, const AttentionUnit* u) {
  const int dim = padded(s->head_dim), value_dim = padded(s->value_dim);
  const Scratch scratch = carve(u->scratch, dim, value_dim);
  alignas(64) Running run;
  alignas(64) int32_t lo[kAttentionRows] = {0}, hi[kAttentionRows] = {0};
  int first = u->num_keys, last = 0;
  for (int r = 0; r < kAttentionRows; r++) {
    run.top[r] = run.all_top[r] = -__builtin_inff();
    run.sum[r] = run.all_sum[r] = 0.0f;
    if (r >= u->rows) continue;
    lo[r] = u->lo[r] > 0 ? u->lo[r] : 0;
    hi[r] = u->hi[r] < u->num_keys ? u->hi[r] : u->num_keys;
    if (lo[r] >= hi[r]) continue;
    first = lo[r] < first ? lo[r] : first;
    last = hi[r] > last ? hi[r] : last;
  }
  __builtin_memset(scratch.part, 0, sizeof(float) * kAttentionRows * value_dim);
  __builtin_memset(u->out, 0, sizeof(float) * u->rows * value_dim);
  attention_begin(u, &scratch, dim);
  int64_t slots[2][kKeyBlock];
  int from = first / kKeyBlock * kKeyBlock, at = 0;
  if (from < last) find_slots(s, u, from, keys_left(u, from), slots[0]);
  for (; from < last; from += kKeyBlock, at ^= 1) {
    const int next = from + kKeyBlock;
    if (next < last) {
      find_slots(s, u, next, keys_left(u, next), slots[at ^ 1]);
      if (u->rows <= 16) {
        prefetch_rows(u->keys, s->key_stride, s->head_dim, slots[at ^ 1]);
        prefetch_rows(u->values, s->value_stride, s->value_dim, slots[at ^ 1]);
      }
    }
    attend_block(s, u, &scratch, &run, lo, hi, from, keys_left(u, from), slots[at]);
    if (next % kSegment == 0) merge(u, &scratch, &run, value_dim);
  }
  attention_end();
  merge(u, &scratch, &run, value_dim);
  for (int r = 0; r < u->rows; r++) {
    float inverse = run.all_sum[r] > 0.0f ? 1.0f / run.all_sum[r] : 0.0f;
    if (u->sinks && run.all_sum[r] > 0.0f) {
      const float sink = u->sinks[r], top = run.all_top[r] > sink ? run.all_top[r] : sink;
      const float kept = exp1(run.all_top[r] - top);
      inverse = kept / (run.all_sum[r] * kept + exp1(sink - top));
    }
    float* out = u->out + r * value_dim;
    // Adding 0 turns -0 into 0, the one bit that empty steps could change.
    for (int d = 0; d < value_dim; d += 16) {
      store(out + d, add(mul(load(out + d), set1(inverse)), set1(0.0f)));
    }
  }
}

}  // namespace OPSIN_ISA
