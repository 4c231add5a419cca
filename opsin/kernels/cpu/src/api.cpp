// The rest of the C interface: choosing the instruction set, and kernels one at a time.
#include "api.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

#include "runtime.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace opsin {

namespace {

const Kernels* chosen = nullptr;

struct Features {
  bool avx2 = false, avxvnni = false, avx512 = false, vnni = false, bf16 = false, amx = false;
  bool intel = false;
};

#if defined(__x86_64__)
// AMX state is off until a process asks for it.
bool allow_tiles() {
#if defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features f;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return f;
  const bool fma = c & (1u << 12), f16c = c & (1u << 29);
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  const unsigned top = a;
  f.avx2 = (b & (1u << 5)) && fma && f16c;
  const bool zmm = (low & 0xe6) == 0xe6;
  f.avx512 = f.avx2 && zmm && (b & (1u << 16)) && (b & (1u << 17)) && (b & (1u << 30)) &&
             (b & (1u << 31));
  f.vnni = f.avx512 && (c & (1u << 11));
  const bool tiles = (low & (3u << 17)) == (3u << 17) && (d & (1u << 22)) && (d & (1u << 24)) &&
                     (d & (1u << 25));
  if (top >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    f.avxvnni = f.avx2 && (a & (1u << 4));
    f.bf16 = f.vnni && (a & (1u << 5));
  }
  f.amx = f.bf16 && tiles && allow_tiles();
  f.intel = __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
  return f;
}
#endif

// Best first.
int available(const Kernels** out) {
  int n = 0;
  const auto offer = [&](const Kernels* k) {
    if (k) out[n++] = k;
  };
#if defined(__x86_64__)
  const Features f = detect();
  if (f.amx) offer(amx_kernels());
  // Intel's processors add products of bfloat16 at half the rate of those of floats.
  if (f.bf16 && !f.intel) offer(avx512bf16_kernels());
  if (f.vnni) offer(avx512vnni_kernels());
  if (f.bf16 && f.intel) offer(avx512bf16_kernels());
  if (f.avx512) offer(avx512_kernels());
  if (f.avxvnni) offer(avx2vnni_kernels());
  if (f.avx2) offer(avx2_kernels());
#elif defined(__aarch64__)
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  if (getauxval(AT_HWCAP) & kDotProducts) offer(neon_kernels());
#else
  offer(neon_kernels());
#endif
#endif
  offer(portable_kernels());
  return n;
}

template <class Work>
void spread(int64_t items, int64_t least, Work&& work) {
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> lock(pool.region());
  const int64_t pieces = (items + least - 1) / least;
  const int chunks = chunks_for(pieces > 1 << 20 ? 1 << 20 : static_cast<int>(pieces),
                                pool.size(), 1);
  pool.run(1, [&](Team& team) {
    float* own = reinterpret_cast<float*>(pool.scratch(team.thread(), 3 << 18));
    team.phase(chunks, [&](int c) { work(items * c / chunks, items * (c + 1) / chunks, own); });
  });
}

}  // namespace

const Kernels* kernels() {
  if (!chosen) {
    const Kernels* all[16];
    available(all);
    chosen = all[0];
  }
  return chosen;
}

}  // namespace opsin

using opsin::Kernels;
using opsin::kernels;
using opsin::Pool;
using opsin::Team;

int opsin_init(const char* isa, int threads) {
  const Kernels* all[16];
  const int n = opsin::available(all);
  const Kernels* pick = nullptr;
  for (int i = 0; i < n && !pick; i++) {
    if (!isa || !*isa || !std::strcmp(isa, "auto") || !std::strcmp(isa, all[i]->name)) pick = all[i];
  }
  if (!pick) return OPSIN_NO_ISA;
  opsin::chosen = pick;
  Pool::main().resize(threads);
  return OPSIN_OK;
}

const char* opsin_isa() { return kernels()->name; }
int opsin_threads() { return Pool::instance().size(); }
int opsin_set_threads(int threads) {
  if (threads < 1 || threads > 1024) return OPSIN_BAD_ARGUMENT;
  Pool::main().resize(threads);
  return OPSIN_OK;
}

int opsin_aside(int threads) {
  if (threads < 0 || threads > 1024) return OPSIN_BAD_ARGUMENT;
  return Pool::lend(threads);
}

int opsin_isa_count() {
  const Kernels* all[16];
  return opsin::available(all);
}

const char* opsin_isa_name(int i) {
  const Kernels* all[16];
  const int n = opsin::available(all);
  return i >= 0 && i < n ? all[i]->name : nullptr;
}

int opsin_abi() {
  return static_cast<int>(sizeof(OpsinLinear) + 3 * sizeof(OpsinLayer) + 5 * sizeof(OpsinStack) +
                          7 * sizeof(OpsinStep) + 11 * sizeof(OpsinAttention) +
                          13 * sizeof(OpsinRowAdd)) +
         2;
}

int opsin_linear(const OpsinLinear* l) {
  if (!l || !l->matrix || l->rows < 0) return OPSIN_BAD_ARGUMENT;
  const opsin::Matrix* m = l->matrix;
  if (l->gated && (m->n % 32 != 0)) return OPSIN_BAD_ARGUMENT;
  if (l->accumulate && l->out_dtype != OPSIN_F32) return OPSIN_BAD_ARGUMENT;
  if (l->rows == 0) return OPSIN_OK;
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> lock(pool.region());
  uint8_t* shared = pool.scratch(-1, opsin::activation_bytes(m, l->rows));
  const int64_t own = opsin::product_thread_bytes(m);
  opsin::Product p;
  p.linear = *l;
  pool.run(2, [&](Team& team) {
    opsin::product(team, p, shared, pool.scratch(team.thread(), own));
  });
  return OPSIN_OK;
}

int opsin_attention(const OpsinAttention* a) {
  if (!a || a->tokens < 0 || a->kv_heads <= 0 || a->heads % a->kv_heads != 0) {
    return OPSIN_BAD_ARGUMENT;
  }
  if (a->head_dim <= 0 || a->value_dim <= 0 || a->block_size < 0) return OPSIN_BAD_ARGUMENT;
  if (a->tokens == 0 || a->sequences == 0) return OPSIN_OK;
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> lock(pool.region());
  const int64_t own = opsin::attention_thread_bytes(a->head_dim, a->value_dim);
  const opsin::AttentionJob job = {*a, nullptr, 0, 0, 0, false, nullptr, nullptr, {}};
  pool.run(1, [&](Team& team) {
    opsin::attention(team, job, pool.scratch(team.thread(), own));
  });
  return OPSIN_OK;
}

int opsin_norm(const void* x, const void* residual, const float* weight, const float* bias,
               int layer_norm, float eps, int64_t rows, int dim, int dtype, void* out,
               void* sum) {
  if (rows < 0 || dim <= 0 || dim > 65536) return OPSIN_BAD_ARGUMENT;
  if (rows == 0) return OPSIN_OK;
  const Kernels* k = kernels();
  opsin::spread(rows, 1, [&](int64_t from, int64_t to, float* own) {
    float* row = own;
    float* other = own + 65536;
    for (int64_t r = from; r < to; r++) {
      opsin::read_row(x, dtype, r * dim, dim, row);
      if (residual) {
        opsin::read_row(residual, dtype, r * dim, dim, other);
        k->axpy(other, 1.0f, dim, row);
      }
      if (sum) {
        // What is normalised is what the sum's own type keeps, as if it had been read back.
        opsin::write_row(row, dtype, r * dim, dim, sum);
        opsin::read_row(sum, dtype, r * dim, dim, row);
      }
      if (layer_norm) {
        k->layer_norm(row, weight, bias, eps, dim, row);
      } else {
        k->rms_norm(row, weight, eps, dim, row);
      }
      opsin::write_row(row, dtype, r * dim, dim, out);
    }
  });
  return OPSIN_OK;
}

int opsin_activate(const void* gate, const void* up, int kind, int64_t n, int dtype, void* out) {
  if (n < 0 || kind < 0 || kind > 5) return OPSIN_BAD_ARGUMENT;
  if (n == 0) return OPSIN_OK;
  const Kernels* k = kernels();
  constexpr int64_t kRun = 4096;
  opsin::spread((n + kRun - 1) / kRun, 1, [&](int64_t from, int64_t to, float* own) {
    for (int64_t i = from * kRun; i < to * kRun && i < n; i += kRun) {
      const int count = static_cast<int>(n - i < kRun ? n - i : kRun);
      opsin::read_row(gate, dtype, i, count, own);
      if (up) opsin::read_row(up, dtype, i, count, own + kRun);
      k->activate(kind, own, up ? own + kRun : nullptr, count, own);
      opsin::write_row(own, dtype, i, count, out);
    }
  });
  return OPSIN_OK;
}

int opsin_rope(void* x, const float* cos, const float* sin, int tokens, int heads, int head_dim,
               int rotary_dim, int interleaved, int64_t stride, int dtype) {
  if (tokens < 0 || rotary_dim > head_dim || rotary_dim % 2 != 0) return OPSIN_BAD_ARGUMENT;
  if (tokens == 0) return OPSIN_OK;
  const Kernels* k = kernels();
  opsin::spread(tokens, 1, [&](int64_t from, int64_t to, float* own) {
    for (int64_t t = from; t < to; t++) {
      for (int h = 0; h < heads; h++) {
        const int64_t at = t * stride + static_cast<int64_t>(h) * head_dim;
        opsin::read_row(x, dtype, at, rotary_dim, own);
        k->rope(own, cos + t * (rotary_dim / 2), sin + t * (rotary_dim / 2), rotary_dim,
                interleaved);
        opsin::write_row(own, dtype, at, rotary_dim, x);
      }
    }
  });
  return OPSIN_OK;
}

int64_t opsin_argmax(const float* x, int64_t n) { return kernels()->argmax(x, n); }

double opsin_softmax(const float* x, int64_t n, float temperature, float* out) {
  return kernels()->softmax(x, n, temperature, out);
}

namespace {

double seconds() {
  using clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(clock::now().time_since_epoch()).count();
}

}  // namespace

double opsin_read_bandwidth(int64_t bytes, int repeats) {
  OpsinMatrix* m = opsin_matrix_new(opsin::kBf16, static_cast<int>(bytes / 64), 32, 0, 0, 0);
  if (!m) return OPSIN_NO_MEMORY;
  std::memset(m->data, 1, static_cast<size_t>(m->bytes));
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> lock(pool.region());
  double best = 0.0;
  for (int r = 0; r < repeats; r++) {
    const double start = seconds();
    const int chunks = pool.size() * 16;
    const int64_t piece = m->bytes / chunks / 256 * 256;
    volatile float sink = 0.0f;
    pool.run(1, [&](Team& team) {
      team.phase(chunks, [&](int c) { sink = kernels()->read_sum(m->data + c * piece, piece); });
    });
    const double rate = static_cast<double>(piece * chunks) / (seconds() - start);
    best = rate > best ? rate : best;
  }
  opsin_matrix_free(m);
  return best;
}

double opsin_peak(int kind, int milliseconds) {
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> lock(pool.region());
  int64_t iterations = 10000;
  for (;;) {
    const double start = seconds();
    const int chunks = pool.size();
    double done = 0.0;
    pool.run(1, [&](Team& team) {
      team.phase(chunks, [&](int) { done = kernels()->peak(kind, iterations); });
    });
    const double spent = seconds() - start;
    if (spent * 1000.0 >= milliseconds) return done * chunks / spent;
    iterations *= 4;
  }
}
