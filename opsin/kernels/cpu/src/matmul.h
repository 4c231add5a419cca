// Products of packed weights with a few or many rows of activations.
//
// A row's result is the same bits whatever rows are beside it: sums within a group are integers,
// and groups are added in order in float32.
#pragma once

#include "codes.h"
#include "matmul_bf16.h"
#include "rotate.h"
#include "simd.h"
#include "tiles.h"

namespace OPSIN_ISA {

using opsin::Activations;
using opsin::Matrix;

#if defined(__AVX512F__)
constexpr int kCodeRows = 8, kFewSums = 8;
#elif defined(__AVX2__)
constexpr int kCodeRows = 4, kFewSums = 4;
#else
constexpr int kCodeRows = 2, kFewSums = 2;
#endif

template <int KIND>
OPSIN_INLINE I dot_codes(I sum, V codes, V x) {
  return KIND == opsin::kQ8 ? dot_u8(sum, codes, x) : dot_u7(sum, codes, x);
}
template <int KIND>
OPSIN_INLINE I dot_codes_at(I sum, V codes, const void* x) {
  return KIND == opsin::kQ8 ? dot_u8_at(sum, codes, x) : dot_u7_at(sum, codes, x);
}

// A panel of activations: codes (padded_k / 4, wide, 4), scales and sums (groups, wide). While two
// blocks are multiplied, memory from `ahead` on is fetched, so many lines a run of columns.
struct Panel {
  const int8_t* codes;
  const float *scale, *sum;
  int wide, lines;
  const uint8_t* ahead;
};

// Columns whose steps are written out one after another, for two blocks.
constexpr int run_columns(int kind, int group) {
  return group == 64 || (group == 128 && kind == opsin::kQ4) ? 64 : 32;
}

// Integer sums of one group of B blocks with MT rows of activations. Where these are few, every
// other vector has sums of its own, so that one does not wait for the other; whole numbers add up
// to the same.
template <int B, int MT, int KIND, int COLUMNS>
OPSIN_INLINE void sum_group(const uint8_t* const (&w)[B], const int8_t* x, int columns,
                            const uint8_t** ahead, int lines, I (&sum)[B][MT]) {
  constexpr int kVectors = Codes<KIND>::kVectors, kBytes = Codes<KIND>::kBytes;
  constexpr int kChains = B * MT <= kFewSums ? 2 : 1;
  I chains[kChains][B][MT];
#pragma GCC unroll 2
  for (int c = 0; c < kChains; c++) {
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) {
#pragma GCC unroll 8
      for (int t = 0; t < MT; t++) chains[c][b][t] = izero();
    }
  }
  const auto step = [&](int j) __attribute__((always_inline)) {
    V codes[B][kVectors];
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) {
      const uint8_t* p = w[b] + kBytes * j;
#pragma GCC unroll 5
      for (int i = 0; B == 1 && i < kBytes; i += 64) prefetch(*ahead + kBytes * j + i);
      Codes<KIND>::read(p, codes[b]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
      I(&to)[B][MT] = chains[i % kChains];
#pragma GCC unroll 8
      for (int t = 0; t < MT; t++) {
        const int8_t* at = x + 4 * (MT * (kVectors * j + i) + t);
        if (B == 1) {
          to[0][t] = dot_codes_at<KIND>(to[0][t], codes[0][i], at);
        } else {
          const V factor = bcast4(at);
#pragma GCC unroll 2
          for (int b = 0; b < B; b++) to[b][t] = dot_codes<KIND>(to[b][t], codes[b][i], factor);
        }
      }
    }
  };
  const int n = (COLUMNS ? COLUMNS : columns) / (4 * kVectors);
  if (B == 1) {
#pragma GCC unroll 4
    for (int j = 0; j < n; j++) step(j);
    *ahead += n * kBytes;
  } else {
    constexpr int kRun = run_columns(KIND, COLUMNS) / (4 * kVectors);
    for (int from = 0; from < n; from += kRun) {
      for (int i = 0; i < lines; i++, *ahead += 64) prefetch(*ahead);
#pragma GCC unroll 8
      for (int j = 0; j < kRun; j++) step(from + j);
    }
  }
#pragma GCC unroll 2
  for (int b = 0; b < B; b++) {
#pragma GCC unroll 8
    for (int t = 0; t < MT; t++) {
      sum[b][t] = kChains == 2 ? iadd(chains[0][b][t], chains[1][b][t]) : chains[0][b][t];
    }
  }
}

// B blocks from w on times MT rows of a panel, to (MT, 16) for each of the blocks.
template <int B, int MT, int KIND, bool BYTES, int COLUMNS>
static void tile_affine(const Matrix* m, const uint8_t* block, const Panel& x, float* const* out) {
  F acc[B][MT];
  const uint8_t *w[B], *head[B];
#pragma GCC unroll 2
  for (int b = 0; b < B; b++) {
    head[b] = block + b * m->block_bytes + m->heads_at;
    w[b] = block + b * m->block_bytes + m->codes_at;
#pragma GCC unroll 8
    for (int t = 0; t < MT; t++) acc[b][t] = set1(0.0f);
  }
  const int8_t* codes = x.codes;
  const float *xs = x.scale, *xb = x.sum;
  const uint8_t* ahead = B == 1 ? block + kAhead : x.ahead;
  if (B == 1) prefetch(ahead - 64);
  const int groups = m->groups, group = COLUMNS ? COLUMNS : m->group;
  const bool f16 = m->scales == opsin::kScaleF16;
  for (int g = 0; g < groups; g++) {
    if (B == 1 && (!BYTES || g % 2)) {  // as many lines as heads take, in their turn
      prefetch(ahead);
      ahead += 64;
    }
    I sum[B][MT];
    sum_group<B, MT, KIND, COLUMNS>(w, codes, group, &ahead, x.lines, sum);
    codes += group * MT;
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) {
      const Scales s = load_scales<BYTES>(head[b], block + b * m->block_bytes, KIND, f16);
#pragma GCC unroll 8
      for (int t = 0; t < MT; t++) {
        acc[b][t] = fma(from_int(sum[b][t]), mul(s.scale, set1(xs[t])), acc[b][t]);
        acc[b][t] = fma(s.bias, set1(xb[t]), acc[b][t]);
      }
      w[b] += group * 2 * opsin::code_bits(KIND);
      head[b] += BYTES ? 32 : 64;
    }
    xs += MT;
    xb += MT;
  }
#pragma GCC unroll 2
  for (int b = 0; b < B; b++) {
#pragma GCC unroll 8
    for (int t = 0; t < MT; t++) store(out[b] + 16 * t, acc[b][t]);
  }
}

template <int B, int MT, int KIND, bool BYTES>
static void tile_grouped(const Matrix* m, const uint8_t* w, const Panel& x, float* const* out) {
  if (m->group == 64) {
    tile_affine<B, MT, KIND, BYTES, 64>(m, w, x, out);
  } else if (KIND == opsin::kQ4 && m->group == 128) {
    tile_affine<B, MT, KIND, BYTES, KIND == opsin::kQ4 ? 128 : 64>(m, w, x, out);
  } else if (B > 1 && m->group == 32) {
    tile_affine<B, MT, KIND, BYTES, B == 1 ? 0 : 32>(m, w, x, out);
  } else {
    tile_affine<B, MT, KIND, BYTES, 0>(m, w, x, out);
  }
}

template <int B, int MT, int KIND>
static void tile_scaled(const Matrix* m, const uint8_t* w, const Panel& x, float* const* out) {
  if (m->scales == opsin::kScaleBytes) {
    tile_grouped<B, MT, KIND, KIND != opsin::kQ8>(m, w, x, out);
  } else {
    tile_grouped<B, MT, KIND, false>(m, w, x, out);
  }
}

template <int B, int MT>
static void tile_rows(const Matrix* m, const uint8_t* w, const Panel& x, float* const* out) {
  if (m->kind == opsin::kQ8) {
    tile_scaled<B, MT, opsin::kQ8>(m, w, x, out);
  } else if (m->kind == opsin::kQ6) {
    tile_scaled<B, MT, opsin::kQ6>(m, w, x, out);
  } else if (m->kind == opsin::kQ5) {
    tile_scaled<B, MT, opsin::kQ5>(m, w, x, out);
  } else {
    tile_scaled<B, MT, opsin::kQ4>(m, w, x, out);
  }
}

// Rows of codes from `row` on, of the `left` that there are: a panel, or what there is of the last.
static Panel panel_of(const Matrix* m, const Activations* x, int64_t row, int left) {
  const int64_t at = row * m->groups;
  return {(const int8_t*)x->data + row / kCodeRows * x->stride, x->scale + at, x->sum + at,
          left < kCodeRows ? left : kCodeRows, 0, nullptr};
}

static void vector_panel(const Matrix* m, const uint8_t* w, const Panel& p, float* out) {
  switch (p.wide) {
#if defined(__AVX512F__)
    case 8: tile_rows<1, 8>(m, w, p, &out); break;
    case 7: tile_rows<1, 7>(m, w, p, &out); break;
    case 6: tile_rows<1, 6>(m, w, p, &out); break;
    case 5: tile_rows<1, 5>(m, w, p, &out); break;
#endif
#if defined(__AVX2__)
    case 4: tile_rows<1, 4>(m, w, p, &out); break;
    case 3: tile_rows<1, 3>(m, w, p, &out); break;
#endif
    case 2: tile_rows<1, 2>(m, w, p, &out); break;
    default: tile_rows<1, 1>(m, w, p, &out); break;
  }
}

static void vector_tile(const Matrix* m, int b, const Activations* x, int row, int count,
                        float* out) {
  const uint8_t* w = m->data + b * m->block_bytes;
  for (int done = 0; done < count; done += kCodeRows, out += 16 * kCodeRows) {
    vector_panel(m, w, panel_of(m, x, row + done, count - done), out);
  }
}

#if defined(__AMX_INT8__)

// Where codes of a column lie in a panel of sixteen rows: a tile is one run of memory.
OPSIN_INLINE int64_t tile_offset(int column) { return (int64_t)column / 64 * 1024 + column % 64; }

// Codes of a group, of fewer than eight bits, as bytes.
template <int KIND>
OPSIN_INLINE void unpack_codes(const uint8_t* p, int group, uint8_t* out) {
  constexpr int kVectors = Codes<KIND>::kVectors, kBytes = Codes<KIND>::kBytes;
  for (int c = 0; c < group; c += 4 * kVectors, p += kBytes, out += 64 * kVectors) {
    for (int i = 0; i < kBytes; i += 64) prefetch(p + i + kAhead);
    V codes[kVectors];
    Codes<KIND>::read(p, codes);
    for (int i = 0; i < kVectors; i++) vstore(out + 64 * i, codes[i]);
  }
}

OPSIN_INLINE void unpack_group(const uint8_t* p, int kind, int group, uint8_t* out) {
  if (kind == opsin::kQ6) {
    unpack_codes<opsin::kQ6>(p, group, out);
  } else if (kind == opsin::kQ5) {
    unpack_codes<opsin::kQ5>(p, group, out);
  } else {
    unpack_codes<opsin::kQ4>(p, group, out);
  }
}

// One pass of sixteen rows over groups of a block: where they lie. With `scratch`, narrow codes
// are unpacked from `packed` there on the way, eight groups in turn; else `codes` are bytes, `step`
// from group to group.
struct AmxPass {
  const uint8_t *block, *heads, *packed, *codes;
  uint8_t* scratch;
  const int8_t* rows;
  const float *scale[2], *sum[2];  // of eight rows each
  int64_t code_bytes, step;
  int groups, group, depth, steps, kind;
  bool f16;       // scales of 16 bits
  bool ahead;     // fetch codes ahead of their use
  int32_t* sums;  // (4, 16, 16)
};

OPSIN_INLINE void unpack_ahead(const AmxPass& p, int g) {
  if (!p.scratch || g >= p.groups) return;
  unpack_group(p.packed + g * p.code_bytes, p.kind, p.group, p.scratch + (g & 7) * p.step);
}

// The integer sums of group g by tile number TILE.
template <int TILE>
OPSIN_INLINE void multiply_group(const AmxPass& p, int g) {
  if (g >= p.groups) return;
  const uint8_t* w = p.scratch ? p.scratch + (g & 7) * p.step : p.codes + g * p.step;
  const int8_t* a = p.rows + tile_offset(g * p.group);
  if (p.ahead) {  // bytes come straight from memory, the first time they are read
    for (int i = 0; i < p.group / 4; i++) prefetch(w + 2 * kAhead + 64 * i);
    prefetch(p.heads + 64 * g + 2 * kAhead);
  }
#define OPSIN_GROUP(tile)                                   \
  _tile_zero(tile);                                         \
  for (int s = 0; s < p.steps; s++) {                       \
    TILE_LOAD(4, w + (int64_t)s * p.depth * 64, 64);        \
    TILE_LOAD(5, a + tile_offset(s * p.depth * 4), 64);     \
    _tile_dpbsud(tile, 5, 4);                               \
  }                                                         \
  TILE_STORE(tile, p.sums + 256 * (tile), 64);
  if (TILE == 0) {
    OPSIN_GROUP(0)
  } else if (TILE == 1) {
    OPSIN_GROUP(1)
  } else if (TILE == 2) {
    OPSIN_GROUP(2)
  } else {
    OPSIN_GROUP(3)
  }
#undef OPSIN_GROUP
}

// Scales the sums of group g while the tiles are two groups ahead, and unpacking four: what one
// unit stores takes long to reach the other.
template <int TILE, bool BYTES>
OPSIN_INLINE void scale_group(const AmxPass& p, int g, F* acc) {
  unpack_ahead(p, g + 4);
  multiply_group<(TILE + 2) % 4>(p, g + 2);
  if (g >= p.groups) return;
  const int32_t* sums = p.sums + 256 * TILE;
  const Scales s = load_scales<BYTES>(p.heads + g * (BYTES ? 32 : 64), p.block, p.kind, p.f16);
#pragma GCC unroll 16
  for (int t = 0; t < 16; t++) {
    const int at = kCodeRows * g + t % kCodeRows, half = t / kCodeRows;
    acc[t] = fma(from_int(iload(sums + 16 * t)), mul(s.scale, set1(p.scale[half][at])), acc[t]);
    acc[t] = fma(s.bias, set1(p.sum[half][at]), acc[t]);
  }
}

template <bool BYTES>
static void amx_rows(const AmxPass& pass, bool first, float* out) {
  const AmxPass p = pass;
  F acc[16];
#pragma GCC unroll 16
  for (int t = 0; t < 16; t++) acc[t] = first ? set1(0.0f) : load(out + 16 * t);
  for (int g = 0; g < 4; g++) unpack_ahead(p, g);
  multiply_group<0>(p, 0);
  multiply_group<1>(p, 1);
  for (int g = 0; g < p.groups; g += 4) {
    scale_group<0, BYTES>(p, g, acc);
    scale_group<1, BYTES>(p, g + 1, acc);
    scale_group<2, BYTES>(p, g + 2, acc);
    scale_group<3, BYTES>(p, g + 3, acc);
  }
#pragma GCC unroll 16
  for (int t = 0; t < 16; t++) store(out + 16 * t, acc[t]);
}

// Sixteen rows from `row` on over the groups of a pass, `from` of the block on, added to out.
static void amx_pass(const Matrix* m, const Activations* x, int64_t row, int from, AmxPass* p,
                     float* out) {
  p->rows = (const int8_t*)x->data + row / 16 * x->stride + tile_offset(from * m->group);
  for (int half = 0; half < 2; half++) {
    const int64_t at = (row + kCodeRows * half) * m->groups + kCodeRows * from;
    p->scale[half] = x->scale + at;
    p->sum[half] = x->sum + at;
  }
  if (m->scales == opsin::kScaleBytes) {
    amx_rows<true>(*p, from == 0, out);
  } else {
    amx_rows<false>(*p, from == 0, out);
  }
}

static void amx_quantized(const Matrix* m, int b, const Activations* x, int row, int count,
                          float* out, uint8_t* scratch) {
  alignas(64) int32_t sums[4 * 256];
  const bool narrow = m->kind != opsin::kQ8, once = count <= 16;
  const uint8_t* block = m->data + b * m->block_bytes;
  const int near = m->group < opsin::kNearColumns ? opsin::kNearColumns / m->group : 1;
  const int run = once ? m->groups : near;
  AmxPass p;
  p.scratch = narrow && once ? scratch : nullptr;
  p.kind = m->kind;
  p.f16 = m->scales == opsin::kScaleF16;
  p.block = block;
  p.code_bytes = m->code_bytes;
  p.step = (int64_t)m->group * 16;
  p.group = m->group;
  p.depth = m->group < 64 ? m->group / 4 : 16;
  p.steps = m->group / (4 * p.depth);
  p.sums = sums;
  for (int from = 0; from < m->groups; from += run) {
    p.groups = m->groups - from < run ? m->groups - from : run;
    p.heads = block + m->heads_at + from * opsin::head_bytes(m->scales);
    p.packed = block + m->codes_at + from * m->code_bytes;
    p.codes = narrow ? scratch : p.packed;
    for (int g = 0; narrow && !once && g < p.groups; g++) {
      unpack_group(p.packed + g * m->code_bytes, p.kind, m->group, scratch + g * p.step);
    }
    for (int done = 0; done < count; done += 16) {
      p.ahead = !narrow && done == 0;
      amx_pass(m, x, row + done, from, &p, out + 16 * done);
    }
  }
}

// Two blocks of eight-bit codes with one scale a row against 32 rows at a time: what is loaded
// serves two products. Columns go by in runs whose weights stay in the first cache; the sums
// between runs lie in out and second, and being whole they do not depend on the order.
constexpr int kRunSteps = 12;  // of 64 columns

OPSIN_INLINE void pair_steps(const uint8_t* w, const uint8_t* next, const uint8_t* rows,
                             const uint8_t* below, bool first, int steps, float* out,
                             float* second) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    TILE_LOAD(0, out, 64);
    TILE_LOAD(1, second, 64);
    TILE_LOAD(2, out + 256, 64);
    TILE_LOAD(3, second + 256, 64);
  }
  for (int s = 0; s < steps; s++) {
    TILE_LOAD(4, w + 1024 * s, 64);
    TILE_LOAD(6, rows + 1024 * s, 64);
    _tile_dpbsud(0, 6, 4);
    TILE_LOAD(5, next + 1024 * s, 64);
    _tile_dpbsud(1, 6, 5);
    TILE_LOAD(7, below + 1024 * s, 64);
    _tile_dpbsud(2, 7, 4);
    _tile_dpbsud(3, 7, 5);
  }
  TILE_STORE(0, out, 64);
  TILE_STORE(1, second, 64);
  TILE_STORE(2, out + 256, 64);
  TILE_STORE(3, second + 256, 64);
}

// Whole sums of one scale a row to values, where they are.
static void scale_rows(const Matrix* m, const uint8_t* head, const Activations* x, int row,
                       int count, float* out) {
  const Scales s = load_scales<false>(head, head, m->kind, m->scales == opsin::kScaleF16);
  for (int t = 0; t < count; t++) {
    const F sum = from_int(iload((const int32_t*)out + 16 * t));
    const F scaled = fma(sum, mul(s.scale, set1(x->scale[row + t])), set1(0.0f));
    store(out + 16 * t, fma(s.bias, set1(x->sum[row + t]), scaled));
  }
}

static bool pair(const Matrix* m, int b, int, const Activations* x, int row, int count, float* out,
                 float* second, uint8_t* scratch) {
  if (count > 16 && opsin::is_bf16(m->kind)) {
    pair_bf16(m, b, x, row, count, out, second, scratch);
    return true;
  }
  if (count <= 16 || m->kind != opsin::kQ8 || m->groups != 1 || m->group % 64) return false;
  const uint8_t* w = m->data + b * m->block_bytes;
  const uint8_t* next = w + m->block_bytes;
  const int steps = m->padded_k / 64;
  for (int from = 0; from < steps; from += kRunSteps) {
    const int run = steps - from < kRunSteps ? steps - from : kRunSteps;
    for (int done = 0; done < count; done += 32) {
      const uint8_t* rows = x->data + (row + done) / 16 * x->stride + 1024 * from;
      pair_steps(w + 64 + 1024 * from, next + 64 + 1024 * from, rows, rows + x->stride, from == 0,
                 run, out + 16 * done, second + 16 * done);
    }
  }
  scale_rows(m, w, x, row, count, out);
  scale_rows(m, next, x, row, count, second);
  return true;
}

constexpr int kPanel = 128;
constexpr int kTiledFrom = 9;  // rows from which tiles beat vectors
// A group of one scale a row may be any multiple of 64; else 32, 64 or 128.

static void tile(const Matrix* m, int b, const Activations* x, int row, int count, float* out,
                 uint8_t* scratch) {
  if (opsin::is_bf16(m->kind)) {
    tile_bf16(m, b, x, row, count, out, scratch);
  } else if (x->tiled) {
    amx_quantized(m, b, x, row, count, out, scratch);
  } else {
    vector_tile(m, b, x, row, count, out);
  }
}
static void matmul_begin(const Matrix* m, int rows) {
  if (opsin::is_bf16(m->kind)) {
    configure_bf16(rows < 16 ? rows : 16);
  } else {
    configure(m->group < 64 ? m->group / 4 : 16, 16);
  }
}
static void matmul_end() { _tile_release(); }

#else

constexpr int kPanel = 64, kTiledFrom = 0;

static void tile(const Matrix* m, int b, const Activations* x, int row, int count, float* out,
                 uint8_t* scratch) {
  if (opsin::is_bf16(m->kind)) {
    tile_bf16(m, b, x, row, count, out, scratch);
  } else {
    vector_tile(m, b, x, row, count, out);
  }
}

#if defined(__AVX512VNNI__)
constexpr int kPairFrom = 16;

// Blocks b and b + 1 at once with each panel, so that what is loaded of either serves several
// products. Memory is asked for the next two meanwhile, evenly over all panels.
static bool vector_pair(const Matrix* m, int b, int after, const Activations* x, int row,
                        int count, float* out, float* second) {
  if (count < kPairFrom) return false;
  const uint8_t* w = m->data + b * m->block_bytes;
  const uint8_t* ahead = after < 0 ? w : m->data + after * m->block_bytes;
  const int passes = count / kCodeRows;
  const int runs = m->padded_k / run_columns(m->kind, m->group);
  const int64_t lines = after < 0 ? 0 : m->block_bytes / (32 * runs * passes) + 1;
  for (int done = 0; done < count; done += kCodeRows) {
    Panel p = panel_of(m, x, row + done, count - done);
    float* to[2] = {out + 16 * done, second + 16 * done};
    if (p.wide < kCodeRows) {
      vector_panel(m, w, p, to[0]);
      vector_panel(m, w + m->block_bytes, p, to[1]);
      break;
    }
    p.lines = (int)lines;
    p.ahead = ahead;
    tile_rows<2, kCodeRows>(m, w, p, to);
    ahead += 64 * lines * runs;
  }
  return true;
}
#else
static bool vector_pair(const Matrix*, int, int, const Activations*, int, int, float*, float*) {
  return false;
}
#endif

static bool pair(const Matrix* m, int b, int after, const Activations* x, int row, int count,
                 float* out, float* second, uint8_t* scratch) {
  if (opsin::is_bf16(m->kind)) return pair_bf16(m, b, x, row, count, out, second, scratch);
  return vector_pair(m, b, after, x, row, count, out, second);
}
static void matmul_begin(const Matrix*, int) {}
static void matmul_end() {}

#endif

template <int KIND>
static void dequantize_codes(const Matrix* m, int row, float* out) {
  const int r = row % 16;
  const uint8_t* block = m->data + (row / 16) * m->block_bytes;
  const uint8_t *head = block + m->heads_at, *codes = block + m->codes_at;
  for (int from = 0; from < m->k; from += m->group, codes += m->code_bytes) {
    const bool f16 = m->scales == opsin::kScaleF16;
    const Scales s = m->scales == opsin::kScaleBytes ? load_scales<true>(head, block, KIND, f16)
                                                     : load_scales<false>(head, block, KIND, f16);
    float scales[16], biases[16];
    store(scales, s.scale);
    store(biases, s.bias);
    const float scale = scales[r], bias = biases[r];
    head += opsin::head_bytes(m->scales);
    const int count = m->k - from < m->group ? m->k - from : m->group;
    for (int c = 0; c < count; c += 4) {
      float four[4];
      for (int i = 0; i < 4; i++) {
        four[i] = (float)code_at<KIND>(codes + r * 4 + i, c / 4) * scale + bias;
      }
      __builtin_memcpy(out + from + c, four, sizeof(float) * (count - c < 4 ? count - c : 4));
    }
  }
}

static void dequantize_row(const Matrix* m, int row, float* out) {
  const int r = row % 16;
  if (opsin::is_bf16(m->kind)) {
    const bool packed = m->kind == opsin::kBf13;
    const Row stored = packed ? row_of(m, row / 16, r)
                              : Row{m->at[row / 16] + r * m->row_bytes, 0, true};
    if (stored.is_plain) {
      const uint16_t* p = (const uint16_t*)stored.at;
      for (int c = 0; c < m->k; c++) out[c] = bf16_to_f32(p[c]);
      return;
    }
    const uint8_t* p = stored.at;
    for (int c = 0; c < m->k; c += kPackedColumns, p += kPackedBytes) {
      V part[2];
      uint16_t halves[kPackedColumns];
      unpack64(p, stored.least, part);
      vstore(halves, part[0]);
      vstore(halves + 32, part[1]);
      for (int i = 0; i < kPackedColumns; i += 16) store(out + c + i, load_bf16(halves + i));
    }
    return;
  }
  if (m->kind == opsin::kQ8) {
    dequantize_codes<opsin::kQ8>(m, row, out);
  } else if (m->kind == opsin::kQ6) {
    dequantize_codes<opsin::kQ6>(m, row, out);
  } else if (m->kind == opsin::kQ5) {
    dequantize_codes<opsin::kQ5>(m, row, out);
  } else {
    dequantize_codes<opsin::kQ4>(m, row, out);
  }
  if (m->rotated) rotate(out, m->k, m->rotated, out);
}

static void quantize(const float* a, int k, int padded_k, int group, int8_t* q, float* scale,
                     float* sum) {
  const int groups = padded_k / group;
  for (int g = 0; g < groups; g++) {
    const int from = g * group;
    float tail[16];
    I top = izero();  // as integers, so that a NaN is the largest of all
    for (int c = 0; c < group && from + c < k; c += 16) {
      const float* p = a + from + c;
      if (from + c + 16 > k) {
        __builtin_memset(tail, 0, sizeof tail);
        __builtin_memcpy(tail, p, sizeof(float) * (k - from - c));
        p = tail;
      }
      top = imax(top, abs_bits(load(p)));
    }
    union {
      int32_t i;
      float f;
    } most = {ihmax(top)};
    const bool finite = most.f <= 3.4028234663852886e38f;
    const bool tiny = most.f < 1e-30f;  // its inverse would overflow: such a group counts as 0
    const float s = tiny ? 0.0f : most.f / 127.0f;
    if (tiny || !finite) {
      __builtin_memset(q + from, 0, group);
      scale[g] = s;
      sum[g] = tiny ? 0.0f : s - s;  // NaN: what is not finite stays so
      continue;
    }
    const F inverse = set1(127.0f / most.f);
    I total = izero();
    for (int c = 0; c < group; c += 16) {
      const float* p = a + from + c;
      if (from + c + 16 > k) {
        __builtin_memset(tail, 0, sizeof tail);
        if (from + c < k) __builtin_memcpy(tail, p, sizeof(float) * (k - from - c));
        p = tail;
      }
      I code = round_int(mul(load(p), inverse));
      store_i8(q + from + c, code);
      total = iadd(total, code);
    }
    scale[g] = s;
    sum[g] = s * (float)ihsum(total);
  }
}

static void narrow(const float* a, int k, int padded_k, uint16_t* o) {
  int c = 0;
  for (; c + 16 <= k; c += 16) store_bf16(o + c, load(a + c));
  for (; c < k; c++) o[c] = f32_to_bf16(a[c]);
  for (; c < padded_k; c++) o[c] = 0;
}

}  // namespace OPSIN_ISA
