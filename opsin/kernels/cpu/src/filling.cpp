// Weights repacked into matrices, from memory or straight from a file, by all threads.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <unistd.h>

#include "runtime.h"

namespace opsin {

namespace {

float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  uint32_t u;
  float f;
  if (exponent == 0) {
    f = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&u, &f, 4);
    u |= sign;
  } else {
    u = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  }
  std::memcpy(&f, &u, 4);
  return f;
}

uint16_t float_to_half(float x) {  // round to nearest even, large to infinity
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  u &= 0x7fffffff;
  if (u >= 0x47800000) return static_cast<uint16_t>(sign | (u > 0x7f800000 ? 0x7e00 : 0x7c00));
  if (u < 0x38800000) {
    float f;
    std::memcpy(&f, &u, 4);
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(__builtin_rintf(f * 16777216.0f)));
  }
  u += 0xfff + ((u >> 13) & 1);
  return static_cast<uint16_t>(sign | ((u - 0x38000000) >> 13));
}

float bfloat_to_float(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

uint16_t float_to_bfloat(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

float to_float(uint16_t h, bool f16) { return f16 ? half_to_float(h) : bfloat_to_float(h); }
uint16_t to_16(float x, bool f16) { return f16 ? float_to_half(x) : float_to_bfloat(x); }

void read_weights(const void* source, int dtype, int64_t offset, int n, float* out) {
  if (dtype == OPSIN_F32) {
    std::memcpy(out, static_cast<const float*>(source) + offset, 4u * n);
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(source) + offset;
  if (dtype == OPSIN_BF16) {
    kernels()->from_bf16(p, n, out);
  } else {
    for (int i = 0; i < n; i++) out[i] = half_to_float(p[i]);
  }
}

struct Place {
  uint8_t* block;
  int row;
};

Place place(const Matrix* m, int row, int i, int spread) {
  const int target = row + i / kRows * kRows * spread + i % kRows;
  return {m->data + target / kRows * m->block_bytes, target % kRows};
}

// The matrix reads this block of its own from now on.
void take_back(const Matrix* m, uint8_t* block) {
  const uint8_t** at = m->at + (block - m->data) / m->block_bytes;
  if (*at != block) std::memcpy(block, *at, static_cast<size_t>(m->block_bytes));
  *at = block;
}

uint8_t* head_of(const Matrix* m, const Place& at, int group) {
  return at.block + m->heads_at + group * head_bytes(m->scales);
}

void put_scale(const Matrix* m, const Place& at, int group, uint16_t scale, uint16_t bias) {
  uint16_t* head = reinterpret_cast<uint16_t*>(head_of(m, at, group));
  head[at.row] = scale;
  head[kRows + at.row] = bias;
}

// A row's scales and biases in bytes, and as they are then: of each group at 16 times its number.
// Where a scale changes by that, the middle of what its codes can say stays where it was.
void put_bytes(const Matrix* m, const Place& at, float* scale, float* bias) {
  float most = 0.0f;
  bool finite = true;
  for (int g = 0; g < m->groups; g++) {
    finite &= std::isfinite(scale[g * kRows]) && std::isfinite(bias[g * kRows]);
    most = std::max(most, scale[g * kRows]);
  }
  const float unit = finite ? most / 255.0f : std::numeric_limits<float>::quiet_NaN();
  const float step = 1.0f / static_cast<float>(256 >> code_bits(m->kind));
  const float middle = 128.0f * step - 0.5f;
  reinterpret_cast<float*>(at.block)[at.row] = unit;
  for (int g = 0; g < m->groups; g++, scale += kRows, bias += kRows) {
    uint8_t* head = head_of(m, at, g) + at.row;
    head[0] = head[kRows] = 0;
    if (unit > 0.0f) {
      head[0] = static_cast<uint8_t>(std::max(std::rint(*scale / unit), 1.0f));
      const float kept = head[0] * unit;
      const float zero = std::rint(-(*bias + (*scale - kept) * middle) / (step * kept));
      head[kRows] = static_cast<uint8_t>(std::clamp(zero, 0.0f, 255.0f));
    }
    *scale = head[0] * unit;
    *bias = head[kRows] * -step * *scale;
  }
}

// Codes of one group of some rows, one byte each: row after row, and `step` from column to column.
void put_codes(const Matrix* m, const Place& at, int count, int group, const uint8_t* codes,
               int step) {
  uint8_t* q = at.block + m->codes_at + group * m->code_bytes + at.row * 4;
  const int bits = code_bits(m->kind), parts = code_parts(m->kind), fours = parts * 8 / bits;
  for (int i = 0; i < m->group; i += 4 * fours, codes += 4 * fours * step, q += 64 * parts) {
    for (int r = 0; r < count; r++) {
      for (int j = 0; j < 4; j++) {
        const uint8_t* code = codes + j * step + r;
        int above = 0;
        for (int f = parts; f < fours; f++) above |= code[4 * f * step] << (f - parts) * bits;
        for (int part = 0; part < parts; part++, above >>= 8 - bits) {
          const int byte = code[4 * part * step] | above << bits;
          q[64 * part + r * 4 + j] = static_cast<uint8_t>(byte);
        }
      }
    }
  }
}

// A group's scales and biases (16) in 16 bits, and as they are then.
void put_halves(const Matrix* m, const Place& at, int count, int group, float* scale,
                float* bias) {
  const bool f16 = m->scales == kScaleF16;
  for (int r = 0; r < kRows; r++) {
    const uint16_t s = to_16(scale[r], f16);
    scale[r] = to_float(s, f16);
    const uint16_t b = to_16(m->kind == kQ8 ? -128.0f * scale[r] : bias[r], f16);
    bias[r] = to_float(b, f16);
    if (r < count) put_scale(m, {at.block, at.row + r}, group, s, b);
  }
}

// Some rows of a block: `tile` (groups, group, 16) holds their weights, lane by lane. `own` holds
// scales and biases of all groups, and codes of one.
void quantise_tile(const Matrix* m, const Place& at, int count, const float* tile, float* own) {
  const float top = static_cast<float>((1 << code_bits(m->kind)) - 1);
  const Kernels* k = kernels();
  float *scale = own, *bias = own + m->groups * kRows;
  uint8_t* codes = reinterpret_cast<uint8_t*>(bias + m->groups * kRows);
  for (int g = 0; g < m->groups; g++) {
    const float* weights = tile + static_cast<int64_t>(g) * m->group * kRows;
    const int columns = std::min(m->group, m->k - g * m->group);
    float *s = scale + g * kRows, *b = bias + g * kRows;
    if (m->kind == kQ8) {
      k->fit_eight(weights, columns, s, b);
    } else {
      k->fit_few(weights, columns, top, s, b);
    }
    if (m->scales != kScaleBytes) put_halves(m, at, count, g, s, b);
  }
  for (int r = 0; m->scales == kScaleBytes && r < count; r++) {
    put_bytes(m, {at.block, at.row + r}, scale + r, bias + r);
  }
  for (int g = 0; g < m->groups; g++) {
    const float* weights = tile + static_cast<int64_t>(g) * m->group * kRows;
    k->affine_codes(weights, m->group, scale + g * kRows, bias + g * kRows, top, codes);
    put_codes(m, at, count, g, codes, kRows);
  }
}

// Codes of `bits` each from a stream of little-endian words.
void unpack_bits(const uint32_t* words, int bits, int64_t from, int count, uint8_t* out) {
  const uint32_t mask = (1u << bits) - 1;
  int64_t bit = from * bits;
  for (int i = 0; i < count; i++, bit += bits) {
    const int64_t word = bit / 32;
    const int shift = static_cast<int>(bit % 32);
    uint32_t v = words[word] >> shift;
    if (shift + bits > 32) v |= words[word + 1] << (32 - shift);
    out[i] = static_cast<uint8_t>(v & mask);
  }
}

bool fits(const Matrix* m, int row, int rows, int spread) {
  if (!m || row < 0 || rows < 0 || spread < 1) return false;
  if (rows == 0) return true;
  const int64_t last = row + static_cast<int64_t>(rows - 1) / kRows * kRows * spread +
                       (rows - 1) % kRows;
  return last < m->n && (spread == 1 || row % kRows == 0);
}

// Rows of weights as they come: in memory, or in a file row after row.
struct Source {
  const uint8_t* data;
  int file;
  int64_t offset;  // of the file's first row
  int64_t stride;  // bytes between rows
  int dtype;
};

constexpr int kNoRoom = 1;  // of a bf13 matrix for what it cannot pack
constexpr int64_t kReadAhead = 256 << 10;  // bytes of a file in one read: they stay in the cache

bool read_bytes(int file, int64_t offset, int64_t bytes, uint8_t* out) {
  while (bytes > 0) {
    const ssize_t got = pread(file, out, static_cast<size_t>(bytes), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    out += got;
    offset += got;
    bytes -= got;
  }
  return true;
}

// Floats that fill_rows works in.
int64_t fill_floats(const Matrix* m) {
  const int64_t k = m->k;
  if (is_bf16(m->kind)) return 2 * k;
  return (k + m->padded_k + 2 * m->groups) * kRows + static_cast<int64_t>(m->group) * (kRows / 4);
}

void quantise_rows(const Matrix* m, const Place& at, int count, const uint8_t* rows,
                   int64_t stride, int dtype, float* wide) {
  float* tile = wide + static_cast<int64_t>(m->k) * kRows;
  const int64_t cells = static_cast<int64_t>(m->padded_k) * kRows;
  for (int r = 0; r < count; r++) {
    float* values = wide + static_cast<int64_t>(r) * m->k;
    read_weights(rows + r * stride, dtype, 0, m->k, values);
    if (m->rotated) kernels()->rotate(values, m->k, m->rotated, values);
  }
  if (count < kRows || m->k < m->padded_k) std::memset(tile, 0, sizeof(float) * cells);
  for (int c = 0; c < m->k; c++) {
    for (int r = 0; r < count; r++) {
      tile[c * kRows + r] = wide[static_cast<int64_t>(r) * m->k + c];
    }
  }
  quantise_tile(m, at, count, tile, tile + cells);
}

// A row of a block of bf13; false where there is no more room for what that cannot say.
bool put_row13(Matrix* m, uint8_t* block, int r, const uint16_t* values) {
  int16_t* least = reinterpret_cast<int16_t*>(block) + r;
  uint8_t* out = block + 64 + r * m->row_bytes;
  if (kernels()->pack(values, m->k, out, least)) return true;
  const int32_t number = __atomic_fetch_add(&m->elsewhere, 1, __ATOMIC_RELAXED);
  if (number >= m->room) {
    __atomic_fetch_sub(&m->elsewhere, 1, __ATOMIC_RELAXED);
    return false;
  }
  *least = kElsewhere;
  std::memcpy(out, &number, 4);
  std::memcpy(m->data + m->bytes + number * int64_t{2} * m->k, values, 2u * m->k);
  return true;
}

// Some rows of one block; `own` holds fill_floats. False if the kind cannot hold them.
bool fill_rows(Matrix* m, const Place& at, int count, const uint8_t* rows, int64_t stride,
               int dtype, float* own) {
  if (!is_bf16(m->kind)) {
    quantise_rows(m, at, count, rows, stride, dtype, own);
    return true;
  }
  if (m->kind == kBf13) {
    uint16_t* narrow = reinterpret_cast<uint16_t*>(own + m->k);
    for (int r = 0; r < count; r++) {
      const uint16_t* values = reinterpret_cast<const uint16_t*>(rows + r * stride);
      if (dtype != OPSIN_BF16) {
        read_weights(rows + r * stride, dtype, 0, m->k, own);
        kernels()->to_bf16(own, m->k, narrow);
        values = narrow;
      }
      if (!put_row13(m, at.block, at.row + r, values)) return false;
    }
    return true;
  }
  take_back(m, at.block);
  for (int r = 0; r < count; r++) {
    uint8_t* out = at.block + (at.row + r) * m->row_bytes;
    if (dtype == OPSIN_BF16) {
      std::memcpy(out, rows + r * stride, 2u * m->k);
    } else {
      read_weights(rows + r * stride, dtype, 0, m->k, own);
      kernels()->to_bf16(own, m->k, reinterpret_cast<uint16_t*>(out));
    }
  }
  return true;
}

// Runs of rows that lie in one block: the first ends where the block of `row` does.
struct Runs {
  int row, rows;
  int count() const { return rows == 0 ? 0 : (row % kRows + rows + kRows - 1) / kRows; }
  int start(int run) const {
    const int at = run * kRows - row % kRows;
    return at < 0 ? 0 : at > rows ? rows : at;
  }
};

int fill_once(Matrix* m, int row, int rows, int spread, const Source& source) {
  if (!fits(m, row, rows, spread) || !m->capacity || source.dtype < OPSIN_F32 ||
      source.dtype > OPSIN_F16) {
    return OPSIN_BAD_ARGUMENT;
  }
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> lock(pool.region());
  const Runs runs = {row, rows};
  const int64_t width = static_cast<int64_t>(m->k) * (source.dtype == OPSIN_F32 ? 4 : 2);
  const int64_t fit = kReadAhead / (width * kRows);
  const int piece = static_cast<int>(fit < 1 ? 1 : fit > 4096 ? 4096 : fit);  // runs of one read
  const int pieces = (runs.count() + piece - 1) / piece;
  const int64_t floats = fill_floats(m) * 4;
  std::atomic<int> failure{OPSIN_OK};
  pool.run(1, [&](Team& team) {
    uint8_t* own = pool.scratch(team.thread(), floats + piece * kRows * width);
    team.phase(pieces, [&](int c) {
      const int last = (c + 1) * piece < runs.count() ? (c + 1) * piece : runs.count();
      const int from = runs.start(c * piece), until = runs.start(last);
      const uint8_t* data = source.data + from * source.stride;
      if (!source.data) {
        uint8_t* buffer = own + floats;
        const int64_t bytes = (until - from) * width;
        if (!read_bytes(source.file, source.offset + from * width, bytes, buffer)) {
          failure = OPSIN_NO_DATA;
          return;
        }
        data = buffer;
      }
      for (int run = c * piece; run < last; run++) {
        const int i = runs.start(run), count = runs.start(run + 1) - i;
        const Place at = spread == 1 ? place(m, row + i, 0, 1) : place(m, row, i, spread);
        if (!fill_rows(m, at, count, data + (i - from) * source.stride, source.stride, source.dtype,
                       reinterpret_cast<float*>(own))) {
          failure = kNoRoom;
        }
      }
    });
  });
  return failure;
}

int fill(Matrix* m, int row, int rows, int spread, const Source& source) {
  const int code = fill_once(m, row, rows, spread, source);
  if (code != kNoRoom) return code;
  return make_plain(m) ? fill_once(m, row, rows, spread, source) : OPSIN_NO_MEMORY;
}

}  // namespace

}  // namespace opsin

using opsin::Matrix;

int opsin_matrix_fill_dense(OpsinMatrix* m, int row, int rows, int spread, const void* weights,
                            int dtype, int64_t stride) {
  if (!weights && rows > 0) return OPSIN_BAD_ARGUMENT;
  const int64_t size = dtype == OPSIN_F32 ? 4 : 2;
  return opsin::fill(m, row, rows, spread,
                     {static_cast<const uint8_t*>(weights), -1, 0, stride * size, dtype});
}

int opsin_matrix_map(OpsinMatrix* m, int row, int rows, int spread, const void* weights) {
  using namespace opsin;
  if (!weights || !fits(m, row, rows, spread) || m->kind != kBf16) return OPSIN_BAD_ARGUMENT;
  if (m->k != m->padded_k || row % kRows != 0) return OPSIN_BAD_ARGUMENT;
  const uint8_t* data = static_cast<const uint8_t*>(weights);
  const int whole = rows / kRows;
  for (int b = 0; b < whole; b++) m->at[row / kRows + b * spread] = data + b * m->block_bytes;
  return fill(m, row + whole * kRows * spread, rows % kRows, spread,
              {data + whole * m->block_bytes, -1, 0, m->row_bytes, OPSIN_BF16});
}

int opsin_matrix_fill_file(OpsinMatrix* m, int row, int rows, int spread, int file, int64_t offset,
                           int dtype) {
  if (!m || file < 0 || offset < 0) return OPSIN_BAD_ARGUMENT;
  const int64_t size = dtype == OPSIN_F32 ? 4 : 2;
  return opsin::fill(m, row, rows, spread, {nullptr, file, offset, m->k * size, dtype});
}

int opsin_matrix_fill_affine(OpsinMatrix* m, int row, int rows, int spread, const uint32_t* codes,
                             int bits, const uint16_t* scales, const uint16_t* biases) {
  if (!opsin::fits(m, row, rows, spread) || !m->capacity || opsin::is_bf16(m->kind)) {
    return OPSIN_BAD_ARGUMENT;
  }
  if (m->rotated || m->scales == opsin::kScaleBytes) return OPSIN_BAD_ARGUMENT;
  if (bits < 2 || bits > opsin::code_bits(m->kind)) return OPSIN_BAD_ARGUMENT;
  if (static_cast<int64_t>(m->k) * bits % 32 != 0 || m->group > 1024) return OPSIN_BAD_ARGUMENT;
  const int64_t words = static_cast<int64_t>(m->k) * bits / 32;
  opsin::over_rows(rows, [&](int from, int to) {
    uint8_t bytes[1024];
    for (int i = from; i < to; i++) {
      const opsin::Place at = opsin::place(m, row, i, spread);
      for (int g = 0; g < m->groups; g++) {
        const int64_t s = static_cast<int64_t>(i) * m->groups + g;
        opsin::unpack_bits(codes + i * words, bits, static_cast<int64_t>(g) * m->group, m->group,
                           bytes);
        opsin::put_scale(m, at, g, scales[s], biases[s]);
        opsin::put_codes(m, at, 1, g, bytes, 1);
      }
    }
  });
  return OPSIN_OK;
}

int opsin_matrix_fill_bias(OpsinMatrix* m, int row, int rows, int spread, const float* bias) {
  if (!opsin::fits(m, row, rows, spread)) return OPSIN_BAD_ARGUMENT;
  if (!m->bias) {
    m->bias = static_cast<float*>(
        std::calloc(static_cast<size_t>(m->blocks) * opsin::kRows, sizeof(float)));
    if (!m->bias) return OPSIN_NO_MEMORY;
  }
  for (int i = 0; i < rows; i++) {
    m->bias[row + i / opsin::kRows * opsin::kRows * spread + i % opsin::kRows] = bias[i];
  }
  return OPSIN_OK;
}
