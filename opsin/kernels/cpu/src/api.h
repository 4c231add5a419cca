// The C interface of the native library: plain pointers and descriptors, no exceptions.
//
// Functions return 0 or a negative error code unless they say otherwise. Calls from several
// threads take turns, but for those of a thread that opsin_aside gave a team.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define OPSIN_API extern "C" __declspec(dllexport)
#else
#define OPSIN_API extern "C" __attribute__((visibility("default")))
#endif

enum OpsinError {
  OPSIN_OK = 0,
  OPSIN_BAD_ARGUMENT = -1,
  OPSIN_NO_MEMORY = -2,
  OPSIN_NO_ISA = -3,
  OPSIN_NO_DATA = -4  // a file ended or could not be read
};
enum OpsinDtype { OPSIN_F32 = 0, OPSIN_BF16 = 1, OPSIN_F16 = 2, OPSIN_U8 = 3 };

namespace opsin {
struct Matrix;
}
typedef opsin::Matrix OpsinMatrix;

// out = epilogue(x W^T + bias)
struct OpsinLinear {
  const OpsinMatrix* matrix;
  const void* x;       // (rows, k)
  void* out;           // (rows, n), or (rows, n / 2) for a gated product
  int64_t x_stride;    // elements between rows
  int64_t out_stride;
  int32_t x_dtype, out_dtype;
  int32_t rows;
  int32_t gated;       // gate and up rows alternate by sixteen: out = act(gate) * up
  int32_t activation;  // -1: none
  int32_t accumulate;  // float32 out only: out += scale * result
  float scale;
};

// One decoder layer. Norm weights are the factors themselves, float32; null: no such norm.
struct OpsinLayer {
  const OpsinMatrix* qkv;      // rows: query heads, key heads, value heads
  const OpsinMatrix* out;
  const OpsinMatrix* gate_up;  // gated: alternating by sixteen rows; plain: the up product
  const OpsinMatrix* down;
  const float* attention_norm;       // (dim)
  const float* attention_norm_bias;  // (dim), layer norm only
  const float* query_norm;           // (head_dim)
  const float* key_norm;             // (head_dim)
  const float* after_attention_norm; // (dim), applied to the block's output before it is added
  const float* mlp_norm;
  const float* mlp_norm_bias;
  const float* after_mlp_norm;
  uint16_t* key_cache;    // bfloat16 (blocks, kv_heads, block_size, head_dim), or, where kv_bits is
                          // 8 or 4, codes and plain rows (slots, kv_heads, head_dim)
  uint16_t* value_cache;
  uint16_t* key_scales;   // null, or (slots, kv_heads, kv_groups, 2) bfloat16: scale and bias
  uint16_t* value_scales;
  const float* sinks;          // (heads) extra logits of each softmax without a value, or null
  int32_t heads, kv_heads, head_dim;
  int32_t intermediate;   // columns of down
  int32_t rope;           // index of the rope table, -1: none
  int32_t rotary_dim;
  int32_t rope_interleaved;
  int32_t window;         // keys seen, this one included; 0: all
  int32_t gated;
  int32_t activation;
  float attention_scale;
  float attention_softcap;  // 0: none
  float residual_scale;     // on both blocks' outputs, 1: none
  int32_t kv_bits;          // 16, or 8 or 4: the caches are codes (slots, kv_heads, head_dim / .)
  int32_t kv_groups;        // groups of a head's row that have a scale and a bias
  int32_t reserved;
};

struct OpsinStack {
  const OpsinLayer* layers;
  const float* final_norm;
  const float* final_norm_bias;
  const OpsinMatrix* head;     // null: no logits
  const OpsinMatrix* embedding;  // (., dim), or null: steps give their hidden rows
  int32_t num_layers;
  int32_t dim;
  int32_t layer_norm;          // the norms are layer norms, else RMS
  float norm_eps;
  float logit_scale;           // 1: none
  float logit_softcap;         // 0: none
  float embedding_scale;       // on the embedding's rows
  int32_t reserved;
};

// Values (count, dim) added to some rows of the stream after a layer.
struct OpsinRowAdd {
  const int64_t* rows;
  const float* values;
  int32_t layer, count;
};

// One step over tokens of one or more sequences.
struct OpsinStep {
  float* hidden;               // (tokens, dim), replaced by the output of the last layer; null:
  const int32_t* token_ids;    // (tokens) rows of the embedding are taken
  const int32_t* query_start;  // (sequences + 1) first token of each sequence
  const int32_t* num_keys;     // (sequences) keys in the cache once this step has written
  const int32_t* block_tables; // (sequences, max_blocks)
  const int32_t* visible_until;  // (tokens) one past the last key seen, or null: a token's own
  const float* const* cos;     // rope tables: (rows, rotary_dim / 2) each
  const float* const* sin;
  const int32_t* rope_rows;    // (tokens) their rows, or null: one a token
  const OpsinRowAdd* adds;     // (num_adds), at most one a layer
  const int32_t* logit_rows;   // (num_logits) tokens whose logits are wanted
  float* logits;               // (num_logits, vocabulary), or null: they are not wanted themselves
  int32_t* likeliest;          // null, or (num_logits) the first largest of each, as opsin_argmax
  float* normed;               // null, or (tokens, dim): after the final norm
  int32_t tokens, sequences, max_blocks, block_size;
  int32_t first_layer, last_layer;
  int32_t num_logits;
  int32_t num_adds;
  int32_t early_blocks;        // below 16 bits: a sequence's first blocks, whose rows are plain
  int32_t early_size;          // rows of each of those
  int32_t kept_first;          // keys seen whatever kept_last says, at most 64
  int32_t kept_last;           // keys seen, this one included; 0: all
};

struct OpsinAttention {
  const void* query;           // (tokens, heads, head_dim)
  const void* key;             // cache (slots, kv_heads, head_dim), or rows when block_size is 0
  const void* value;
  void* out;                   // (tokens, heads, value_dim)
  const int32_t* query_start;  // (sequences + 1)
  const int32_t* num_keys;     // (sequences)
  const int32_t* key_start;    // (sequences) first key row when block_size is 0, else null
  const int32_t* block_tables;
  const int32_t* visible_from; // (tokens) or null: 0
  const int32_t* visible_until;  // (tokens) or null: every key
  const float* sinks;          // (heads) or null
  int64_t query_stride, key_stride, value_stride, out_stride;  // elements between tokens or slots
  int32_t tokens, sequences, max_blocks, block_size;
  int32_t heads, kv_heads, head_dim, value_dim;
  int32_t dtype;               // of query and out: float32 or bfloat16
  float scale, softcap;
  int32_t reserved;
};

// Selects an instruction set by name ("" or "auto": the best one here) and the thread count.
OPSIN_API int opsin_init(const char* isa, int threads);
OPSIN_API const char* opsin_isa();
OPSIN_API int opsin_threads();               // that share the calling thread's next call
OPSIN_API int opsin_set_threads(int threads);
// From now on the calling thread's calls run beside those of others, with a team of `threads`, which
// theirs lack from the next call on; 0: as before. 1, or 0 where there are no more threads than that
// or another thread has a team.
OPSIN_API int opsin_aside(int threads);
OPSIN_API int opsin_isa_count();             // instruction sets of this build that run here
OPSIN_API const char* opsin_isa_name(int i);
OPSIN_API int opsin_abi();                   // changes with this file

// A packed matrix (n, k) of zeros; group 0: one scale a row. Null when the arguments or the memory
// do not do. Source row i of a fill goes to row + i / 16 * 16 * spread + i % 16: spread 2 lets gate
// and up rows alternate by sixteen.
// Rotated: columns are mixed as in rotate.h before they are quantised, as activations then are, and
// back where rows are read; k is whole 32s. A bf13 matrix, whose k is whole 64s, has room for some
// rows that it cannot pack; with more of them it becomes a bf16 one.
OPSIN_API OpsinMatrix* opsin_matrix_new(int kind, int n, int k, int group, int scale_dtype,
                                        int rotated);
// Weights as they are; a quantised kind takes its scales from them (8 bits: symmetric, fewer: by
// least squares).
OPSIN_API int opsin_matrix_fill_dense(OpsinMatrix* m, int row, int rows, int spread,
                                      const void* weights, int dtype, int64_t stride);
// Rows of bfloat16 that lie one after another in memory that outlives the matrix: read in place,
// but for the last rows % 16, which are copied. Only in bf16 matrices whose k is whole 32s, from a
// row that is whole 16s.
OPSIN_API int opsin_matrix_map(OpsinMatrix* m, int row, int rows, int spread, const void* weights);
// As opsin_matrix_fill_dense from an open file, where the rows lie one after another from `offset` on.
OPSIN_API int opsin_matrix_fill_file(OpsinMatrix* m, int row, int rows, int spread, int file,
                                     int64_t offset, int dtype);
// Codes in the affine-group layout: little-endian bit fields in uint32 words, row by row, with
// scales and biases (rows, k / group) of the matrix's scale_dtype, of 16 bits; not into a rotated one.
OPSIN_API int opsin_matrix_fill_affine(OpsinMatrix* m, int row, int rows, int spread,
                                       const uint32_t* codes, int bits, const uint16_t* scales,
                                       const uint16_t* biases);
OPSIN_API int opsin_matrix_fill_bias(OpsinMatrix* m, int row, int rows, int spread,
                                     const float* bias);
// A matrix, not bf16, over memory that lies elsewhere, aligned to 64 bytes and laid out as this
// library does: `bytes` are opsin_matrix_bytes of it and 4096 more that can be read. The caller keeps
// it; fills refuse it.
OPSIN_API OpsinMatrix* opsin_matrix_view(int kind, int n, int k, int group, int scale_dtype,
                                         const void* data, int64_t bytes, int rotated);
OPSIN_API const void* opsin_matrix_data(const OpsinMatrix* m);  // null if it is a bf16 one
OPSIN_API void opsin_matrix_free(OpsinMatrix* m);
OPSIN_API int64_t opsin_matrix_bytes(const OpsinMatrix* m);
// Rows as numbers (an embedding table): out (count, k), rows in float32 or bfloat16
OPSIN_API int opsin_matrix_rows(const OpsinMatrix* m, const int64_t* rows, int count, int dtype,
                                void* out);

OPSIN_API int opsin_linear(const OpsinLinear* linear);
OPSIN_API int opsin_attention(const OpsinAttention* attention);
OPSIN_API int opsin_norm(const void* x, const void* residual, const float* weight,
                         const float* bias, int layer_norm, float eps, int64_t rows, int dim,
                         int dtype, void* out, void* sum);
OPSIN_API int opsin_activate(const void* gate, const void* up, int kind, int64_t n, int dtype,
                             void* out);
// Rotates x (tokens, heads, head_dim) in place, float32 or bfloat16.
OPSIN_API int opsin_rope(void* x, const float* cos, const float* sin, int tokens, int heads,
                         int head_dim, int rotary_dim, int interleaved, int64_t stride, int dtype);
OPSIN_API int64_t opsin_argmax(const float* x, int64_t n);  // the first; a NaN is the largest of all
OPSIN_API double opsin_softmax(const float* x, int64_t n, float temperature, float* out);
OPSIN_API int opsin_step(const OpsinStack* stack, const OpsinStep* step);

OPSIN_API double opsin_read_bandwidth(int64_t bytes, int repeats);  // bytes a second
OPSIN_API double opsin_peak(int kind, int milliseconds);            // operations a second
