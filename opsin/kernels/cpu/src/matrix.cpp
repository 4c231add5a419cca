// Weight matrices: memory on huge pages or where it lies, and rows read back.
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "runtime.h"

namespace opsin {

namespace {

constexpr int64_t kHuge = 2 << 20, kLeastPage = 4096;
constexpr int64_t kRun = 256 << 20;

// Room for the prefetches and tile loads that run past the end.
constexpr int64_t kSlack = 4096;

// Zeros on huge pages where there are any, from an address that is a multiple of their size.
uint8_t* map_huge(int64_t size) {
  const int64_t asked = size + kHuge;
  void* p = mmap(nullptr, static_cast<size_t>(asked), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  const uintptr_t from = reinterpret_cast<uintptr_t>(p);
  const uintptr_t start = (from + kHuge - 1) / kHuge * kHuge;
  if (start > from) munmap(p, start - from);
  const uintptr_t end = start + static_cast<uintptr_t>(size);
  const uintptr_t last = from + static_cast<uintptr_t>(asked);
  if (last > end) munmap(reinterpret_cast<void*>(end), last - end);
  uint8_t* at = reinterpret_cast<uint8_t*>(start);
#if defined(MADV_HUGEPAGE)
  madvise(at, static_cast<size_t>(size), MADV_HUGEPAGE);
#endif
  return at;
}

// Matrices lie one after another in runs of address space, so that none ends in small pages and
// small ones share huge pages. A run takes memory as it is written to, and ends with its last
// matrix; each matrix that goes gives back the pages that were its own alone.
struct Run {
  uint8_t* data;
  int64_t size, used;
  int live;
};

std::mutex runs_lock;
std::vector<Run> runs;

// The system's own page: 16 or 64 KiB on some ARM machines. Pages of a matrix that goes must not
// be those of its neighbour.
int64_t page_bytes() {
  const int64_t page = sysconf(_SC_PAGESIZE);
  return page > kLeastPage ? page : kLeastPage;
}

uint8_t* map_bytes(int64_t bytes, int64_t* capacity) {
  static const int64_t page = page_bytes();
  const int64_t size = (bytes + kSlack + page - 1) / page * page;
  *capacity = size;
  std::lock_guard<std::mutex> lock(runs_lock);
  if (runs.empty() || runs.back().size - runs.back().used < size) {
    const int64_t whole = size > kRun ? (size + kHuge - 1) / kHuge * kHuge : kRun;
    uint8_t* data = map_huge(whole);
    if (!data) return nullptr;
    runs.push_back({data, whole, 0, 0});
  }
  Run& run = runs.back();
  uint8_t* at = run.data + run.used;
  run.used += size;
  run.live++;
  return at;
}

void unmap_bytes(uint8_t* data, int64_t capacity) {
  std::lock_guard<std::mutex> lock(runs_lock);
  for (size_t i = 0; i < runs.size(); i++) {
    Run& run = runs[i];
    if (data < run.data || data >= run.data + run.size) continue;
    if (--run.live == 0) {
      munmap(run.data, static_cast<size_t>(run.size));
      runs.erase(runs.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      madvise(data, static_cast<size_t>(capacity), MADV_DONTNEED);
    }
    return;
  }
}

// Of rows that lie elsewhere, few enough that the others save more.
constexpr int kLeastRoom = 16, kRoomShare = 64;

// A matrix without memory; null when the arguments do not do.
Matrix* describe(int kind, int n, int k, int group, int scales, int rotated) {
  const bool quantised = kind == kQ8 || kind == kQ6 || kind == kQ5 || kind == kQ4;
  if (n <= 0 || k <= 0 || (!quantised && !is_bf16(kind))) return nullptr;
  if (kind == kBf13 && k % kPackedColumns != 0) return nullptr;
  if (quantised && group != 0 && (group % 32 != 0 || k % group != 0)) return nullptr;
  if (quantised && group > 64 && group % 64 != 0) return nullptr;
  if (rotated && (!quantised || k % 32 != 0)) return nullptr;
  if (quantised && group == 0 && k > 65536) return nullptr;  // the integer sums would overflow
  if (quantised && (scales < kScaleBf16 || scales > kScaleBytes)) return nullptr;
  if (kind == kQ8 && scales == kScaleBytes) return nullptr;  // too coarse beside its codes
  Matrix* m = static_cast<Matrix*>(std::calloc(1, sizeof(Matrix)));
  if (!m) return nullptr;
  m->kind = kind;
  m->n = n;
  m->k = k;
  m->blocks = (n + kRows - 1) / kRows;
  if (quantised) {
    m->padded_k = group ? k : (k + 63) / 64 * 64;
    m->group = group ? group : m->padded_k;
    m->groups = m->padded_k / m->group;
    m->scales = scales;
    m->rotated = !rotated ? 0 : k % 64 == 0 ? 64 : 32;
    m->heads_at = scales == kScaleBytes ? 4 * kRows : 0;
    m->codes_at = (m->heads_at + m->groups * head_bytes(scales) + 63) / 64 * 64;
    m->code_bytes = static_cast<int64_t>(m->group) * 2 * code_bits(kind);
    m->block_bytes = m->codes_at + m->groups * m->code_bytes;
  } else {
    m->padded_k = (k + 31) / 32 * 32;
    m->group = m->padded_k;
    m->groups = 0;
    const int64_t packed = int64_t{k} / kPackedColumns * kPackedBytes;
    m->row_bytes = kind == kBf13 ? packed : static_cast<int64_t>(m->padded_k) * 2;
    m->step_bytes = 64;
    m->block_bytes = m->row_bytes * kRows + (kind == kBf13 ? 64 : 0);
    if (kind == kBf13) m->room = kLeastRoom + n / kRoomShare;
  }
  m->bytes = m->block_bytes * m->blocks;
  return m;
}

// Memory of its own; false if there is none.
bool give_memory(Matrix* m) {
  m->data = map_bytes(m->bytes + m->room * int64_t{2} * m->k, &m->capacity);
  if (!m->data || m->kind != kBf16) return m->data;
  m->at = static_cast<const uint8_t**>(std::calloc(static_cast<size_t>(m->blocks), sizeof(*m->at)));
  for (int b = 0; m->at && b < m->blocks; b++) m->at[b] = m->data + b * m->block_bytes;
  return m->at;
}

}  // namespace

bool make_plain(Matrix* m) {
  Matrix* plain = describe(kBf16, m->n, m->k, 0, 0, 0);
  if (!plain || !give_memory(plain)) {
    opsin_matrix_free(plain);
    return false;
  }
  for (int row = 0; row < m->n; row++) {
    kernels()->unpack(m, row, plain->data + row * plain->row_bytes);
  }
  plain->bias = m->bias;
  m->bias = nullptr;
  std::swap(*m, *plain);
  opsin_matrix_free(plain);
  return true;
}

int64_t tile_scratch_bytes(const Matrix* m) {
  if (m->kind == kBf13) return int64_t{2 * kRows} * 2 * m->padded_k;  // two blocks, unpacked
  // narrow codes as bytes: eight groups, or as many as are near
  const int columns = m->group * 8 < kNearColumns ? kNearColumns : m->group * 8;
  return !is_bf16(m->kind) && m->kind != kQ8 ? int64_t{kRows} * columns : 0;
}

int64_t attention_scratch_bytes(int head_dim, int value_dim) {
  const int64_t dim = (head_dim + 31) / 32 * 32, wide = (value_dim + 31) / 32 * 32;
  return kKeyBlock * 2 * (dim + wide) + kKeptBlocks * (kKeyBlock * 4 * (dim + wide) + 4 * wide) +
         kAttentionRows * 4 * (dim + wide) + kKeyBlock * kAttentionRows * 6 +
         2 * (dim > wide ? dim : wide) + 64 + 2 * kKeptBlocks;
}

}  // namespace opsin

using opsin::Matrix;

OpsinMatrix* opsin_matrix_new(int kind, int n, int k, int group, int scale_dtype, int rotated) {
  Matrix* m = opsin::describe(kind, n, k, group, scale_dtype, rotated);
  if (!m) return nullptr;
  if (!opsin::give_memory(m)) {
    opsin_matrix_free(m);
    return nullptr;
  }
  return m;
}

OpsinMatrix* opsin_matrix_view(int kind, int n, int k, int group, int scale_dtype,
                               const void* data, int64_t bytes, int rotated) {
  Matrix* m = kind == opsin::kBf16 ? nullptr : opsin::describe(kind, n, k, group, scale_dtype, rotated);
  if (!m) return nullptr;
  const int64_t more = bytes - m->bytes - opsin::kSlack, row = int64_t{2} * k;
  const bool fits = kind == opsin::kBf13 ? more >= 0 && more % row == 0 && more / row <= n : more == 0;
  if (!data || reinterpret_cast<uintptr_t>(data) % 64 != 0 || !fits) {
    std::free(m);
    return nullptr;
  }
  m->elsewhere = static_cast<int32_t>(more / row);
  m->data = static_cast<uint8_t*>(const_cast<void*>(data));
  return m;
}

const void* opsin_matrix_data(const OpsinMatrix* m) {
  return m && m->kind != opsin::kBf16 ? m->data : nullptr;
}

void opsin_matrix_free(OpsinMatrix* m) {
  if (!m) return;
  if (m->capacity) opsin::unmap_bytes(m->data, m->capacity);
  std::free(m->at);
  std::free(m->bias);
  std::free(m);
}

int64_t opsin_matrix_bytes(const OpsinMatrix* m) {
  return m ? m->bytes + m->elsewhere * int64_t{2} * m->k : 0;
}

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
