// Work that the ISA-neutral sources share: products by the team and attention by the team.
#pragma once

#include "api.h"
#include "kernels.h"
#include "pool.h"

namespace opsin {

const Kernels* kernels();  // the chosen build, never null

// What a thread reads next, as far as it is known: a matrix and its product's rows.
struct Next {
  const Matrix* matrix = nullptr;
  bool gated = false;
  int rows = 0;
};

// A product whose input rows are float32 or 16-bit; see OpsinLinear for the fields.
struct Product {
  OpsinLinear linear;
  const float* norm = nullptr;       // apply this norm to the rows first
  const float* norm_bias = nullptr;
  bool layer_norm = false;
  float eps = 0.0f;
  Next next;
};

// Let a bf13 matrix be a bf16 one, with the rows that it has; false without memory.
bool make_plain(Matrix* m);

int64_t activation_bytes(const Matrix* m, int rows);
int64_t product_thread_bytes(const Matrix* m);
// Two phases at most. `shared` holds activation_bytes, `own` (this thread's) product_thread_bytes.
void product(Team& team, const Product& p, uint8_t* shared, uint8_t* own);
// Ask memory for the first of what this thread will probably read next, if rows are few.
void fetch_first(const Team& team, const Next& next);

void read_row(const void* x, int dtype, int64_t offset, int n, float* out);
void write_row(const float* x, int dtype, int64_t offset, int n, void* out);

// work(from, to) over parts of `rows`, by all threads
template <class Work>
void over_rows(int rows, Work&& work) {
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> lock(pool.region());
  const int chunks = chunks_for(rows, pool.size(), 16);
  pool.run(1, [&](Team& team) {
    team.phase(chunks, [&](int c) {
      work(chunk_start(rows, 1, c, chunks), chunk_start(rows, 1, c + 1, chunks));
    });
  });
}

struct AttentionJob {
  OpsinAttention a;
  const int32_t* positions;  // with window: lo = position + 1 - window
  int32_t window;
  int32_t kept_first, kept_last;  // see OpsinStep
  bool by_head;  // the cache is (blocks, kv_heads, block_size, head_dim)
  const uint16_t* key_scales;
  const uint16_t* value_scales;
  PackedShape packed;
  Next next;
};
int64_t attention_thread_bytes(int head_dim, int value_dim);
void attention(Team& team, const AttentionJob& job, uint8_t* own);

}  // namespace opsin
