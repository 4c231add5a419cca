// What the ISA-neutral code and the per-ISA builds share: packed matrices and the kernel table.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace opsin {

constexpr int kRows = 16;         // rows of a weight matrix in one block
constexpr int kAttentionRows = 64;  // query rows one attention unit may hold
constexpr int kKeyBlock = 64;     // keys per step of the online softmax, at fixed positions
constexpr int kKeptBlocks = 16;   // blocks of keys, of which what kernels make of them is kept
constexpr int kLaneRows = 12;     // rows of a panel of activations that lie lane by lane
constexpr int kSegment = 512;     // keys whose partial results are merged as one
// Whose weights, as bytes, stay in the first cache beside rows.
constexpr int kNearColumns = 1024;

enum MatrixKind : int32_t { kBf16 = 0, kQ8 = 1, kQ4 = 2, kQ6 = 3, kBf13 = 4, kQ5 = 5 };
enum ScaleKind : int32_t { kScaleBf16 = 1, kScaleF16 = 2, kScaleBytes = 3 };  // as OpsinDtype

// Whether products are of bfloat16: activations are narrowed to it, not to codes.
static constexpr bool is_bf16(int kind) { return kind == kBf16 || kind == kBf13; }
constexpr int16_t kElsewhere = 0x7fff;
constexpr int kPackedColumns = 64, kPackedBytes = 104;  // of a row of bf13, together

// Bits of a quantised kind's codes.
static constexpr int code_bits(int kind) {
  return kind == kQ8 ? 8 : kind == kQ6 ? 6 : kind == kQ5 ? 5 : 4;
}

// Of so many bytes codes lie in the lower bits, and others in what is left above them.
static constexpr int code_parts(int kind) {
  return code_bits(kind) / (code_bits(kind) & -code_bits(kind));
}

// A weight matrix (n, k) in blocks of sixteen rows.
//
// bf16: row after row, each block wherever it lies, so that a checkpoint's own bytes can be one.
// bf13: the same values, bit for bit, in thirteen bits. A weight's exponent is a code of five bits:
// 0 for the exponent 0, else what is added to the row's least exponent, 31 below its greatest. A block
// is 64 bytes, of them sixteen least exponents (int16, as they lie in a bfloat16), then sixteen rows;
// of a row each 64 columns are 104 bytes: signs with mantissas (64), those of column 8 i + j at
// 16 i + j and of column 32 + 8 i + j at 16 i + 8 + j; the lower four bits of codes (32), of columns c
// and 32 + c in one byte, the first in the low nibble; the fifth (8), a bit a column. A row with a
// weight that this cannot say has kElsewhere for its least exponent, begins with a number (int32), and
// is that one of the rows of bf16 that follow the blocks.
// The other kinds but bf16 are one run of memory, block after block.
// q8, q6, q5, q4: the heads of all groups of columns, then their codes, from a multiple of 64 on. A
// weight is code * scale + bias. A head is sixteen scales and sixteen biases, of 16 bits each; or of
// a byte each, behind sixteen floats, one a row: a scale is its byte times the row's float, and a bias
// -scale * 2^bits / 256 times its byte, a zero point. Codes:
//   q8: for each four columns the four codes of the sixteen rows (unsigned bytes);
//   q6: for each sixteen columns three times 64 bytes: four columns each in the lower six bits, the
//     last four in the upper two, lowest bits first;
//   q5: for each 32 columns five times 64 bytes: four columns each in the lower five bits, the last
//     twelve, four after four, in the upper three, lowest bits first;
//   q4: for each eight columns 64 bytes, the first four columns in the low nibbles.
// Columns are padded with codes whose activations are zero.
struct Matrix {
  uint8_t* data;
  int64_t bytes;
  int32_t kind;
  int32_t n, k;
  int32_t blocks;      // ceil(n / 16)
  int32_t padded_k;    // columns in memory
  int32_t group;       // columns that share a scale (padded_k for one scale a row)
  int32_t groups;
  int32_t scales;      // a ScaleKind
  int32_t rotated;     // columns that are mixed as one block (64 or 32), or 0: see rotate.h
  int32_t heads_at;    // from a block's start to its heads,
  int32_t codes_at;    // and to its codes
  int64_t code_bytes;  // of one group
  int64_t block_bytes;
  int64_t row_bytes;   // bf16, bf13: from row to row of a block,
  int64_t step_bytes;  // and from 32 of its columns to the next
  const uint8_t** at;  // bf16: (blocks) where each lies; null: it has no values yet
  float* bias;         // (blocks * 16), or null
  int32_t elsewhere;   // bf13: rows that follow the blocks,
  int32_t room;        // and for how many there is room
  int64_t capacity;    // bytes mapped at data, 0: none, or another's, to be read alone
};

// Activations of a product, ready for one kind of matrix; the memory holds whole panels of rows.
//
// bfloat16: rows (padded_k), as floats where kernels `widen` them, then (padded_k / 32, odd and even,
// 16), or `tiled`, panels lane by lane, (16, padded_k / 32, kLaneRows, a pair), where widened (16,
// padded_k / 32, odd and even, kLaneRows); where they are `paired` panels (padded_k / 2, panel_rows,
// 2).
// Codes: panels (padded_k / 4, rows of this panel, 4), so that what meets the same weights lies
// together; or `tiled` panels of sixteen rows (padded_k / 64, 16, 64).
// Scales of codes, and sums (scale * sum of codes): panels (groups, rows of this panel), or
// (groups, panel_rows) if tiled. The last panel may have fewer rows than the others.
struct Activations {
  const uint8_t* data;
  int64_t stride;      // bytes between panels, or between rows where there are none
  const float* scale;
  const float* sum;
  int panel_rows;      // 1: there are no panels
  bool tiled;
};

// Rows of a paged cache at 8 or 4 bits, the same for keys and values; bits 0: there are none.
struct PackedShape {
  int32_t bits, groups;
  int32_t early_blocks, early_size;  // the first blocks of a sequence hold plain rows, so many each
  int64_t code_stride, scale_stride;  // bytes and elements between slots
};

struct AttentionShape {
  int32_t head_dim, value_dim;
  int64_t key_stride, value_stride;  // elements between slots of the cache
  int32_t block_size;                // slots of one block; 0: keys are contiguous
  int32_t block_rows;                // slots from one block to the next, as the strides count them
  float scale, softcap;              // softcap 0: none
  PackedShape packed;
};

// One unit: rows that share a kv head and a sequence.
struct AttentionUnit {
  const uint16_t* queries;  // (rows, padded head_dim) bfloat16
  int32_t rows;
  const int32_t* lo;        // (rows) first visible key
  const int32_t* hi;        // (rows) one past the last visible key
  const int32_t* first_lo;  // (rows) or null: other visible keys, all of them below 64 and below lo
  const int32_t* first_hi;
  const uint16_t* keys;     // cache, at this head
  const uint16_t* values;
  const uint8_t* key_codes;  // quantised rows of the cache, at this head
  const uint8_t* value_codes;
  const uint16_t* key_scales;
  const uint16_t* value_scales;
  const int32_t* block_table;
  const float* sinks;       // (rows) or null
  int32_t num_keys;         // keys written for this sequence
  const uint16_t* next_keys;  // of the unit that this thread probably takes next, or null
  const uint16_t* next_values;
  const int32_t* next_table;
  int32_t next_from, next_num_keys;  // the first it reads, about, and how many there are
  bool keep;                // in the scratch, what was made of keys and values; they are few enough
  bool again;               // the unit before was of the same keys and values, and kept that
  float* out;               // (rows, padded value_dim)
  uint8_t* scratch;
};

// What becomes of the results of neighbouring blocks:
// out = act(tile + bias) [* (second + second bias)] * scale.
struct Emit {
  const float* tile;        // (blocks, slot_rows, 16), `count` rows of each
  const float* second;      // of the up rows, or null
  const float* bias;        // (16) of the first block, or null
  const float* second_bias;
  void* out;                // first element of the first block's first row
  int64_t stride;           // elements between rows
  int32_t blocks, slot_rows, count;
  int32_t bias_step;        // floats between the biases of two blocks
  int32_t columns;          // that exist, in all blocks
  int32_t activation;       // -1: none
  int32_t bf16;             // out is bfloat16, else float32
  int32_t accumulate;       // out += result (float32)
  float scale;
};

struct Kernels {
  const char* name;
  void (*quantize)(const float* x, int k, int padded_k, int group, int8_t* codes, float* scale,
                   float* sum);
  void (*narrow)(const float* x, int k, int padded_k, uint16_t* out);
  // Bfloat16 activations as floats, as the kernels read them; null where they read bfloat16.
  void (*widen)(const uint16_t* x, int padded_k, float* out);
  // Those of (kLaneRows, padded_k) lane by lane; null where kernels for many rows have tiles.
  void (*lay_lanes)(const uint16_t* x, int padded_k, uint8_t* out);
  bool paired;  // bfloat16 is multiplied in tiles: activations beside it lie in panels
  // Block b of a bf16 matrix for many rows: tile by tile, (padded_k / 32, 16, 32), or lane by lane,
  // as the activations beside it, sixteen rows. `plain` holds a block of bf16.
  void (*gather)(const Matrix* m, int b, uint8_t* out, uint8_t* plain);
  // A row of a bf13 matrix and its least exponent; false if that cannot say it.
  bool (*pack)(const uint16_t* w, int k, uint8_t* out, int16_t* least);
  void (*unpack)(const Matrix* m, int row, uint8_t* out);  // the way back: (padded_k) bfloat16
  // rows [row, row + count) of the activations times block b: out (count, 16)
  void (*tile)(const Matrix* m, int b, const Activations* x, int row, int count, float* out,
               uint8_t* scratch);
  // The same of blocks b and b + 1 at once, into out and second; false where one by one is better.
  // `after` is the block that this thread probably takes next, -1: there is none.
  bool (*pair)(const Matrix* m, int b, int after, const Activations* x, int row, int count,
               float* out, float* second, uint8_t* scratch);
  void (*matmul_begin)(const Matrix* m, int rows);  // per thread, before tiles
  void (*matmul_end)();
  int panel, panel_bf16;  // rows handed to one tile call at most
  int code_rows;   // rows of codes in a panel of activations
  int by_lane_from;  // rows from which bfloat16 lies lane by lane, 0: never
  int tiled_from;    // rows from which codes are multiplied in tiles, 0: never
  void (*rms_norm)(const float* x, const float* weight, float eps, int dim, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int dim,
                     float* out);
  void (*emit)(const Emit* e);
  void (*activate)(int kind, const float* gate, const float* up, int n, float* out);
  void (*rope)(float* x, const float* cos, const float* sin, int rotary_dim, int interleaved);
  void (*to_bf16)(const float* x, int n, uint16_t* out);
  void (*from_bf16)(const uint16_t* x, int n, float* out);
  void (*axpy)(const float* x, float scale, int n, float* out);  // out += scale * x
  int64_t (*argmax)(const float* x, int64_t n);
  double (*softmax)(const float* x, int64_t n, float temperature, float* out);
  void (*attention)(const AttentionShape* shape, const AttentionUnit* unit);
  // One head's row: codes (dim * bits / 8) and scales (groups, 2)
  void (*pack_row)(const float* x, int dim, int groups, int bits, uint8_t* codes,
                   uint16_t* scales);
  void (*dequantize_row)(const Matrix* m, int row, float* out);
  float (*read_sum)(const uint8_t* p, int64_t bytes);
  double (*peak)(int kind, int64_t iterations);  // operations done
  // Of one group of sixteen rows, weights (columns, 16): scales and biases (16), then codes.
  void (*fit_eight)(const float* tile, int columns, float* scale, float* bias);
  void (*fit_few)(const float* tile, int columns, float top, float* scale, float* bias);
  void (*affine_codes)(const float* tile, int columns, const float* scale, const float* bias,
                       float top, uint8_t* codes);
  void (*rotate)(const float* x, int k, int block, float* out);  // out may be x
};

// Bytes of a group's scales and biases.
static constexpr int head_bytes(int scales) { return scales == kScaleBytes ? 32 : 64; }

int64_t tile_scratch_bytes(const Matrix* m);
int64_t attention_scratch_bytes(int head_dim, int value_dim);

const Kernels* portable_kernels();
const Kernels* neon_kernels();
const Kernels* avx2_kernels();
const Kernels* avx2vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* avx512bf16_kernels();
const Kernels* amx_kernels();

}  // namespace opsin
