// Products with packed matrices of every kind, and how the matrices are filled.
#include "beside.h"

namespace beside {

namespace {

// The activations that a product of this matrix sees, once they are rounded.
Floats seen(const Packed& w, const Floats& x, int rows) {
  const opsin::Kernels* k = opsin::portable_kernels();
  const int n = w.form.k, padded = w.m->padded_k;
  if (opsin::is_bf16(w.form.kind)) return widened(narrowed(x));
  Floats out, row(static_cast<size_t>(padded)), scale(w.m->groups), sum(w.m->groups);
  std::vector<int8_t> codes(static_cast<size_t>(padded));
  for (int r = 0; r < rows; r++) {
    std::copy(x.begin() + r * n, x.begin() + (r + 1) * n, row.begin());
    if (w.form.rotated) k->rotate(row.data(), n, w.m->rotated, row.data());
    k->quantize(row.data(), n, padded, w.m->group, codes.data(), scale.data(), sum.data());
    for (int c = 0; c < n; c++) row[c] = codes[c] * scale[c / w.m->group];
    if (w.form.rotated) k->rotate(row.data(), n, w.m->rotated, row.data());
    out.insert(out.end(), row.begin(), row.begin() + n);
  }
  return out;
}

std::vector<double> product(const Floats& x, const Floats& weights, const Floats& bias, int k) {
  const size_t rows = x.size() / k, n = weights.size() / k;
  std::vector<double> out;
  for (size_t r = 0; r < rows; r++) {
    for (size_t i = 0; i < n; i++) {
      double sum = bias[i];
      for (int c = 0; c < k; c++) sum += double{x[r * k + c]} * weights[i * k + c];
      out.push_back(sum);
    }
  }
  return out;
}

}  // namespace

// Every kind of matrix: 70 rows at once, and each count from 1 to 17 the same bits as among them.
void products() {
  constexpr int n = 37, many = 70;
  for (const Form& form : kForms) {
    use("portable");
    Packed w(n, form);
    w.fill(normals(int64_t{n} * form.k, 0.1f).data(), OPSIN_F32, 0, n, 1);
    const Floats bias = normals(n), x = normals(int64_t{many} * form.k);
    w.fill_bias(bias);
    const Floats whole = both(form.name(), [&](auto) { return multiply(w, x.data(), many); });
    const auto want = product(seen(w, x, many), w.rows(), bias, form.k);
    near(form.name() + " beside double", whole, want, (form.rotated ? 1e-5 : 2e-6) * largest(want));
    for (int rows = 1; rows <= 17; rows++) {
      for (const int start : {0, 51}) {
        use("neon", 1 + rows % 3);
        const auto from = whole.begin() + start * n;
        same(form.name() + " rows=" + std::to_string(rows),
             multiply(w, x.data() + start * form.k, rows), Floats(from, from + rows * n));
      }
    }
  }
}

// Whole numbers at the ends of their ranges, whose sums floats hold: they must be exactly right.
void whole_numbers() {
  constexpr int n = 33, rows = 5, k = 256;
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    const int six = bits == 5 ? opsin::kQ5 : opsin::kQ6;
    const int kind = bits <= 4 ? opsin::kQ4 : bits <= 6 ? six : opsin::kQ8;
    const Form form = {kind, k, 64, OPSIN_BF16, 0};
    Packed w(n, form);
    std::vector<uint32_t> words(static_cast<size_t>(n) * k * bits / 32);
    for (uint32_t& word : words) word = dice.below(4) ? dice.next() : ~0u;
    const Halves one(n * 4, 0x3f80), offset(n * 4, 0xc300);  // 1 and -128
    if (opsin_matrix_fill_affine(w.m, 0, n, 1, words.data(), bits, one.data(), offset.data())) {
      std::abort();
    }
    Floats x(static_cast<size_t>(rows) * k);
    for (size_t i = 0; i < x.size(); i++) {  // each group's largest is 127: its step is 1
      const bool top = i % 64 == 5 || i < k;
      x[i] = static_cast<float>(!top ? dice.below(255) - 127 : i % 3 ? -127 : 127);
    }
    const std::string name = std::to_string(bits) + " bits in whole numbers";
    near(name, both(name, [&](auto) { return multiply(w, x.data(), rows); }),
         product(x, w.rows(), Floats(n), k), 0.0);
  }
  Packed w(n, {opsin::kBf16, k, 0, OPSIN_BF16, 0});
  Floats weights(static_cast<size_t>(n) * k), x(static_cast<size_t>(rows) * k);
  for (float& v : weights) v = static_cast<float>(dice.below(511) - 255);
  for (float& v : x) v = static_cast<float>(dice.below(255) - 127);
  w.fill(weights.data(), OPSIN_F32, 0, n, 1);
  const auto want = product(x, weights, Floats(n), k);
  near("bf16 in whole numbers", multiply(w, x.data(), rows), want, 0.0);
}

// What becomes of a product's sums, and what is not a number.
void epilogues() {
  constexpr int n = 96, rows = 9;
  const Form forms[] = {{opsin::kBf16, 128, 0, OPSIN_BF16, 0},
                        {opsin::kQ8, 128, 0, OPSIN_F16, 0},
                        {opsin::kQ6, 128, 64, OPSIN_F16, 1},
                        {opsin::kQ5, 128, 64, OPSIN_U8, 1},
                        {opsin::kQ4, 128, 64, OPSIN_F16, 1}};
  for (const Form& form : forms) {
    use("portable");
    Packed w(n, form);
    const Floats weights = normals(int64_t{n} * form.k, 0.1f);
    w.fill(weights.data(), OPSIN_F32, 0, n / 2, 2);
    w.fill(weights.data() + n / 2 * form.k, OPSIN_F32, 16, n / 2, 2);
    w.fill_bias(normals(n));
    Floats x = normals(int64_t{rows} * form.k);
    for (int activation = -1; activation < 6; activation++) {
      for (int way = 0; way < 8; way++) {
        const int dtype = way == 4 || way == 5 ? OPSIN_BF16 : OPSIN_F32;
        const Epilogue e = {way & 1, activation, way & 2, dtype, way & 4 ? 0.3f : 1.0f};
        const std::string name = form.name() + " activation=" + std::to_string(activation);
        both(name + " way=" + std::to_string(way),
             [&](auto) { return multiply(w, x.data(), rows, e); });
      }
    }
    x[form.k] = std::numeric_limits<float>::quiet_NaN();
    x[3 * form.k + 7] = std::numeric_limits<float>::infinity();
    const Floats out = both(form.name() + " not finite",
                            [&](auto) { return multiply(w, x.data(), rows); });
    if (!std::isfinite(out[0]) || std::isfinite(out[n]) || std::isfinite(out[3 * n])) {
      fail(form.name(), "what is not finite does not stay so");
    }
  }
}

// Packed bytes, and rows read back, for weights of every type.
void filling() {
  constexpr int n = 50, room = 120;
  for (const Form& form : kForms) {
    for (const int dtype : {OPSIN_F32, OPSIN_BF16, OPSIN_F16}) {
      Floats weights = normals(int64_t{n} * form.k, 0.1f);
      for (int c = 0; c < form.k; c++) weights[3 * form.k + c] = c % 7 ? 0.0f : weights[c];
      std::fill(weights.begin() + 4 * form.k, weights.begin() + 5 * form.k, 0.5f);
      Halves half = narrowed(weights);
      if (dtype == OPSIN_F16) {
        for (uint16_t& h : half) h = static_cast<uint16_t>(h & 0x8fff) | 0x2000;  // small halves
      }
      const void* source = half.data();
      if (dtype == OPSIN_F32) source = weights.data();
      const std::string name = form.name() + " from type " + std::to_string(dtype);
      Floats rows;
      both(name, [&](auto) {
        Packed w(room, form);
        w.fill(source, dtype, 16, n, 2);
        rows = w.rows();
        return w.bytes();
      });
      use("portable");
      Packed w(room, form);
      w.fill(source, dtype, 16, n, 2);
      same(name + ", rows", rows, w.rows());
      if (form.kind != opsin::kQ8 || form.rotated || dtype != OPSIN_F32) continue;
      std::vector<double> want(rows.size());
      for (int i = 0; i < n; i++) {
        const int at = 16 + i / 16 * 32 + i % 16;
        for (int c = 0; c < form.k; c++) want[at * form.k + c] = weights[i * form.k + c];
      }
      near(name + ", rows beside the weights", rows, want, 0.6 * 0.35 / 127);
    }
  }
}

}  // namespace beside
