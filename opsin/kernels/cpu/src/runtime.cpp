// Products and attention cut into chunks for the team.
#include "runtime.h"

#include <algorithm>
#include <cstring>

namespace opsin {

namespace {

constexpr int64_t kAlign = 64;
constexpr int64_t kNear = 512 << 10;
constexpr int kHeldRows = 2048;    // of sums of blocks, before their results are written,
constexpr int kHeldFewRows = 128;  // where they are sums of a few rows
constexpr int kWaitingRows = 16;  // up to here a product waits for memory more than for arithmetic
constexpr int64_t kChunkBytes = 128 << 10;
constexpr int64_t kFetched = 32 << 10;  // bytes of what comes next, at the end of a phase
// Up to here each thread prepares the activations for itself.
constexpr int kPrivateRows = 8, kPrivateRowsBf16 = 4;

constexpr int kNearKeys = 256;  // whose rows the caches keep until the next head needs its part

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Whole panels of any kind of kernel.
int padded_rows(int rows) {
  const int codes = (rows + 63) / 64 * 64, lanes = (rows + kLaneRows - 1) / kLaneRows * kLaneRows;
  return codes > lanes ? codes : lanes;
}

int64_t row_bytes(const Matrix* m) {
  const int size = !is_bf16(m->kind) ? 1 : kernels()->widen ? 4 : 2;
  const int64_t lines = (static_cast<int64_t>(m->padded_k) * size + 63) / 64;
  return (lines | 1) * 64;
}

struct Prepared {
  uint8_t* data;
  int64_t stride;
  float* scale;
  float* sum;
  int panel_rows;  // as in Activations
  bool tiled;
};

Prepared lay_out(const Matrix* m, int rows, uint8_t* at) {
  const int64_t padded = padded_rows(rows);
  const Kernels* k = kernels();
  Prepared p;
  p.data = at;
  const int tiled_from = is_bf16(m->kind) ? k->by_lane_from : k->tiled_from;
  p.tiled = tiled_from && rows >= tiled_from;
  const int most = !is_bf16(m->kind) ? k->code_rows : k->paired ? kRows : p.tiled ? kLaneRows : 1;
  p.panel_rows = rows < most ? rows : most;
  p.stride = row_bytes(m);
  if (is_bf16(m->kind) && most > 1) {
    p.stride = static_cast<int64_t>(p.panel_rows) * m->padded_k * (k->widen ? 4 : 2);
  } else if (!is_bf16(m->kind)) {
    p.stride = p.tiled ? (m->padded_k + 63) / 64 * 1024 : p.stride * p.panel_rows;
  }
  at += padded * row_bytes(m);
  p.scale = reinterpret_cast<float*>(at);
  at += aligned(padded * m->groups * 4);
  p.sum = reinterpret_cast<float*>(at);
  return p;
}

// Row r, floats in `row`, as codes to where the kernels read them; `row` holds two rows of floats.
void place_codes(const Matrix* m, const Prepared& to, int r, int rows, const float* x, float* row) {
  const Kernels* k = kernels();
  const int first = r / to.panel_rows * to.panel_rows, t = r - first;
  const int left = rows - first;
  const int wide = to.tiled || left > to.panel_rows ? to.panel_rows : left;
  float* scale = to.scale + static_cast<int64_t>(first) * m->groups;
  float* sum = to.sum + static_cast<int64_t>(first) * m->groups;
  uint8_t* panel = to.data + first / to.panel_rows * to.stride;
  if (wide == 1 && !to.tiled) {
    k->quantize(x, m->k, m->padded_k, m->group, reinterpret_cast<int8_t*>(panel), scale, sum);
    return;
  }
  float* scales = row + m->padded_k;
  uint8_t* codes = reinterpret_cast<uint8_t*>(scales + 2 * m->groups);
  k->quantize(x, m->k, m->padded_k, m->group, reinterpret_cast<int8_t*>(codes), scales,
              scales + m->groups);
  for (int g = 0; g < m->groups; g++) {
    scale[g * wide + t] = scales[g];
    sum[g * wide + t] = scales[m->groups + g];
  }
  if (to.tiled) {
    uint8_t* tile = to.data + r / kRows * to.stride + r % kRows * 64;
    for (int c = 0; c < m->padded_k; c += 64) {
      std::memcpy(tile + c * kRows, codes + c, m->padded_k - c < 64 ? m->padded_k - c : 64);
    }
  } else {
    for (int c = 0; c < m->padded_k; c += 4) std::memcpy(panel + c * wide + 4 * t, codes + c, 4);
  }
}

// Row r as bfloat16, to where the kernels read it; `narrow` holds rows of a panel, one at least.
void place_bf16(const Product& p, const Prepared& to, int r, const float* x, uint16_t* narrow) {
  const Matrix* m = p.linear.matrix;
  const Kernels* k = kernels();
  uint8_t* row = to.data + r / to.panel_rows * to.stride;
  const int t = r % to.panel_rows;
  uint16_t* out = narrow;
  if (to.tiled) {
    out += static_cast<int64_t>(t) * m->padded_k;
  } else if (to.panel_rows == 1 && !k->widen) {
    out = reinterpret_cast<uint16_t*>(row);
  }
  if (x) {
    k->narrow(x, m->k, m->padded_k, out);
  } else {
    const uint16_t* stored = static_cast<const uint16_t*>(p.linear.x) + r * p.linear.x_stride;
    std::memcpy(out, stored, 2u * m->k);
    std::memset(out + m->k, 0, 2u * (m->padded_k - m->k));
  }
  if (to.tiled) {
    if (t == kLaneRows - 1 || r == p.linear.rows - 1) {
      k->lay_lanes(narrow, m->padded_k, row);
    }
  } else if (k->widen) {
    k->widen(narrow, m->padded_k, reinterpret_cast<float*>(row));
  } else if (to.panel_rows > 1) {
    uint8_t* panel = row + 4 * t;
    for (int c = 0; c < m->padded_k; c += 2) {
      std::memcpy(panel + static_cast<int64_t>(c) * 2 * to.panel_rows, narrow + c, 4);
    }
  }
}

// What preparing takes: two rows of floats, or one and bfloat16 of a panel's rows.
int64_t preparing_bytes(const Matrix* m) {
  const int64_t second = is_bf16(m->kind) && kernels()->lay_lanes ? 2 * kLaneRows : 4;
  return aligned(m->padded_k * (4 + second));
}

// Rows [from, to): read, normalise, and quantise or narrow. `row` holds preparing_bytes.
void prepare(const Product& p, const Prepared& to, int from, int until, float* row) {
  const Matrix* m = p.linear.matrix;
  const Kernels* k = kernels();
  for (int r = from; r < until; r++) {
    const float* x = row;
    const int64_t offset = r * p.linear.x_stride;
    if (p.linear.x_dtype == OPSIN_F32) {
      x = static_cast<const float*>(p.linear.x) + offset;
    } else if (p.linear.x_dtype == OPSIN_BF16 && is_bf16(m->kind) && !p.norm) {
      x = nullptr;
    } else {
      read_row(p.linear.x, p.linear.x_dtype, offset, m->k, row);
    }
    if (p.norm) {
      if (p.layer_norm) {
        k->layer_norm(x, p.norm, p.norm_bias, p.eps, m->k, row);
      } else {
        k->rms_norm(x, p.norm, p.eps, m->k, row);
      }
      x = row;
    }
    if (is_bf16(m->kind)) {
      place_bf16(p, to, r, x, reinterpret_cast<uint16_t*>(row + m->padded_k));
    } else {
      if (m->rotated) {
        k->rotate(x, m->k, m->rotated, row);
        x = row;
      }
      place_codes(m, to, r, p.linear.rows, x, row);
    }
  }
}

// A thread's own: sums of blocks, of those beside them, and what kernels ask for.
struct Buffers {
  float* tile;
  float* second;
  uint8_t* scratch;
};

Buffers buffers(uint8_t* own) {
  float* tile = reinterpret_cast<float*>(own);
  return {tile, tile + kHeldRows / 2 * 16, own + kHeldRows * 16 * 4};
}

// Rows that a block's sums take up: kernels for many write whole tiles of them.
int slot_rows(int count) {
  return count <= 8 ? count : count <= 16 ? 16 : (count + 31) / 32 * 32;
}

// How many blocks (pairs, when gated) are summed before any result is written. Results go to lines
// that the weights have pushed out of the caches: to fetch such a line amid the weights breaks
// their stream, and rows are far apart, so that many blocks' results of one row are written at once.
int held_blocks(const OpsinLinear& l, int count) {
  const int held = count <= kRows ? kHeldFewRows : l.gated ? kHeldRows / 2 : kHeldRows;
  return held / slot_rows(count) / 2 * 2;
}

// The results of `blocks` blocks of sixteen columns (pairs of them, when gated) from `first` on, to
// where they belong.
void emit(const OpsinLinear& l, int first, int blocks, int row, int count, const Buffers& from) {
  const Matrix* m = l.matrix;
  const int64_t at = row * l.out_stride + first * 16;
  const int step = l.gated ? 2 : 1;
  Emit e;
  e.tile = from.tile;
  e.second = l.gated ? from.second : nullptr;
  e.bias = m->bias ? m->bias + first * step * 16 : nullptr;
  e.second_bias = m->bias && l.gated ? m->bias + first * step * 16 + 16 : nullptr;
  e.bias_step = step * 16;
  e.bf16 = l.out_dtype == OPSIN_BF16;
  e.out = e.bf16 ? static_cast<void*>(static_cast<uint16_t*>(l.out) + at)
                 : static_cast<void*>(static_cast<float*>(l.out) + at);
  e.stride = l.out_stride;
  e.blocks = blocks;
  e.slot_rows = slot_rows(count);
  e.count = count;
  e.columns = (l.gated ? m->n / 2 : m->n) - first * 16;
  e.activation = l.activation;
  e.accumulate = l.accumulate;
  e.scale = l.scale;
  kernels()->emit(&e);
}

// The sums of `blocks` blocks (or pairs) of m from `first` on, with `count` rows from `row` on;
// those from `after` on come next, -1: none.
void sums(const Matrix* m, bool gated, int first, int blocks, int after, const Activations& x,
          int row, int count, const Buffers& to) {
  const Kernels* k = kernels();
  const int size = slot_rows(count) * 16;
  const int then = gated && after > 0 ? after * 2 : after;
  for (int i = 0; i < blocks; i++) {
    const int block = gated ? (first + i) * 2 : first + i;
    const int next = i + (gated ? 1 : 2) < blocks ? block + 2 : then;
    float* tile = to.tile + i * size;
    float* second = gated ? to.second + i * size : tile + size;
    if ((gated || i + 1 < blocks) &&
        k->pair(m, block, next, &x, row, count, tile, second, to.scratch)) {
      if (!gated) i++;
      continue;
    }
    k->tile(m, block, &x, row, count, tile, to.scratch);
    if (gated) k->tile(m, block + 1, &x, row, count, second, to.scratch);
  }
}

// How many blocks of a product (pairs, when gated) make up a run: weights that stay in the second
// cache while every panel of rows passes by.
int64_t run_of(const Matrix* m, int step) {
  const int64_t run = kNear / (m->block_bytes * step);
  return run < 2 ? 2 / step : run / 2 * 2;
}

bool is_gathered(const Matrix* m, const Activations& x, int rows) {
  return is_bf16(m->kind) && (kernels()->paired ? rows > kernels()->panel_bf16 : x.tiled);
}

// Of a block as kernels for many rows read it, and of all that are gathered at once.
int64_t gathered_block_bytes(const Matrix* m) {
  return int64_t{kRows} * m->padded_k * (kernels()->widen ? 4 : 2);
}

int64_t gathered_bytes(const Matrix* m) {
  if (!is_bf16(m->kind)) return 0;
  const int64_t run = run_of(m, 1);
  return run * gathered_block_bytes(m) + aligned(run * static_cast<int64_t>(sizeof(*m->at)));
}

// Blocks [from, until) of a bf16 matrix as `gather` lays them out; they are numbered from 0.
Matrix gathered(const Matrix* m, int from, int until, uint8_t* at) {
  Matrix tiled = *m;
  tiled.kind = kBf16;
  tiled.blocks = until - from;
  tiled.row_bytes = 64;
  tiled.step_bytes = 64 * kRows;
  tiled.at = reinterpret_cast<const uint8_t**>(at);
  uint8_t* const plain = at + gathered_bytes(m);
  at += aligned(tiled.blocks * static_cast<int64_t>(sizeof(*tiled.at)));
  for (int b = from; b < until; b++, at += gathered_block_bytes(m)) {
    tiled.at[b - from] = at;
    kernels()->gather(m, b, at, plain);
  }
  return tiled;
}

// Blocks (or pairs) [from, until) of a product; those from `after` on come next, -1: none.
void multiply(const Product& p, const Activations& x, int from, int until, int after,
              uint8_t* own) {
  const OpsinLinear& l = p.linear;
  const Kernels* k = kernels();
  const Buffers held = buffers(own);
  const int step = l.gated ? 2 : 1;
  const int panel = is_bf16(l.matrix->kind) ? k->panel_bf16 : k->panel;
  const int64_t run = run_of(l.matrix, step);
  Matrix tiled;
  k->matmul_begin(l.matrix, l.rows);
  for (int64_t first = from; first < until; first += run) {
    const int last = static_cast<int>(first + run < until ? first + run : until);
    const Matrix* m = l.matrix;
    int before = 0;  // blocks (or pairs) that m leaves out in front
    if (is_gathered(m, x, l.rows)) {
      before = static_cast<int>(first);
      tiled = gathered(m, before * step, last * step, held.scratch);
      m = &tiled;
    }
    for (int row = 0; row < l.rows; row += panel) {
      const int count = l.rows - row < panel ? l.rows - row : panel;
      const int most = held_blocks(l, count);
      for (int at = static_cast<int>(first); at < last; at += most) {
        const int blocks = last - at < most ? last - at : most;
        const int then = at + blocks < last ? at + blocks : last < until ? last : after;
        sums(m, l.gated, at - before, blocks, then, x, row, count, held);
        emit(l, at, blocks, row, count, held);
      }
    }
  }
  k->matmul_end();
}

}  // namespace

void read_row(const void* x, int dtype, int64_t offset, int n, float* out) {
  if (dtype == OPSIN_F32) {
    std::memcpy(out, static_cast<const float*>(x) + offset, 4u * n);
  } else {
    kernels()->from_bf16(static_cast<const uint16_t*>(x) + offset, n, out);
  }
}

void write_row(const float* x, int dtype, int64_t offset, int n, void* out) {
  if (dtype == OPSIN_F32) {
    std::memcpy(static_cast<float*>(out) + offset, x, 4u * n);
  } else {
    kernels()->to_bf16(x, n, static_cast<uint16_t*>(out) + offset);
  }
}

int64_t activation_bytes(const Matrix* m, int rows) {
  const int64_t padded = padded_rows(rows);
  return padded * row_bytes(m) +
         2 * aligned(padded * m->groups * 4);
}

int64_t product_thread_bytes(const Matrix* m) {
  return activation_bytes(m, kPrivateRows) + preparing_bytes(m) + kHeldRows * 16 * 4 +
         tile_scratch_bytes(m) + gathered_bytes(m);
}

namespace {

// How a product is cut: blocks, or pairs where gated, of which `unit` stay together.
struct Cut {
  int blocks, unit, chunks;
  int start(int chunk) const { return chunk_start(blocks, unit, chunk, chunks); }
};

// A small matrix goes in fewer chunks: each begins a stream of memory and is handed out at a cost.
Cut cut(const Matrix* m, bool gated, int rows, int threads) {
  Cut c;
  c.blocks = gated ? m->blocks / 2 : m->blocks;
  c.unit = rows >= kRows ? 2 : 1;  // blocks that kernels for many take together
  c.chunks = chunks_for((c.blocks + c.unit - 1) / c.unit, threads, 1);
  if (threads == 1 || rows > kWaitingRows) return c;
  const int64_t each = m->bytes / (threads * kChunkBytes);
  c.chunks = std::min(c.chunks, threads * static_cast<int>(each < 2 ? 2 : each));
  return c;
}

// The chunk that is handed out as number i: as long as no thread is late, each goes through a part
// of its own, in order.
int in_parts(int i, int chunks, int threads) {
  const int part = i % threads, more = chunks % threads;
  return part * (chunks / threads) + std::min(part, more) + i / threads;
}

}  // namespace

void fetch_first(const Team& team, const Next& next) {
  const Matrix* m = next.matrix;
  if (!m || next.rows > kWaitingRows) return;
  const Cut c = cut(m, next.gated, next.rows, team.size());
  if (team.thread() >= c.chunks) return;
  const int block = c.start(in_parts(team.thread(), c.chunks, team.size())) * (next.gated ? 2 : 1);
  const uint8_t* p = m->kind == kBf16 ? m->at[block] : m->data + block * m->block_bytes;
  if (!p) return;
  const int64_t bytes = std::min(kFetched, (m->blocks - block) * m->block_bytes);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

void product(Team& team, const Product& p, uint8_t* shared, uint8_t* own) {
  const Matrix* m = p.linear.matrix;
  const int rows = p.linear.rows;
  const Cut c = cut(m, p.linear.gated, rows, team.size());
  float* row = reinterpret_cast<float*>(own + activation_bytes(m, kPrivateRows));
  uint8_t* scratch = own + activation_bytes(m, kPrivateRows) + preparing_bytes(m);
  const bool alone = rows <= (is_bf16(m->kind) ? kPrivateRowsBf16 : kPrivateRows);
  const Prepared prepared = lay_out(m, rows, alone ? own : shared);
  bool ready = !alone;
  if (!alone) {
    // A panel is one thread's: two that write to the same lines wait for each other.
    const bool apart = is_bf16(m->kind) && !prepared.tiled;
    const int panel = apart ? 1 : prepared.panel_rows;
    const int pieces = chunks_for((rows + panel - 1) / panel, team.size(), panel == 1 ? 4 : 1);
    team.phase(pieces, [&](int i) {
      prepare(p, prepared, chunk_start(rows, panel, i, pieces),
              chunk_start(rows, panel, i + 1, pieces), row);
    });
  }
  const Activations x = {prepared.data, prepared.stride, prepared.scale, prepared.sum,
                         prepared.panel_rows, prepared.tiled};
  const auto work = [&](int i) {
    if (!ready) {
      prepare(p, prepared, 0, rows, row);
      ready = true;
    }
    const int chunk = in_parts(i, c.chunks, team.size()), then = i + team.size();
    multiply(p, x, c.start(chunk), c.start(chunk + 1),
             then < c.chunks ? c.start(in_parts(then, c.chunks, team.size())) : -1, scratch);
  };
  team.phase(c.chunks, work, [&] { fetch_first(team, p.next); });
}

int64_t attention_thread_bytes(int head_dim, int value_dim) {
  const int64_t dim = (head_dim + 31) / 32 * 32, wide = (value_dim + 31) / 32 * 32;
  return aligned(kAttentionRows * dim * 2) + aligned(kAttentionRows * wide * 4) +
         aligned(dim * 4) + attention_scratch_bytes(head_dim, value_dim);
}

namespace {

struct Tile {
  int sequence, token, tokens, kv_head, head, heads;
  bool keep;   // all tokens see the same keys, which are few,
  bool again;  // and the same thread has just taken others of this head
};

// Which rows a unit holds: units count over sequences, then tiles of tokens, then kv heads; or heads
// first, where keys are taken again by one tile of tokens after the other.
struct Units {
  int per_kv, head_pieces, tokens_per_tile;
};

Units cut(const OpsinAttention& a) {
  Units u;
  u.per_kv = a.heads / a.kv_heads;
  u.head_pieces = (u.per_kv + kAttentionRows - 1) / kAttentionRows;
  const int rows = u.head_pieces > 1 ? kAttentionRows : u.per_kv;
  u.tokens_per_tile = kAttentionRows / rows;
  return u;
}

struct Rows {
  const uint16_t *keys, *values;
  const int32_t* table;
};

// Where the keys and values of a kv head of a sequence lie, where they are not quantised.
Rows rows_of(const AttentionJob& job, int sequence, int kv_head) {
  const OpsinAttention& a = job.a;
  const int64_t first = a.block_size == 0 && a.key_start ? a.key_start[sequence] : 0;
  const int64_t before = static_cast<int64_t>(kv_head) * (job.by_head ? a.block_size : 1);
  return {static_cast<const uint16_t*>(a.key) + first * a.key_stride + before * a.head_dim,
          static_cast<const uint16_t*>(a.value) + first * a.value_stride + before * a.value_dim,
          a.block_size ? a.block_tables + static_cast<int64_t>(sequence) * a.max_blocks : nullptr};
}

// `next` is what the thread probably takes after this, or null.
void run_unit(const AttentionJob& job, const Tile& t, const Tile* next, uint8_t* own) {
  const OpsinAttention& a = job.a;
  const int dim = (a.head_dim + 31) / 32 * 32, wide = (a.value_dim + 31) / 32 * 32;
  uint16_t* queries = reinterpret_cast<uint16_t*>(own);
  float* out = reinterpret_cast<float*>(own + aligned(kAttentionRows * dim * 2));
  float* row = out + kAttentionRows * wide;
  uint8_t* scratch = reinterpret_cast<uint8_t*>(row) + aligned(dim * 4);
  int32_t lo[kAttentionRows], hi[kAttentionRows];
  int32_t first_lo[kAttentionRows], first_hi[kAttentionRows];
  bool any_first = false;
  float sinks[kAttentionRows];
  const Kernels* k = kernels();
  int rows = 0;
  for (int token = t.token; token < t.token + t.tokens; token++) {
    const int32_t until = a.visible_until ? a.visible_until[token] : a.num_keys[t.sequence];
    int32_t from = a.visible_from ? a.visible_from[token] : 0;
    if (job.window > 0) {
      const int32_t start = job.positions[token] + 1 - job.window;
      from = start > from ? start : from;
    }
    const int32_t seen = from;
    int32_t first = 0;
    if (job.kept_last > 0) {
      const int32_t start = job.positions[token] + 1 - job.kept_last;
      if (start > from && start > job.kept_first) {  // else the two ranges are one
        from = start;
        first = job.kept_first < until ? job.kept_first : until;
      }
      any_first |= first > seen;
    }
    for (int h = t.head; h < t.head + t.heads; h++, rows++) {
      uint16_t* q = queries + rows * dim;
      const int64_t at = token * a.query_stride + static_cast<int64_t>(h) * a.head_dim;
      if (a.dtype == OPSIN_F32) {
        k->narrow(static_cast<const float*>(a.query) + at, a.head_dim, dim, q);
      } else {
        std::memcpy(q, static_cast<const uint16_t*>(a.query) + at, 2u * a.head_dim);
        std::memset(q + a.head_dim, 0, 2u * (dim - a.head_dim));
      }
      lo[rows] = from;
      hi[rows] = until;
      first_lo[rows] = seen;
      first_hi[rows] = first;
      sinks[rows] = a.sinks ? a.sinks[h] : 0.0f;
    }
  }
  const AttentionShape shape = {a.head_dim, a.value_dim, a.key_stride, a.value_stride,
                                a.block_size, a.block_size * (job.by_head ? a.kv_heads : 1),
                                a.scale, a.softcap, job.packed};
  AttentionUnit unit;
  unit.queries = queries;
  unit.rows = rows;
  unit.lo = lo;
  unit.hi = hi;
  unit.first_lo = any_first ? first_lo : nullptr;
  unit.first_hi = first_hi;
  unit.sinks = a.sinks ? sinks : nullptr;
  const Rows of = rows_of(job, t.sequence, t.kv_head);
  unit.keys = of.keys;
  unit.values = of.values;
  if (job.packed.bits) {
    const int64_t codes = static_cast<int64_t>(t.kv_head) * a.head_dim * job.packed.bits / 8;
    unit.key_codes = static_cast<const uint8_t*>(a.key) + codes;
    unit.value_codes = static_cast<const uint8_t*>(a.value) + codes;
    unit.key_scales = job.key_scales + t.kv_head * 2 * job.packed.groups;
    unit.value_scales = job.value_scales + t.kv_head * 2 * job.packed.groups;
  }
  unit.block_table = of.table;
  unit.num_keys = a.num_keys[t.sequence];
  unit.next_keys = nullptr;
  if (next && !job.packed.bits && rows <= kRows) {
    const Rows then = rows_of(job, next->sequence, next->kv_head);
    unit.next_keys = then.keys;
    unit.next_values = then.values;
    unit.next_table = then.table;
    unit.next_num_keys = a.num_keys[next->sequence];
    const int seen = job.window > 0 ? unit.next_num_keys - job.window : 0;
    unit.next_from = seen > 0 ? seen / kKeyBlock * kKeyBlock : 0;
  }
  unit.keep = t.keep;
  unit.again = t.again;
  unit.out = out;
  unit.scratch = scratch;
  k->attention(&shape, &unit);
  rows = 0;
  for (int token = t.token; token < t.token + t.tokens; token++) {
    for (int h = t.head; h < t.head + t.heads; h++, rows++) {
      const int64_t at = token * a.out_stride + static_cast<int64_t>(h) * a.value_dim;
      write_row(out + rows * wide, a.dtype, at, a.value_dim, a.out);
    }
  }
}

// A sequence and the units of those before it.
struct Place {
  int sequence, before;
};

// Where units lie among those of all sequences.
class Order {
 public:
  Order(const AttentionJob& job, const Units& u) : a_(job.a), u_(u) {
    // Tiles of registers read keys from where they lie: there is nothing to keep.
    whole_ = !kernels()->paired && !a_.visible_from && !a_.visible_until && !job.window &&
             !job.kept_last && !job.packed.bits && u.head_pieces == 1;
  }

  int units(int sequence) const { return tiles(sequence) * a_.kv_heads * u_.head_pieces; }

  // Heads go first where each of them has many keys; else all heads of the same tokens go together,
  // since they lie side by side.
  bool heads_first(int sequence) const { return whole_ && a_.num_keys[sequence] > kNearKeys; }

  // How many units a thread takes at once, of `total`.
  int together(int total, int threads) const {
    const int few = total / (4 * threads), per_tile = a_.kv_heads * u_.head_pieces;
    if (!heads_first(0)) return per_tile <= few ? per_tile : 1;
    return few < 2 ? 1 : tiles(0) < few && tiles(0) > 0 ? tiles(0) : few;
  }

  // A unit, where `each` are taken at once and it is not the first of them; `at` is not beyond it.
  Tile tile(int unit, int each, bool begun, Place* at) const {
    while (unit >= at->before + units(at->sequence)) at->before += units(at->sequence++);
    const int sequence = at->sequence, local = unit - at->before;
    const int per_tile = a_.kv_heads * u_.head_pieces, count = tiles(sequence);
    const bool heads = heads_first(sequence);
    const int nth = heads ? local % count : local / per_tile;
    const int piece = heads ? local / count : local % per_tile;
    Tile t;
    t.sequence = sequence;
    t.kv_head = piece / u_.head_pieces;
    t.token = a_.query_start[sequence] + nth * u_.tokens_per_tile;
    const int left = a_.query_start[sequence + 1] - t.token;
    t.tokens = left < u_.tokens_per_tile ? left : u_.tokens_per_tile;
    const int part = piece % u_.head_pieces;
    t.head = t.kv_head * u_.per_kv + part * kAttentionRows;
    const int heads_left = u_.per_kv - part * kAttentionRows;
    t.heads = heads_left < kAttentionRows ? heads_left : kAttentionRows;
    t.keep = heads && a_.num_keys[sequence] <= kKeptBlocks * kKeyBlock;
    t.again = t.keep && begun && nth > 0;
    return t;
  }

 private:
  int tiles(int sequence) const {
    const int tokens = a_.query_start[sequence + 1] - a_.query_start[sequence];
    return (tokens + u_.tokens_per_tile - 1) / u_.tokens_per_tile;
  }

  const OpsinAttention& a_;
  Units u_;
  bool whole_;
};

}  // namespace

void attention(Team& team, const AttentionJob& job, uint8_t* own) {
  const OpsinAttention& a = job.a;
  const Order order(job, cut(a));
  int total = 0;
  for (int s = 0; s < a.sequences; s++) total += order.units(s);
  // Units differ in length: hand them out one by one, where there are not many.
  const int each = total ? order.together(total, team.size()) : 1;
  Place at{0, 0};
  team.phase((total + each - 1) / each, [&](int c) {
    const int until = std::min((c + 1) * each, total);
    for (int unit = c * each; unit < until; unit++) {
      const Tile tile = order.tile(unit, each, unit > c * each, &at);
      const int then = unit + 1 < until ? unit + 1 : (c + team.size()) * each;
      Place beyond = at;
      const Tile next = then < total ? order.tile(then, each, false, &beyond) : tile;
      run_unit(job, tile, then < total ? &next : nullptr, own);
    }
  }, [&] { fetch_first(team, job.next); });
}

}  // namespace opsin
