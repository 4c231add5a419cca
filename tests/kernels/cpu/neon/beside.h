// What the comparisons of two builds of the kernels share: inputs, packed matrices, the verdict.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "api.h"
#include "kernels.h"

namespace beside {


using Floats = std::vector<float>;
using Halves = std::vector<uint16_t>;
using Bytes = std::vector<uint8_t>;

inline int failures = 0;
inline int64_t compared = 0;

struct Random {
  uint64_t state = 0x9e3779b97f4a7c15u;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
  }
  int below(int n) { return static_cast<int>(next() % static_cast<uint32_t>(n)); }
  float unit() { return static_cast<float>(next() >> 8) * (1.0f / (1 << 24)); }
  float normal() { return (unit() + unit() + unit() + unit() - 2.0f) * 1.7320508f; }
};
inline Random dice;

inline Floats normals(int64_t n, float scale = 1.0f) {
  Floats x(static_cast<size_t>(n));
  for (float& v : x) v = scale * dice.normal();
  return x;
}

inline float widen(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline Floats widened(const Halves& x) {
  Floats out;
  for (const uint16_t v : x) out.push_back(widen(v));
  return out;
}

inline Halves narrowed(const Floats& x) {
  Halves out(x.size());
  opsin::portable_kernels()->to_bf16(x.data(), static_cast<int>(x.size()), out.data());
  return out;
}

inline void fail(const std::string& what, const std::string& why) {
  if (failures++ < 40) std::printf("FAIL %s: %s\n", what.c_str(), why.c_str());
}

inline bool same_bits(float a, float b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}
inline bool same_bits(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }
inline bool same_bits(int64_t a, int64_t b) { return a == b; }

// The same bits; any value that is not a number is like any other.
template <class T>
void same(const std::string& what, const std::vector<T>& got, const std::vector<T>& want) {
  if (got.size() != want.size()) return fail(what, "another size");
  size_t wrong = 0, first = 0;
  for (size_t i = got.size(); i-- > 0;) {
    if (same_bits(got[i], want[i])) continue;
    wrong++;
    first = i;
  }
  compared += static_cast<int64_t>(got.size());
  if (!wrong) return;
  fail(what, std::to_string(wrong) + " of " + std::to_string(got.size()) +
                 " differ, the first at " + std::to_string(first) + ": " +
                 std::to_string(got[first]) + ", not " + std::to_string(want[first]));
}
inline void same(const std::string& what, const Halves& got, const Halves& want) {
  same(what, std::vector<int64_t>(got.begin(), got.end()),
       std::vector<int64_t>(want.begin(), want.end()));
}
inline void same(const std::string& what, const Bytes& got, const Bytes& want) {
  same(what, std::vector<int64_t>(got.begin(), got.end()),
       std::vector<int64_t>(want.begin(), want.end()));
}

// Within absolute + relative * |want| of what double arithmetic gives, everywhere.
inline void near(const std::string& what, const Floats& got, const std::vector<double>& want,
          double absolute, double relative = 0.0) {
  if (got.size() != want.size()) return fail(what, "another size");
  for (size_t i = 0; i < got.size(); i++) {
    if (std::abs(got[i] - want[i]) <= absolute + relative * std::abs(want[i])) continue;
    return fail(what, "at " + std::to_string(i) + " " + std::to_string(got[i]) + ", not " +
                          std::to_string(want[i]));
  }
  compared += static_cast<int64_t>(got.size());
}

inline double largest(const std::vector<double>& x) {
  double most = 0.0;
  for (const double v : x) most = std::max(most, std::abs(v));
  return most;
}

inline const opsin::Kernels* use(const char* isa, int threads = 2) {
  const bool ready = opsin_init(isa, threads) == OPSIN_OK && !std::strcmp(opsin_isa(), isa);
  if (!ready) fail(isa, "cannot be chosen");
  return std::strcmp(isa, "neon") ? opsin::portable_kernels() : opsin::neon_kernels();
}

// work(kernels) with each of the two; returns NEON's answer.
template <class Work>
auto both(const std::string& what, Work&& work) {
  auto want = work(use("portable"));
  auto got = work(use("neon"));
  same(what, got, want);
  return got;
}

struct Form {
  int kind, k, group, scale_dtype, rotated;
  std::string name() const {
    static const char* const kinds[] = {"bf16", "q8", "q4", "q6", "bf13", "q5"};
    static const char* const scales[] = {"", " bf16", " f16", " bytes"};
    return std::string(kinds[kind]) + " k=" + std::to_string(k) +
           " group=" + std::to_string(group) + scales[scale_dtype] + (rotated ? " rotated" : "");
  }
};

inline const std::vector<Form> kForms = {
    {opsin::kBf16, 32, 0, OPSIN_BF16, 0},  {opsin::kBf16, 100, 0, OPSIN_BF16, 0},
    {opsin::kBf16, 260, 0, OPSIN_BF16, 0}, {opsin::kQ8, 96, 32, OPSIN_F16, 0},
    {opsin::kQ8, 192, 64, OPSIN_BF16, 0},  {opsin::kQ8, 256, 128, OPSIN_F16, 0},
    {opsin::kQ8, 257, 0, OPSIN_F16, 0},    {opsin::kQ4, 96, 32, OPSIN_BF16, 0},
    {opsin::kQ4, 192, 64, OPSIN_F16, 0},   {opsin::kQ4, 256, 128, OPSIN_BF16, 0},
    {opsin::kQ4, 100, 0, OPSIN_F16, 0},    {opsin::kQ8, 192, 64, OPSIN_F16, 1},
    {opsin::kQ8, 160, 0, OPSIN_F16, 1},    {opsin::kQ4, 96, 32, OPSIN_F16, 1},
    {opsin::kQ4, 192, 64, OPSIN_BF16, 1},  {opsin::kQ6, 96, 32, OPSIN_BF16, 0},
    {opsin::kQ6, 192, 64, OPSIN_F16, 0},   {opsin::kQ6, 100, 0, OPSIN_F16, 0},
    {opsin::kQ6, 192, 64, OPSIN_F16, 1},   {opsin::kBf13, 192, 0, OPSIN_BF16, 0},
    {opsin::kQ5, 96, 32, OPSIN_BF16, 0},   {opsin::kQ5, 192, 64, OPSIN_U8, 1},
    {opsin::kQ5, 100, 0, OPSIN_F16, 0},    {opsin::kQ5, 96, 32, OPSIN_U8, 0},
    {opsin::kQ4, 256, 128, OPSIN_U8, 1},   {opsin::kQ4, 96, 32, OPSIN_U8, 1},
    {opsin::kQ4, 100, 0, OPSIN_U8, 0},
};

// A packed matrix, and what it was filled with.
struct Packed {
  OpsinMatrix* m;
  Form form;
  Packed(int n, const Form& f)
      : m(opsin_matrix_new(f.kind, n, f.k, f.group, f.scale_dtype, f.rotated)), form(f) {
    if (!m) std::abort();
  }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;
  ~Packed() { opsin_matrix_free(m); }

  void fill(const void* weights, int dtype, int row, int rows, int spread) {
    if (opsin_matrix_fill_dense(m, row, rows, spread, weights, dtype, form.k)) std::abort();
  }
  void fill_bias(const Floats& bias) {
    if (opsin_matrix_fill_bias(m, 0, m->n, 1, bias.data())) std::abort();
  }
  Floats rows() const {
    std::vector<int64_t> all(static_cast<size_t>(m->n));
    for (size_t i = 0; i < all.size(); i++) all[i] = static_cast<int64_t>(i);
    Floats out(all.size() * static_cast<size_t>(form.k));
    if (opsin_matrix_rows(m, all.data(), m->n, OPSIN_F32, out.data())) std::abort();
    return out;
  }
  Bytes bytes() const {
    const uint8_t* p = m->data;
    return Bytes(p, p + opsin_matrix_bytes(m));
  }
};

struct Epilogue {
  int gated = 0, activation = -1, accumulate = 0, out_dtype = OPSIN_F32;
  float scale = 1.0f;
};

inline Floats multiply(const Packed& w, const float* x, int rows, const Epilogue& e = {}) {
  const int columns = e.gated ? w.m->n / 2 : w.m->n;
  Floats wide(static_cast<size_t>(rows) * columns, 0.5f);
  Halves half(wide.size());
  OpsinLinear l{};
  l.matrix = w.m;
  l.x = x;
  l.out = e.out_dtype == OPSIN_BF16 ? static_cast<void*>(half.data()) : wide.data();
  l.x_stride = w.form.k;
  l.out_stride = columns;
  l.x_dtype = OPSIN_F32;
  l.out_dtype = e.out_dtype;
  l.rows = rows;
  l.gated = e.gated;
  l.activation = e.activation;
  l.accumulate = e.accumulate;
  l.scale = e.scale;
  if (opsin_linear(&l)) std::abort();
  return e.out_dtype == OPSIN_BF16 ? widened(half) : wide;
}

// The cases, by what they compare.
void products();
void whole_numbers();
void epilogues();
void filling();
void rows_of_numbers();
void rotary();
void sampling();
void rounding();
void attention();
void packed_attention();
void stacks();

}  // namespace beside
