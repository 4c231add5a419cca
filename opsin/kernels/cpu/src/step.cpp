// A whole stack of decoder layers in one call.
#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace opsin {

namespace {

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

constexpr int kPieceOfLogits = 8192;  // whose largest one thread finds

// Buffers all threads share during a step.
struct Workspace {
  float* hidden;     // (tokens, dim), the step's own if it has them
  float* qkv;        // (tokens, heads + 2 kv_heads, head_dim)
  float* attended;   // (tokens, heads, head_dim)
  float* middle;     // (tokens, intermediate)
  float* block;      // (tokens, dim): a block's output before its own norm
  float* selected;   // (num_logits, dim)
  float* logits;     // (num_logits, vocabulary), the step's own if it has them
  int64_t* largest;  // (num_logits, pieces) where in its row each piece of logits has its largest
  int64_t* slots;    // (tokens) where the cache keeps each token; below 0: -1 - quantised slot
  int32_t* positions;  // (tokens) index within the sequence
  int32_t* visible_until;  // (tokens) one past the last key seen
  uint8_t* activations;
};

struct Sizes {
  int64_t qkv = 0, attended = 0, middle = 0, activations = 0, own = 0;
};

void widen(Sizes* s, const Matrix* m, int rows) {
  s->activations = std::max(s->activations, activation_bytes(m, rows));
  s->own = std::max(s->own, product_thread_bytes(m));
}

Sizes measure(const OpsinStack& stack, const OpsinStep& step) {
  Sizes s;
  const int64_t tokens = step.tokens;
  for (int i = step.first_layer; i < step.last_layer; i++) {
    const OpsinLayer& l = stack.layers[i];
    const int64_t width = static_cast<int64_t>(l.heads + 2 * l.kv_heads) * l.head_dim;
    s.qkv = std::max(s.qkv, tokens * width * 4);
    s.attended = std::max(s.attended, tokens * l.heads * l.head_dim * 4);
    s.middle = std::max(s.middle, tokens * l.intermediate * 4);
    s.own = std::max(s.own, attention_thread_bytes(l.head_dim, l.head_dim));
    for (const OpsinMatrix* m : {l.qkv, l.out, l.gate_up, l.down}) widen(&s, m, step.tokens);
  }
  if (stack.head && step.num_logits > 0) widen(&s, stack.head, step.num_logits);
  return s;
}

int64_t pieces_of(int64_t columns) { return (columns + kPieceOfLogits - 1) / kPieceOfLogits; }

Workspace carve(const OpsinStack& stack, const OpsinStep& step, const Sizes& s, uint8_t* at,
                int64_t* total) {
  uint8_t* const start = at;
  const auto take = [&at](int64_t bytes) {
    uint8_t* p = at;
    at += aligned(bytes);
    return p;
  };
  const int64_t tokens = step.tokens, rows = stack.head ? step.num_logits : 0;
  const int64_t columns = rows ? stack.head->n : 0;
  Workspace w;
  w.hidden = step.hidden;
  if (!w.hidden) w.hidden = reinterpret_cast<float*>(take(tokens * stack.dim * 4));
  w.logits = step.logits;
  if (!w.logits) w.logits = reinterpret_cast<float*>(take(rows * columns * 4));
  w.largest = reinterpret_cast<int64_t*>(take(rows * pieces_of(columns) * 8));
  w.slots = reinterpret_cast<int64_t*>(take(tokens * 8));
  w.positions = reinterpret_cast<int32_t*>(take(tokens * 4));
  w.visible_until = reinterpret_cast<int32_t*>(take(tokens * 4));
  w.qkv = reinterpret_cast<float*>(take(s.qkv));
  w.attended = reinterpret_cast<float*>(take(s.attended));
  w.middle = reinterpret_cast<float*>(take(s.middle));
  w.block = reinterpret_cast<float*>(take(tokens * stack.dim * 4));
  w.selected = reinterpret_cast<float*>(take(rows * stack.dim * 4));
  w.activations = take(s.activations);
  *total = at - start;
  return w;
}

int64_t early_tokens(const OpsinStep& step) {
  return static_cast<int64_t>(step.early_blocks) * step.early_size;
}

// Where the cache keeps a token of a sequence; below 0: -1 - quantised slot.
int64_t slot_of(const OpsinStep& step, const int32_t* table, int64_t position, bool packed) {
  const int64_t size = step.block_size, first = step.early_size;
  const int64_t late = position - early_tokens(step);
  if (late < 0) return table[position / first] * first + position % first;
  const int64_t slot = table[step.early_blocks + late / size] * size + late % size;
  return packed ? -1 - slot : slot;
}

// Where each token stands, what it sees and where it is kept.
void locate(const OpsinStack& stack, const OpsinStep& step, const Workspace& w) {
  if (step.first_layer == step.last_layer) return;
  const bool packed = stack.layers[step.first_layer].kv_bits != 16;
  for (int s = 0; s < step.sequences; s++) {
    const int32_t* table = step.block_tables + static_cast<int64_t>(s) * step.max_blocks;
    const int end = step.query_start[s + 1];
    for (int t = step.query_start[s]; t < end; t++) {
      const int32_t position = step.num_keys[s] - (end - t);
      w.positions[t] = position;
      w.visible_until[t] = step.visible_until ? step.visible_until[t] : position + 1;
      w.slots[t] = slot_of(step, table, position, packed);
    }
  }
}

Product plain(const Matrix* m, const float* x, float* out, int rows) {
  Product p;
  p.linear = OpsinLinear{};
  p.linear.matrix = m;
  p.linear.x = x;
  p.linear.out = out;
  p.linear.x_stride = m->k;
  p.linear.out_stride = m->n;
  p.linear.x_dtype = OPSIN_F32;
  p.linear.out_dtype = OPSIN_F32;
  p.linear.rows = rows;
  p.linear.activation = -1;
  p.linear.scale = 1.0f;
  return p;
}

struct Run {
  const OpsinStack& stack;
  const OpsinStep& step;
  const Workspace& w;
  Team& team;
  uint8_t* own;

  void normalise(const float* x, const float* weight, const float* bias, float* out) const {
    if (stack.layer_norm) {
      kernels()->layer_norm(x, weight, bias, stack.norm_eps, stack.dim, out);
    } else {
      kernels()->rms_norm(x, weight, stack.norm_eps, stack.dim, out);
    }
  }

  void with_norm(Product* p, const float* weight, const float* bias) const {
    p->norm = weight;
    p->norm_bias = bias;
    p->layer_norm = stack.layer_norm != 0;
    p->eps = stack.norm_eps;
  }

  template <class Work>
  void over_tokens(Work&& work, const Next& next = {}) const {
    const int tokens = step.tokens, chunks = chunks_for(tokens, team.size(), 1);
    const auto some = [&](int c) {
      const int until = chunk_start(tokens, 1, c + 1, chunks);
      for (int t = chunk_start(tokens, 1, c, chunks); t < until; t++) work(t);
    };
    team.phase(chunks, some, [&] { fetch_first(team, next); });
  }

  // Norms of queries and keys, rotation, and the cache rows of one token.
  void place(const OpsinLayer& l, int token) const {
    const Kernels* k = kernels();
    const int width = (l.heads + 2 * l.kv_heads) * l.head_dim;
    float* row = w.qkv + static_cast<int64_t>(token) * width;
    const int half = l.rotary_dim / 2;
    for (int h = 0; h < l.heads + l.kv_heads; h++) {
      float* x = row + h * l.head_dim;
      const float* norm = h < l.heads ? l.query_norm : l.key_norm;
      if (norm) k->rms_norm(x, norm, stack.norm_eps, l.head_dim, x);
      if (l.rope >= 0) {
        const int64_t at = static_cast<int64_t>(step.rope_rows ? step.rope_rows[token] : token) * half;
        k->rope(x, step.cos[l.rope] + at, step.sin[l.rope] + at, l.rotary_dim, l.rope_interleaved);
      }
    }
    const int n = l.kv_heads * l.head_dim;
    const float* fresh = row + l.heads * l.head_dim;
    if (w.slots[token] < 0) {
      pack(l, fresh, -1 - w.slots[token], l.key_cache, l.key_scales);
      pack(l, fresh + n, -1 - w.slots[token], l.value_cache, l.value_scales);
      return;
    }
    // One after the other where this is an early row of a cache that quantises.
    const int64_t apart = l.kv_bits == 16 ? step.block_size : 1;
    const int64_t block = w.slots[token] / apart, within = w.slots[token] % apart;
    for (int64_t h = 0; h < l.kv_heads; h++, fresh += l.head_dim) {
      const int64_t at = ((block * l.kv_heads + h) * apart + within) * l.head_dim;
      k->to_bf16(fresh, l.head_dim, l.key_cache + at);
      k->to_bf16(fresh + n, l.head_dim, l.value_cache + at);
    }
  }

  // Quantised cache rows (kv_heads, head_dim) of one token.
  void pack(const OpsinLayer& l, const float* rows, int64_t slot, void* cache,
            uint16_t* scales) const {
    const int bytes = l.head_dim * l.kv_bits / 8;
    for (int64_t h = 0; h < l.kv_heads; h++) {
      const int64_t at = slot * l.kv_heads + h;
      kernels()->pack_row(rows + h * l.head_dim, l.head_dim, l.kv_groups, l.kv_bits,
                          static_cast<uint8_t*>(cache) + at * bytes,
                          scales + at * 2 * l.kv_groups);
    }
  }

  void attend(const OpsinLayer& l) const {
    const int64_t width = static_cast<int64_t>(l.heads + 2 * l.kv_heads) * l.head_dim;
    const int64_t slot = static_cast<int64_t>(l.kv_heads) * l.head_dim;
    AttentionJob job{};
    job.a.query = w.qkv;
    job.a.key = l.key_cache;
    job.a.value = l.value_cache;
    job.a.out = w.attended;
    job.a.query_start = step.query_start;
    job.a.num_keys = step.num_keys;
    job.a.block_tables = step.block_tables;
    job.a.visible_until = w.visible_until;
    job.a.sinks = l.sinks;
    job.a.query_stride = width;
    job.a.key_stride = job.a.value_stride = slot;
    job.a.out_stride = static_cast<int64_t>(l.heads) * l.head_dim;
    job.a.tokens = step.tokens;
    job.a.sequences = step.sequences;
    job.a.max_blocks = step.max_blocks;
    job.a.block_size = step.block_size;
    job.a.heads = l.heads;
    job.a.kv_heads = l.kv_heads;
    job.a.head_dim = job.a.value_dim = l.head_dim;
    job.a.dtype = OPSIN_F32;
    job.a.scale = l.attention_scale;
    job.a.softcap = l.attention_softcap;
    job.positions = w.positions;
    job.window = l.window;
    job.kept_first = step.kept_first;
    job.kept_last = step.kept_last;
    if (l.kv_bits == 16) {
      job.by_head = true;
      job.a.key_stride = job.a.value_stride = l.head_dim;
    } else {
      job.key_scales = l.key_scales;
      job.value_scales = l.value_scales;
      job.packed = {l.kv_bits, l.kv_groups, step.early_blocks, step.early_size,
                    slot * l.kv_bits / 8, static_cast<int64_t>(l.kv_heads) * 2 * l.kv_groups};
    }
    job.next = {l.out, false, step.tokens};
    attention(team, job, own);
  }

  // A block's last product: added to the hidden rows, through a norm of its own if it has one.
  void finish(const OpsinLayer& l, const Matrix* m, const float* x, const float* after,
              const Next& next) const {
    Product p = plain(m, x, w.hidden, step.tokens);
    p.next = next;
    p.linear.out_stride = stack.dim;
    p.linear.scale = l.residual_scale;
    p.linear.accumulate = 1;
    if (!after) {
      product(team, p, w.activations, own);
      return;
    }
    p.linear.out = w.block;
    p.linear.accumulate = 0;
    p.linear.scale = 1.0f;
    product(team, p, w.activations, own);
    over_tokens([&](int t) {
      float* row = w.block + static_cast<int64_t>(t) * stack.dim;
      normalise(row, after, nullptr, row);
      kernels()->axpy(row, l.residual_scale, stack.dim,
                      w.hidden + static_cast<int64_t>(t) * stack.dim);
    });
  }

  void layer(int index) const {
    const OpsinLayer& l = stack.layers[index];
    Product qkv = plain(l.qkv, w.hidden, w.qkv, step.tokens);
    with_norm(&qkv, l.attention_norm, l.attention_norm_bias);
    product(team, qkv, w.activations, own);
    over_tokens([&](int t) { place(l, t); }, {l.out, false, step.tokens});
    attend(l);
    const Next gate_up = {l.gate_up, l.gated != 0, step.tokens};
    finish(l, l.out, w.attended, l.after_attention_norm, gate_up);
    Product up = plain(l.gate_up, w.hidden, w.middle, step.tokens);
    with_norm(&up, l.mlp_norm, l.mlp_norm_bias);
    up.linear.out_stride = l.intermediate;
    up.linear.gated = l.gated;
    up.linear.activation = l.activation;
    up.next = {l.down, false, step.tokens};
    product(team, up, w.activations, own);
    const Next head = {stack.head, false, step.num_logits};
    const bool last = index + 1 == stack.num_layers;
    const Next qkv_after = last ? head : Next{stack.layers[index + 1].qkv, false, step.tokens};
    finish(l, l.down, w.middle, l.after_mlp_norm, qkv_after);
    for (int i = 0; i < step.num_adds; i++) {
      const OpsinRowAdd& add = step.adds[i];
      if (add.layer != index) continue;
      team.phase(1, [&](int) {
        for (int r = 0; r < add.count; r++) {
          kernels()->axpy(add.values + static_cast<int64_t>(r) * stack.dim, 1.0f, stack.dim,
                          w.hidden + add.rows[r] * stack.dim);
        }
      });
    }
  }

  void embed() const {
    over_tokens([&](int t) {
      float* row = w.hidden + static_cast<int64_t>(t) * stack.dim;
      kernels()->dequantize_row(stack.embedding, step.token_ids[t], row);
      if (stack.embedding_scale == 1.0f) return;
      for (int i = 0; i < stack.dim; i++) row[i] *= stack.embedding_scale;
    });
  }

  void logits() const {
    if (step.normed) {
      over_tokens([&](int t) {
        const int64_t at = static_cast<int64_t>(t) * stack.dim;
        normalise(w.hidden + at, stack.final_norm, stack.final_norm_bias, step.normed + at);
      });
    }
    if (!stack.head || step.num_logits == 0) return;
    const int dim = stack.dim;
    team.phase(1, [&](int) {
      for (int i = 0; i < step.num_logits; i++) {
        const float* row = w.hidden + static_cast<int64_t>(step.logit_rows[i]) * dim;
        normalise(row, stack.final_norm, stack.final_norm_bias,
                  w.selected + static_cast<int64_t>(i) * dim);
      }
    });
    Product p = plain(stack.head, w.selected, w.logits, step.num_logits);
    p.linear.scale = stack.logit_scale;
    product(team, p, w.activations, own);
    if (stack.logit_softcap > 0.0f) cap();
    if (step.likeliest) find_largest();
  }

  void cap() const {
    const int64_t n = static_cast<int64_t>(step.num_logits) * stack.head->n;
    const int chunks = chunks_for(static_cast<int>((n + 4095) / 4096), team.size(), 1);
    team.phase(chunks, [&](int c) {
      for (int64_t i = n * c / chunks; i < n * (c + 1) / chunks; i++) {
        const float x = w.logits[i] / stack.logit_softcap;
        w.logits[i] = stack.logit_softcap * __builtin_tanhf(x);
      }
    });
  }

  // Of each piece of logits, while it is in a cache.
  void find_largest() const {
    const int64_t columns = stack.head->n, pieces = pieces_of(columns);
    team.phase(static_cast<int>(step.num_logits * pieces), [&](int c) {
      const int64_t row = c / pieces, at = c % pieces * kPieceOfLogits;
      const int64_t count = std::min<int64_t>(kPieceOfLogits, columns - at);
      w.largest[c] = at + kernels()->argmax(w.logits + row * columns + at, count);
    });
  }
};

// The first largest of all pieces of each row.
void take_largest(const OpsinStack& stack, const OpsinStep& step, const Workspace& w) {
  const int64_t columns = stack.head->n, pieces = pieces_of(columns);
  for (int i = 0; i < step.num_logits; i++) {
    const float* row = w.logits + i * columns;
    int64_t best = w.largest[i * pieces];
    for (int p = 1; p < pieces; p++) {
      const int64_t at = w.largest[i * pieces + p];
      if (row[at] > row[best] || (row[at] != row[at] && row[best] == row[best])) best = at;
    }
    step.likeliest[i] = static_cast<int32_t>(best);
  }
}

// Whether every sequence has blocks for its keys, and the tokens are all theirs.
bool holds(const OpsinStep& step) {
  for (int s = 0; s < step.sequences; s++) {
    const int tokens = step.query_start[s + 1] - step.query_start[s];
    const int64_t keys = step.num_keys[s], early = std::min(keys, early_tokens(step));
    const int64_t blocks = (early + step.early_size - 1) / step.early_size +
                           (keys - early + step.block_size - 1) / step.block_size;
    if (tokens < 0 || tokens > keys || blocks > step.max_blocks) return false;
  }
  return step.query_start[step.sequences] == step.tokens;
}

bool embeds(const OpsinStack& stack, const OpsinStep& step) {
  if (!stack.embedding || !step.token_ids || stack.embedding->k != stack.dim) return false;
  return std::all_of(step.token_ids, step.token_ids + step.tokens,
                     [&](int32_t id) { return id >= 0 && id < stack.embedding->n; });
}

bool sound(const OpsinStack& stack, const OpsinStep& step) {
  if (step.tokens < 0 || step.first_layer < 0 || step.last_layer > stack.num_layers) return false;
  if (step.block_size <= 0 || step.sequences < 0) return false;
  if (step.kept_first < 0 || step.kept_first > kKeyBlock || step.kept_last < 0) return false;
  if (step.early_blocks < 0 || step.early_size <= 0 || !holds(step)) return false;
  if (!step.hidden && !embeds(stack, step)) return false;
  for (int i = step.first_layer; i < step.last_layer; i++) {
    const OpsinLayer& l = stack.layers[i];
    if (!l.qkv || !l.out || !l.gate_up || !l.down || l.kv_heads <= 0) return false;
    if (l.heads % l.kv_heads != 0 || l.rotary_dim > l.head_dim) return false;
    if (l.kv_bits != 16) {
      if ((l.kv_bits != 8 && l.kv_bits != 4) || !l.key_scales || !l.value_scales) return false;
      if (l.kv_groups <= 0 || l.head_dim % (2 * l.kv_groups) != 0) return false;
    }
    if (l.qkv->k != stack.dim || l.out->n != stack.dim || l.down->n != stack.dim) return false;
    if (l.qkv->n != (l.heads + 2 * l.kv_heads) * l.head_dim) return false;
    if (l.out->k != l.heads * l.head_dim || l.down->k != l.intermediate) return false;
    if (l.gate_up->k != stack.dim) return false;
    if (l.gate_up->n != (l.gated ? 2 : 1) * l.intermediate) return false;
    if (l.gated && l.intermediate % kRows != 0) return false;
  }
  return !stack.head || stack.head->k == stack.dim;
}

}  // namespace

}  // namespace opsin

int opsin_step(const OpsinStack* stack, const OpsinStep* step) {
  using namespace opsin;
  if (!stack || !step || !sound(*stack, *step)) return OPSIN_BAD_ARGUMENT;
  if (step->tokens == 0) return OPSIN_OK;
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> lock(pool.region());
  const Sizes sizes = measure(*stack, *step);
  int64_t total = 0;
  carve(*stack, *step, sizes, nullptr, &total);
  const Workspace w = carve(*stack, *step, sizes, pool.scratch(-1, total), &total);
  locate(*stack, *step, w);
  const int phases = (step->last_layer - step->first_layer) * 14 + step->num_adds + 16;
  pool.run(phases, [&](Team& team) {
    const Run run{*stack, *step, w, team, pool.scratch(team.thread(), sizes.own)};
    if (!step->hidden) run.embed();
    for (int i = step->first_layer; i < step->last_layer; i++) run.layer(i);
    if (step->last_layer == stack->num_layers) run.logits();
  });
  const bool found = step->likeliest && stack->head && step->last_layer == stack->num_layers;
  if (found) take_largest(*stack, *step, w);
  return OPSIN_OK;
}
