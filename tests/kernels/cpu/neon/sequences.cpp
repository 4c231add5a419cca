// Attention over dense rows and over caches at every width, and whole stacks of layers.
#include "beside.h"

namespace beside {

namespace {

using Ints = std::vector<int32_t>;

constexpr int kBlock = 16;

// Sequences in shuffled blocks of a cache whose unused slots are not numbers.
struct Cache {
  Ints num_keys, query_start{0}, tables, from, until;
  int max_blocks = 0, dim, value_dim, kv_heads;
  Halves keys, values;
  std::vector<std::vector<int64_t>> slots;  // of each sequence's keys

  Cache(const Ints& contexts, const Ints& queries, int heads, int width, int value_width,
        int window)
      : num_keys(contexts), dim(width), value_dim(value_width), kv_heads(heads) {
    int total = 3;
    for (const int c : contexts) total += (c + kBlock - 1) / kBlock;
    for (const int c : contexts) max_blocks = std::max(max_blocks, (c + kBlock - 1) / kBlock);
    Ints order(total);
    for (int i = 0; i < total; i++) order[i] = i;
    for (int i = total; i-- > 1;) std::swap(order[i], order[dice.below(i + 1)]);
    tables.assign(contexts.size() * max_blocks, 0);
    keys.assign(size_t(total) * kBlock * heads * width, 0x7fc0);
    values.assign(size_t(total) * kBlock * heads * value_width, 0x7fc0);
    int used = 0;
    for (size_t s = 0; s < contexts.size(); s++) {
      slots.emplace_back();
      for (int k = 0; k < contexts[s]; k++) {
        int32_t& block = tables[s * max_blocks + k / kBlock];
        if (k % kBlock == 0) block = order[used++];
        slots.back().push_back(int64_t{block} * kBlock + k % kBlock);
        put(&keys, slots.back().back(), heads * width);
        put(&values, slots.back().back(), heads * value_width);
      }
      query_start.push_back(query_start.back() + queries[s]);
      for (int q = contexts[s] - queries[s]; q < contexts[s]; q++) {
        until.push_back(q + 1);
        from.push_back(window && q + 1 > window ? q + 1 - window : 0);
      }
    }
  }

  static void put(Halves* rows, int64_t slot, int width) {
    const Halves fresh = narrowed(normals(width));
    std::copy(fresh.begin(), fresh.end(), rows->begin() + slot * width);
  }
};

struct Options {
  float softcap = 0.0f;
  bool sinks = false;
  int dtype = OPSIN_F32;
};

Floats attend(const Cache& c, const Floats& query, int heads, const Options& o, const Floats& sinks,
              int first = 0, int count = -1) {
  const int tokens = count < 0 ? c.query_start.back() : count;
  Floats out(size_t(tokens) * heads * c.value_dim);
  Halves half(out.size());
  const Halves narrow = narrowed(query);
  const int64_t skipped = int64_t{first} * heads * c.dim;
  const int32_t one[2] = {0, tokens};
  const bool wide = o.dtype == OPSIN_F32;
  OpsinAttention a{};
  a.query = wide ? static_cast<const void*>(query.data() + skipped) : narrow.data() + skipped;
  a.out = wide ? static_cast<void*>(out.data()) : half.data();
  a.key = c.keys.data();
  a.value = c.values.data();
  a.query_start = count < 0 ? c.query_start.data() : one;
  a.num_keys = c.num_keys.data();
  a.block_tables = c.tables.data();
  a.visible_from = c.from.data() + first;
  a.visible_until = c.until.data() + first;
  a.sinks = o.sinks ? sinks.data() : nullptr;
  a.query_stride = int64_t{heads} * c.dim;
  a.key_stride = int64_t{c.kv_heads} * c.dim;
  a.value_stride = int64_t{c.kv_heads} * c.value_dim;
  a.out_stride = int64_t{heads} * c.value_dim;
  a.tokens = tokens;
  a.sequences = count < 0 ? static_cast<int>(c.num_keys.size()) : 1;
  a.max_blocks = c.max_blocks;
  a.block_size = kBlock;
  a.heads = heads;
  a.kv_heads = c.kv_heads;
  a.head_dim = c.dim;
  a.value_dim = c.value_dim;
  a.dtype = o.dtype;
  a.scale = 0.125f;
  a.softcap = o.softcap;
  if (opsin_attention(&a)) std::abort();
  return wide ? out : widened(half);
}

// One row in double arithmetic: `key(k)` and `value(k)` point to rows of k's head.
template <class Key, class Value>
void attend_plainly(const Floats& query, size_t at, int dim, int value_dim, int from, int until,
                    float softcap, const float* sink, Key key, Value value,
                    std::vector<double>* out) {
  std::vector<double> sums(value_dim);
  double total = sink ? std::exp(double{*sink}) : 0.0;
  for (int k = from; k < until; k++) {
    double score = 0.0;
    for (int d = 0; d < dim; d++) score += double{query[at + d]} * widen(key(k)[d]);
    score *= 0.125;
    if (softcap > 0.0f) score = softcap * std::tanh(score / softcap);
    const double weight = std::exp(score);
    total += weight;
    for (int d = 0; d < value_dim; d++) sums[d] += weight * widen(value(k)[d]);
  }
  for (const double s : sums) out->push_back(s / total);
}

std::vector<double> attend_plainly(const Cache& c, const Floats& query, int heads, const Options& o,
                                   const Floats& sinks) {
  std::vector<double> out;
  for (size_t s = 0; s < c.num_keys.size(); s++) {
    for (int t = c.query_start[s]; t < c.query_start[s + 1]; t++) {
      for (int h = 0; h < heads; h++) {
        const int head = h / (heads / c.kv_heads);
        const auto row = [&, s](const Halves& rows, int width, int k) {
          return rows.data() + (c.slots[s][k] * c.kv_heads + head) * width;
        };
        attend_plainly(
            query, (size_t(t) * heads + h) * c.dim, c.dim, c.value_dim, c.from[t], c.until[t],
            o.softcap, o.sinks ? &sinks[h] : nullptr, [&](int k) { return row(c.keys, c.dim, k); },
            [&](int k) { return row(c.values, c.value_dim, k); }, &out);
      }
    }
  }
  return out;
}

void dense(int dim) {
  const Ints starts = {0, 1, 131, 195}, counts = {1, 130, 64};
  const int tokens = 195, heads = 3;
  const Floats query = widened(narrowed(normals(int64_t{tokens} * heads * dim)));
  const Halves keys = narrowed(normals(static_cast<int64_t>(query.size())));
  const Halves values = narrowed(normals(static_cast<int64_t>(query.size())));
  const std::string name = "dense attention of " + std::to_string(dim);
  Floats out(query.size());
  OpsinAttention a{};
  a.query = query.data();
  a.key = keys.data();
  a.value = values.data();
  a.out = out.data();
  a.query_start = a.key_start = starts.data();
  a.num_keys = counts.data();
  a.query_stride = a.key_stride = a.value_stride = a.out_stride = int64_t{heads} * dim;
  a.tokens = tokens;
  a.sequences = 3;
  a.heads = a.kv_heads = heads;
  a.head_dim = a.value_dim = dim;
  a.scale = 0.125f;
  both(name, [&](auto) {
    if (opsin_attention(&a)) std::abort();
    return out;
  });
  std::vector<double> want;
  for (int t = 0; t < tokens; t++) {
    const int s = t < 1 ? 0 : t < 131 ? 1 : 2;
    for (int h = 0; h < heads; h++) {
      const auto row = [&](const Halves& rows, int k) {
        return rows.data() + (int64_t{starts[s] + k} * heads + h) * dim;
      };
      attend_plainly(
          query, (size_t(t) * heads + h) * dim, dim, dim, 0, counts[s], 0.0f, nullptr,
          [&](int k) { return row(keys, k); }, [&](int k) { return row(values, k); }, &want);
    }
  }
  near(name + " beside double", out, want, 0.012);
}

}  // namespace

void attention() {
  struct Shape {
    int heads, kv_heads, dim, value_dim, window;
    Options options;
  };
  const Shape shapes[] = {{4, 2, 64, 64, 0, {}},
                          {6, 1, 80, 80, 100, {}},
                          {4, 2, 96, 48, 0, {5.0f, true, OPSIN_BF16}},
                          {70, 1, 32, 32, 0, {0.0f, true, OPSIN_F32}}};
  for (const Shape& s : shapes) {
    const bool many = s.heads > 8;
    const Cache cache(many ? Ints{40} : Ints{3, 600, 65}, many ? Ints{2} : Ints{3, 12, 1},
                      s.kv_heads, s.dim, s.value_dim, s.window);
    const int64_t numbers = int64_t{cache.query_start.back()} * s.heads * s.dim;
    const Floats query = widened(narrowed(normals(numbers)));
    const Floats sinks = normals(s.heads);
    const std::string name = "attention of " + std::to_string(s.heads) + " heads";
    const Floats got =
        both(name, [&](auto) { return attend(cache, query, s.heads, s.options, sinks); });
    near(name + " beside double", got, attend_plainly(cache, query, s.heads, s.options, sinks),
         s.options.dtype == OPSIN_F32 ? 0.012 : 0.03);
  }
  const Cache cache({530}, {530}, 2, 64, 64, 70);
  const Floats query = normals(530 * 4 * 64);
  use("neon", 3);
  const Floats whole = attend(cache, query, 4, {}, {});
  for (const auto& [start, count] : {std::pair{0, 1}, {5, 33}, {509, 4}, {529, 1}}) {
    use("neon", 1 + count % 2);
    const auto from = whole.begin() + start * 256;
    Cache part = cache;
    part.num_keys[0] = start + count;
    same("attention in chunks", attend(part, query, 4, {}, {}, start, count),
         Floats(from, from + count * 256));
  }
  for (const int dim : {64, 72}) dense(dim);
}

// Rows of a cache at 8 and 4 bits behind blocks of plain ones; some blocks were given back.
void packed_attention() {
  constexpr int dim = 96, keys = 200, early = 2, late = 16;
  for (const int bits : {8, 4}) {
    const int early_size = kBlock * bits / 16, groups = bits == 8 ? 1 : 3;
    const int code_bytes = dim * bits / 8;
    const Halves plain_keys = narrowed(normals(early * early_size * dim));
    const Halves plain_values = narrowed(normals(early * early_size * dim));
    Bytes codes[2];
    Halves scales[2];
    for (int i = 0; i < 2; i++) {
      codes[i].resize(size_t(late) * kBlock * code_bytes);
      scales[i].resize(size_t(late) * kBlock * 2 * groups);
      for (int slot = 0; slot < late * kBlock; slot++) {
        opsin::portable_kernels()->pack_row(normals(dim).data(), dim, groups, bits,
                                            codes[i].data() + slot * code_bytes,
                                            scales[i].data() + slot * 2 * groups);
      }
    }
    Ints table = {1, 0};
    for (int i = 0; i < late; i++) table.push_back(i == 3 ? -1 : (i * 5) % late);
    for (const int rows : {1, 5, 17, 64}) {
      const Halves query = narrowed(normals(rows * dim));
      Ints lo(rows), hi(rows), first_lo(rows, 0), first_hi(rows, 9);
      for (int r = 0; r < rows; r++) {
        lo[r] = 100 + dice.below(30);
        hi[r] = lo[r] + 1 + dice.below(keys - lo[r]);
      }
      const Floats sinks = normals(rows);
      opsin::AttentionShape shape{dim, dim, dim, dim, kBlock, kBlock, 0.1f, rows == 5 ? 4.0f : 0.0f, {}};
      shape.packed = {bits, groups, early, early_size, code_bytes, 2 * groups};
      opsin::AttentionUnit unit{};
      unit.queries = query.data();
      unit.rows = rows;
      unit.lo = lo.data();
      unit.hi = hi.data();
      unit.first_lo = rows == 17 ? nullptr : first_lo.data();
      unit.first_hi = first_hi.data();
      unit.keys = plain_keys.data();
      unit.values = plain_values.data();
      unit.key_codes = codes[0].data();
      unit.value_codes = codes[1].data();
      unit.key_scales = scales[0].data();
      unit.value_scales = scales[1].data();
      unit.block_table = table.data();
      unit.sinks = rows == 5 ? sinks.data() : nullptr;
      unit.num_keys = keys;
      both("cache at " + std::to_string(bits) + " bits, " + std::to_string(rows) + " rows",
           [&](const opsin::Kernels* k) {
             Floats out(size_t(rows) * dim);
             Floats scratch(opsin::attention_scratch_bytes(dim, dim) / 4 + 32);
             unit.out = out.data();
             const uintptr_t at = (reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64;
             unit.scratch = reinterpret_cast<uint8_t*>(at);
             k->attention(&shape, &unit);
             return out;
           });
    }
  }
}

namespace {

constexpr int kDim = 64, kHeads = 4, kKvHeads = 2, kHeadDim = 32, kInner = 96, kVocabulary = 83;
constexpr int kTokens = 90, kBlocks = 8;

// Two layers of one kind of matrix, and a cache of some bits for one sequence.
struct Model {
  int bits;
  Packed qkv, out, gate_up, down, head;
  Floats norm, head_norm, hidden, cos, sin;

  Model(int kind, int cache_bits)
      : bits(cache_bits), qkv((kHeads + 2 * kKvHeads) * kHeadDim, form(kind, kDim)),
        out(kDim, form(kind, kHeads * kHeadDim)), gate_up(2 * kInner, form(kind, kDim)),
        down(kDim, form(kind, kInner)), head(kVocabulary, form(kind, kDim)) {
    use("portable");
    for (Packed* w : {&qkv, &out, &gate_up, &down, &head}) {
      const Floats weights = normals(int64_t{w->m->n} * w->form.k, 0.15f);
      w->fill(weights.data(), OPSIN_F32, 0, w->m->n, 1);
      w->fill_bias(normals(w->m->n, 0.1f));
    }
    norm = normals(kDim);
    head_norm = normals(kHeadDim);
    hidden = normals(kTokens * kDim);
    for (const float a : normals(kTokens * kHeadDim / 2)) {
      cos.push_back(std::cos(a));
      sin.push_back(std::sin(a));
    }
  }
  static Form form(int kind, int k) { return {kind, k, 32, OPSIN_F16, 0}; }
};

OpsinLayer layer_of(const Model& m, bool plain) {
  OpsinLayer l{};
  l.qkv = m.qkv.m;
  l.out = m.out.m;
  l.gate_up = m.gate_up.m;
  l.down = m.down.m;
  l.attention_norm = l.mlp_norm = m.norm.data();
  l.query_norm = l.key_norm = plain ? nullptr : m.head_norm.data();
  l.after_mlp_norm = plain ? nullptr : m.norm.data();
  l.heads = kHeads;
  l.kv_heads = kKvHeads;
  l.head_dim = kHeadDim;
  l.intermediate = kInner;
  l.rotary_dim = kHeadDim;
  l.rope_interleaved = plain;
  l.window = plain ? 0 : 40;
  l.gated = 1;
  l.activation = plain ? 0 : 1;
  l.attention_scale = 0.18f;
  l.attention_softcap = plain ? 0.0f : 8.0f;
  l.residual_scale = plain ? 1.0f : 0.5f;
  l.kv_bits = m.bits;
  l.kv_groups = m.bits == 4 ? 2 : 1;
  return l;
}

// Logits of every token, the tokens run in pieces that end at `ends`.
Floats run(const Model& m, const Ints& ends) {
  const Ints table = {3, 0, 6, 1, 7, 2, 5, 4};
  const size_t row = size_t(kKvHeads) * kHeadDim * m.bits / 16;
  std::vector<Halves> caches(4, Halves(kBlocks * kBlock * row, 0x7fc0));
  std::vector<Halves> scales(4, Halves(size_t(kBlocks) * kBlock * kKvHeads * 4));
  OpsinLayer layers[2] = {layer_of(m, true), layer_of(m, false)};
  for (int i = 0; i < 2; i++) {
    layers[i].key_cache = caches[2 * i].data();
    layers[i].value_cache = caches[2 * i + 1].data();
    layers[i].key_scales = scales[2 * i].data();
    layers[i].value_scales = scales[2 * i + 1].data();
  }
  OpsinStack stack{};
  stack.layers = layers;
  stack.final_norm = m.norm.data();
  stack.head = m.head.m;
  stack.num_layers = 2;
  stack.dim = kDim;
  stack.norm_eps = 1e-6f;
  stack.logit_scale = 1.0f;
  Floats logits(kTokens * kVocabulary), hidden = m.hidden;
  Ints rows(kTokens), likeliest(kTokens);
  for (int t = 0; t < kTokens; t++) rows[t] = t;
  int from = 0;
  for (const int end : ends) {
    const int count = end - from;
    const int32_t query_start[] = {0, count}, num_keys[] = {end};
    const float* cos = m.cos.data() + from * kHeadDim / 2;
    const float* sin = m.sin.data() + from * kHeadDim / 2;
    OpsinStep step{};
    step.hidden = hidden.data() + from * kDim;
    step.query_start = query_start;
    step.num_keys = num_keys;
    step.block_tables = table.data();
    step.cos = &cos;
    step.sin = &sin;
    step.logit_rows = rows.data();
    step.logits = logits.data() + from * kVocabulary;
    step.likeliest = likeliest.data() + from;
    step.tokens = step.num_logits = count;
    step.sequences = 1;
    step.max_blocks = kBlocks;
    step.block_size = kBlock;
    step.last_layer = 2;
    step.early_blocks = m.bits == 16 ? 0 : 1;
    step.early_size = m.bits == 16 ? kBlock : kBlock * m.bits / 16;
    if (opsin_step(&stack, &step)) std::abort();
    from = end;
  }
  for (const float v : logits) {
    if (!std::isfinite(v)) fail("stack", "a logit is not finite");
  }
  for (int t = 0; t < kTokens; t++) {
    const float* row = logits.data() + t * kVocabulary;
    const bool right = likeliest[t] == std::max_element(row, row + kVocabulary) - row;
    if (!right) fail("stack", "another logit is larger");
  }
  return logits;
}

}  // namespace

void stacks() {
  for (const int kind : {opsin::kBf16, opsin::kQ8, opsin::kQ6, opsin::kQ5, opsin::kQ4}) {
    for (const int bits : {16, 8, 4}) {
      const Model model(kind, bits);
      const std::string name =
          "stack of " + model.qkv.form.name() + ", cache at " + std::to_string(bits);
      const Floats whole = both(name, [&](auto) { return run(model, {kTokens}); });
      use("neon", 3);
      same(name + " in chunks", run(model, {1, 2, 9, 41, 42, 70, kTokens}), whole);
    }
  }
}

}  // namespace beside
