// Packed matrices: memory on huge pages, and repacking into it.
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

#include "runtime.h"

namespace opsin {

namespace {

constexpr int64_t kHuge = 2 << 20;

// Room for the prefetches and tile loads that run past the end.
constexpr int64_t kSlack = 4096;

uint8_t* map_bytes(int64_t bytes, int64_t* capacity) {
  const bool huge = bytes >= kHuge / 2;
  const int64_t unit = huge ? kHuge : 4096;
  const int64_t size = (bytes + kSlack + unit - 1) / unit * unit;
  const int64_t asked = huge ? size + kHuge : size;
  void* p = mmap(nullptr, static_cast<size_t>(asked), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  uint8_t* at = static_cast<uint8_t*>(p);
  if (huge) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(p);
    const uintptr_t start = (from + kHuge - 1) / kHuge * kHuge;
    if (start > from) munmap(p, start - from);
    const uintptr_t end = start + static_cast<uintptr_t>(size);
    const uintptr_t last = from + static_cast<uintptr_t>(asked);
    if (last > end) munmap(reinterpret_cast<void*>(end), last - end);
    at = reinterpret_cast<uint8_t*>(start);
#if defined(MADV_HUGEPAGE)
    madvise(at, static_cast<size_t>(size), MADV_HUGEPAGE);
#endif
  }
  *capacity = size;
  return at;
}

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
  for (int i = 0; i < n; i++) out[i] = to_float(p[i], dtype == OPSIN_F16);
}

struct Place {
  uint8_t* block;
  int row;
};

Place place(const Matrix* m, int row, int i, int spread) {
  const int target = row + i / kRows * kRows * spread + i % kRows;
  return {m->data + target / kRows * m->block_bytes, target % kRows};
}

void put_scale(const Matrix* m, const Place& at, int group, uint16_t scale, uint16_t bias) {
  uint16_t* head = reinterpret_cast<uint16_t*>(at.block + group * m->group_bytes);
  head[at.row] = scale;
  head[kRows + at.row] = bias;
}

// codes of one group, one byte each
void put_codes(const Matrix* m, const Place& at, int group, int count, const uint8_t* codes) {
  uint8_t* q = at.block + group * m->group_bytes + 64 + at.row * 4;
  if (m->kind == kQ8) {
    for (int i = 0; i < count; i += 4) std::memcpy(q + i * 16, codes + i, 4);
    return;
  }
  for (int i = 0; i < count; i += 8) {
    for (int j = 0; j < 4; j++) {
      q[i * 8 + j] = static_cast<uint8_t>(codes[i + j] | codes[i + 4 + j] << 4);
    }
  }
}

void quantise_group(const Matrix* m, const Place& at, int group, const float* w, int count) {
  const bool f16 = m->scale_f16 != 0;
  float low = 0.0f, high = 0.0f;  // zero stays among the values a group can hold
  for (int i = 0; i < count; i++) {
    low = w[i] < low ? w[i] : low;
    high = w[i] > high ? w[i] : high;
  }
  const bool wide = m->kind == kQ8;
  const float most = -low > high ? -low : high;
  const float exact = wide ? most / 127.0f : (high - low) / 15.0f;
  const uint16_t scale = to_16(exact, f16);
  const float s = to_float(scale, f16);
  const uint16_t bias = to_16(wide ? -128.0f * s : low, f16);
  const float b = to_float(bias, f16), top = wide ? 255.0f : 15.0f;
  uint8_t codes[8];
  put_scale(m, at, group, scale, bias);
  uint8_t* q = at.block + group * m->group_bytes + 64 + at.row * 4;
  for (int i = 0; i < m->group; i += 8) {
    for (int j = 0; j < 8; j++) {
      float c = s > 0.0f && i + j < count ? __builtin_rintf((w[i + j] - b) / s) : 0.0f;
      c = c < 0.0f ? 0.0f : c > top ? top : c;
      codes[j] = static_cast<uint8_t>(c);
    }
    if (wide) {
      std::memcpy(q + i * 16, codes, 4);
      std::memcpy(q + i * 16 + 64, codes + 4, 4);
    } else {
      for (int j = 0; j < 4; j++) q[i * 8 + j] = static_cast<uint8_t>(codes[j] | codes[j + 4] << 4);
    }
  }
}

void fill_row(const Matrix* m, const Place& at, const float* w) {
  if (m->kind == kBf16) {
    uint16_t* p = reinterpret_cast<uint16_t*>(at.block) + at.row * 2;
    for (int c = 0; c < m->k; c++) p[c / 2 * 32 + c % 2] = float_to_bfloat(w[c]);
    return;
  }
  for (int g = 0; g < m->groups; g++) {
    const int from = g * m->group, left = m->k - from;
    if (left <= 0) continue;
    quantise_group(m, at, g, w + from, left < m->group ? left : m->group);
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

template <class Work>
void over_rows(int rows, Work&& work) {
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> lock(pool.region());
  const int chunks = chunks_for(rows, pool.size(), 16);
  pool.run(1, [&](Team& team) {
    team.phase(chunks, [&](int c) {
      const int64_t n = rows;
      work(static_cast<int>(n * c / chunks), static_cast<int>(n * (c + 1) / chunks));
    });
  });
}

}  // namespace

int64_t tile_scratch_bytes(const Matrix* m) {  // a block of four-bit codes as bytes, for tiles
  const int64_t eight = static_cast<int64_t>(m->group) * kRows * 8;  // or eight groups in turn
  const int64_t block = static_cast<int64_t>(m->padded_k) * kRows;
  return m->kind != kQ4 ? 0 : block > eight ? block : eight;
}

int64_t attention_scratch_bytes(int head_dim, int value_dim) {
  const int64_t dim = (head_dim + 31) / 32 * 32, wide = (value_dim + 31) / 32 * 32;
  return kKeyBlock * 2 * (dim + wide) + kAttentionRows * 2 * dim + kKeyBlock * kAttentionRows * 4 +
         kAttentionRows * kKeyBlock * 2 + kAttentionRows * 4 * wide + 2 * (dim > wide ? dim : wide) + 64;
}

}  // namespace opsin

using opsin::Matrix;

OpsinMatrix* opsin_matrix_new(int kind, int n, int k, int group, int scale_dtype) {
  const bool quantised = kind == opsin::kQ8 || kind == opsin::kQ4;
  if (n <= 0 || k <= 0 || (!quantised && kind != opsin::kBf16)) return nullptr;
  if (quantised && group != 0 && (group % 32 != 0 || k % group != 0)) return nullptr;
  if (quantised && group > 64 && group % 64 != 0) return nullptr;
  if (quantised && group == 0 && k > 65536) return nullptr;  // the integer sums would overflow
  Matrix* m = static_cast<Matrix*>(std::calloc(1, sizeof(Matrix)));
  if (!m) return nullptr;
  m->kind = kind;
  m->n = n;
  m->k = k;
  m->blocks = (n + opsin::kRows - 1) / opsin::kRows;
  if (quantised) {
    m->padded_k = group ? k : (k + 63) / 64 * 64;
    m->group = group ? group : m->padded_k;
    m->groups = m->padded_k / m->group;
    m->scale_f16 = scale_dtype == OPSIN_F16;
    m->group_bytes = 64 + static_cast<int64_t>(m->group) * (kind == opsin::kQ8 ? 16 : 8);
    m->block_bytes = m->groups * m->group_bytes;
  } else {
    m->padded_k = (k + 31) / 32 * 32;
    m->group = m->padded_k;
    m->groups = 0;
    m->block_bytes = static_cast<int64_t>(m->padded_k) * 32;
  }
  m->bytes = m->block_bytes * m->blocks;
  m->data = opsin::map_bytes(m->bytes, &m->capacity);
  if (!m->data) {
    std::free(m);
    return nullptr;
  }
  return m;
}

int opsin_matrix_fill_dense(OpsinMatrix* m, int row, int rows, int spread, const void* weights,
                            int dtype, int64_t stride) {
  if (!opsin::fits(m, row, rows, spread) || (!weights && rows > 0)) return OPSIN_BAD_ARGUMENT;
  opsin::over_rows(rows, [&](int from, int to) {
    float* w = static_cast<float*>(std::malloc(sizeof(float) * static_cast<size_t>(m->k)));
    if (!w) std::abort();
    for (int i = from; i < to; i++) {
      opsin::read_weights(weights, dtype, i * stride, m->k, w);
      opsin::fill_row(m, opsin::place(m, row, i, spread), w);
    }
    std::free(w);
  });
  return OPSIN_OK;
}

int opsin_matrix_fill_affine(OpsinMatrix* m, int row, int rows, int spread, const uint32_t* codes,
                             int bits, const uint16_t* scales, const uint16_t* biases) {
  if (!opsin::fits(m, row, rows, spread) || m->kind == opsin::kBf16) return OPSIN_BAD_ARGUMENT;
  if (bits < 2 || bits > (m->kind == opsin::kQ4 ? 4 : 8)) return OPSIN_BAD_ARGUMENT;
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
        opsin::put_codes(m, at, g, m->group, bytes);
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

void opsin_matrix_free(OpsinMatrix* m) {
  if (!m) return;
  munmap(m->data, static_cast<size_t>(m->capacity));
  std::free(m->bias);
  std::free(m);
}

int64_t opsin_matrix_bytes(const OpsinMatrix* m) { return m ? m->bytes : 0; }

int opsin_matrix_rows(const OpsinMatrix* m, const int64_t* rows, int count, int dtype, void* out) {
  if (!m || count < 0) return OPSIN_BAD_ARGUMENT;
  for (int i = 0; i < count; i++) {
    if (rows[i] < 0 || rows[i] >= m->n) return OPSIN_BAD_ARGUMENT;
  }
  opsin::over_rows(count, [&](int from, int to) {
    float* w = static_cast<float*>(std::malloc(sizeof(float) * static_cast<size_t>(m->k)));
    if (!w) std::abort();
    for (int i = from; i < to; i++) {
      opsin::kernels()->dequantize_row(m, static_cast<int>(rows[i]), w);
      opsin::write_row(w, dtype, static_cast<int64_t>(i) * m->k, m->k, out);
    }
    std::free(w);
  });
  return OPSIN_OK;
}
