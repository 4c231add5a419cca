// Norms, activations, rotation, sampling and rounding.
#include "beside.h"

namespace beside {

namespace {

std::vector<double> activated(int kind, const Floats& x) {
  std::vector<double> out;
  for (const double v : x) {
    const double gelu = 0.7978845608028654 * (v + 0.044715 * v * v * v), r = v > 0 ? v : 0;
    const double all[] = {v / (1 + std::exp(-v)),      0.5 * v * (1 + std::tanh(gelu)),
                          0.5 * v * std::erfc(-v / std::sqrt(2.0)), r, r * r,
                          v / (1 + std::exp(-1.702 * v))};
    out.push_back(all[kind]);
  }
  return out;
}

}  // namespace

void rows_of_numbers() {
  for (const int dim : {16, 100, 1031}) {
    const Floats x = normals(5 * dim), residual = normals(5 * dim), weight = normals(dim),
                 bias = normals(dim);
    for (const int layer : {0, 1}) {
      for (const int dtype : {OPSIN_F32, OPSIN_BF16}) {
        both("norm of " + std::to_string(dim), [&](auto) {
          const Halves hx = narrowed(x), hr = narrowed(residual);
          Floats out(2 * x.size());
          Halves half(out.size());
          const bool wide = dtype == OPSIN_F32;
          const auto pick = [&](const Floats& f, const Halves& h) {
            return wide ? static_cast<const void*>(f.data()) : h.data();
          };
          void* to = wide ? static_cast<void*>(out.data()) : half.data();
          void* sum = wide ? static_cast<void*>(out.data() + x.size()) : half.data() + x.size();
          opsin_norm(pick(x, hx), pick(residual, hr), weight.data(), layer ? bias.data() : nullptr,
                     layer, 1e-6f, 5, dim, dtype, to, sum);
          return wide ? out : widened(half);
        });
      }
    }
    both("axpy", [&](const opsin::Kernels* k) {
      Floats out = residual;
      k->axpy(x.data(), 0.3f, 5 * dim, out.data());
      return out;
    });
  }
  Floats line;
  for (int i = 0; i <= 1000; i++) line.push_back(-30.0f + 0.06f * static_cast<float>(i));
  for (const float v : {0.0f, -0.0f, -100.0f, 100.0f, 1e-8f}) line.push_back(v);
  const Floats up = normals(static_cast<int64_t>(line.size()));
  for (int kind = 0; kind < 6; kind++) {
    const std::string name = "activation " + std::to_string(kind);
    Floats out(line.size());
    const int64_t size = static_cast<int64_t>(line.size());
    near(name, both(name, [&](auto) {
           opsin_activate(line.data(), nullptr, kind, size, OPSIN_F32, out.data());
           return out;
         }), activated(kind, line), 2e-6, 2e-6);
    both(name + " times up", [&](auto) {
      opsin_activate(line.data(), up.data(), kind, size, OPSIN_F32, out.data());
      return out;
    });
  }
}

void rotary() {
  const std::pair<int, int> sizes[] = {{64, 64}, {80, 80}, {96, 24}};
  for (const auto& [dim, turned] : sizes) {
    const Floats x = normals(5 * 3 * dim), angle = normals(5 * turned / 2);
    Floats cos, sin;
    for (const float a : angle) {
      cos.push_back(std::cos(a));
      sin.push_back(std::sin(a));
    }
    for (const int pairs : {0, 1}) {
      both("rope of " + std::to_string(dim), [&, dim = dim, turned = turned](auto) {
        Floats out = x;
        Halves half = narrowed(x);
        const float *c = cos.data(), *s = sin.data();
        opsin_rope(out.data(), c, s, 5, 3, dim, turned, pairs, 3 * dim, OPSIN_F32);
        opsin_rope(half.data(), c, s, 5, 3, dim, turned, pairs, 3 * dim, OPSIN_BF16);
        const Floats wide = widened(half);
        out.insert(out.end(), wide.begin(), wide.end());
        return out;
      });
    }
  }
}

void sampling() {
  for (const int n : {1, 15, 16, 4099}) {
    Floats logits = normals(n, 5.0f);
    logits[n / 2] = n > 1 ? -std::numeric_limits<float>::infinity() : 0.0f;
    both("softmax of " + std::to_string(n), [&](const opsin::Kernels* k) {
      Floats out(logits.size());
      std::vector<double> all = {k->softmax(logits.data(), n, 0.7f, out.data()),
                                 static_cast<double>(k->argmax(logits.data(), n))};
      all.insert(all.end(), out.begin(), out.end());
      return all;
    });
  }
  both("the first of equals", [&](const opsin::Kernels* k) {
    const Floats ones(100, 1.0f);
    return std::vector<int64_t>{k->argmax(ones.data(), 100)};
  });
  both("reading and peak", [&](const opsin::Kernels* k) {
    Bytes memory(1024, 3);
    return std::vector<double>{k->read_sum(memory.data(), 1024), k->peak(opsin::kBf16, 3),
                               k->peak(opsin::kQ4, 3)};
  });
}

// Numbers to fewer bits and back: bfloat16, activations in eight bits, rows of the cache.
void rounding() {
  Halves every(65536);
  for (size_t i = 0; i < every.size(); i++) every[i] = static_cast<uint16_t>(i);
  Floats wide = both("bfloat16 to float", [&](const opsin::Kernels* k) {
    Floats out(every.size());
    k->from_bf16(every.data(), 65536, out.data());
    return out;
  });
  for (float& v : wide) v *= 1.0f + 0.01f * dice.unit();
  wide.resize(65531);
  both("float to bfloat16", [&](const opsin::Kernels* k) {
    Halves out(65568, 7);
    k->to_bf16(wide.data(), 65531, out.data());
    k->narrow(wide.data(), 65531, 65536, out.data());
    return out;
  });
  Floats x = normals(8 * 200);
  x[64] = std::numeric_limits<float>::quiet_NaN();
  x[200 + 5] = -std::numeric_limits<float>::infinity();
  for (int i = 0; i < 64; i++) x[400 + i] = 1e-35f * x[i];
  for (int i = 0; i < 200; i++) x[600 + i] = 0.0f;
  for (const int group : {32, 64, 128, 256}) {
    both("activations in groups of " + std::to_string(group), [&](const opsin::Kernels* k) {
      std::vector<double> out;
      for (int r = 0; r < 8; r++) {
        const int padded = (200 + group - 1) / group * group, groups = padded / group;
        std::vector<int8_t> codes(padded);
        Floats scale(groups), sum(groups);
        k->quantize(x.data() + 200 * r, 200, padded, group, codes.data(), scale.data(), sum.data());
        out.insert(out.end(), codes.begin(), codes.end());
        for (int g = 0; g < groups; g++) {
          out.push_back(scale[g]);
          out.push_back(sum[g]);
        }
      }
      return out;
    });
  }
  for (const int bits : {8, 4}) {
    for (const int groups : {1, 2, 4}) {
      both("cache rows at " + std::to_string(bits) + " bits", [&](const opsin::Kernels* k) {
        const Floats row(x.begin() + 800, x.begin() + 896);
        Bytes out(96 * bits / 8 + 4 * groups);
        Halves scales(2 * groups);
        k->pack_row(row.data(), 96, groups, bits, out.data(), scales.data());
        std::memcpy(out.data() + 96 * bits / 8, scales.data(), 4u * groups);
        return out;
      });
    }
  }
}

}  // namespace beside
