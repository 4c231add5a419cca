// The sixteen-lane vectors as plain loops, with NEON where the four-lane form gains most.
// Included by simd.h inside its namespace.

struct F { float v[16]; };
struct V { uint8_t v[64]; };
struct I { int32_t v[16]; };

#define OPSIN_LANES for (int i = 0; i < 16; i++)

OPSIN_INLINE F load(const float* p) {
  F r;
  __builtin_memcpy(r.v, p, 64);
  return r;
}
OPSIN_INLINE void store(float* p, F a) { __builtin_memcpy(p, a.v, 64); }
template <int N>
OPSIN_INLINE void store_first(float* p, F a) {
  __builtin_memcpy(p, a.v, 4 * N);
}
OPSIN_INLINE F in_register(F a) { return a; }
OPSIN_INLINE F set1(float x) {
  F r;
  OPSIN_LANES r.v[i] = x;
  return r;
}
#define OPSIN_LANEWISE(name, expression) \
  OPSIN_INLINE F name(F a, F b) {        \
    F r;                                 \
    OPSIN_LANES r.v[i] = expression;     \
    return r;                            \
  }
OPSIN_LANEWISE(add, a.v[i] + b.v[i])
OPSIN_LANEWISE(sub, a.v[i] - b.v[i])
OPSIN_LANEWISE(mul, a.v[i] * b.v[i])
OPSIN_LANEWISE(div, a.v[i] / b.v[i])
OPSIN_LANEWISE(max, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
OPSIN_LANEWISE(min, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
#undef OPSIN_LANEWISE
template <int N>
OPSIN_INLINE F butterfly(F a) {
  F r;
  OPSIN_LANES r.v[i] = i & N ? a.v[i ^ N] - a.v[i] : a.v[i] + a.v[i ^ N];
  return r;
}
OPSIN_INLINE F fma(F a, F b, F c) {
  F r;
#if defined(__ARM_NEON)
  for (int i = 0; i < 16; i += 4) {
    vst1q_f32(r.v + i, vfmaq_f32(vld1q_f32(c.v + i), vld1q_f32(a.v + i), vld1q_f32(b.v + i)));
  }
#elif defined(__aarch64__)
  OPSIN_LANES r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);  // one rounding, as NEON's
#else
  OPSIN_LANES r.v[i] = a.v[i] * b.v[i] + c.v[i];
#endif
  return r;
}
OPSIN_INLINE F load_bf16(const uint16_t* p) {
  F r;
  OPSIN_LANES r.v[i] = bf16_to_f32(p[i]);
  return r;
}
OPSIN_INLINE F load_f16(const uint16_t* p) {
  F r;
  OPSIN_LANES r.v[i] = f16_to_f32(p[i]);
  return r;
}
OPSIN_INLINE void store_bf16(uint16_t* p, F a) { OPSIN_LANES p[i] = f32_to_bf16(a.v[i]); }
OPSIN_INLINE F zero_below(F a, F x, float floor) {
  F r;
  OPSIN_LANES r.v[i] = x.v[i] >= floor ? a.v[i] : 0.0f;
  return r;
}
OPSIN_INLINE F select_range(F value, F other, I p, I lo, I hi) {
  F r;
  OPSIN_LANES r.v[i] = p.v[i] >= lo.v[i] && p.v[i] < hi.v[i] ? value.v[i] : other.v[i];
  return r;
}
OPSIN_INLINE F round_even(F a) {
  F r;
  OPSIN_LANES r.v[i] = __builtin_rintf(a.v[i]);
  return r;
}
OPSIN_INLINE F scale2(F a, F n) {
  F r;
  OPSIN_LANES {
    union {
      float f;
      int32_t i;
    } c = {a.v[i]};
    // Beyond these only where a score is not a number: any result will do, undefined will not.
    const float k = n.v[i] > -127.0f ? (n.v[i] < 128.0f ? n.v[i] : 127.0f) : -126.0f;
    c.i = (int32_t)((uint32_t)c.i + (uint32_t)((int32_t)k * (1 << 23)));
    r.v[i] = c.f;
  }
  return r;
}
OPSIN_INLINE float hsum(F a) {
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; i++) a.v[i] += a.v[i + step];
  }
  return a.v[0];
}
OPSIN_INLINE float hmax(F a) {
  float m = a.v[0];
  OPSIN_LANES m = a.v[i] > m ? a.v[i] : m;
  return m;
}
OPSIN_INLINE F from_int(I a) {
  F r;
  OPSIN_LANES r.v[i] = (float)a.v[i];
  return r;
}
OPSIN_INLINE I iset1(int32_t x) {
  I r;
  OPSIN_LANES r.v[i] = x;
  return r;
}
OPSIN_INLINE I izero() { return iset1(0); }
OPSIN_INLINE I iload(const int32_t* p) {
  I r;
  __builtin_memcpy(r.v, p, 64);
  return r;
}
OPSIN_INLINE I iadd(I a, I b) {
  OPSIN_LANES a.v[i] += b.v[i];
  return a;
}
OPSIN_INLINE I imax(I a, I b) {
  OPSIN_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
OPSIN_INLINE I abs_bits(F a) {
  I r;
  __builtin_memcpy(r.v, a.v, 64);
  OPSIN_LANES r.v[i] &= 0x7fffffff;
  return r;
}
OPSIN_INLINE int32_t ihmax(I a) {
  int32_t m = a.v[0];
  OPSIN_LANES m = a.v[i] > m ? a.v[i] : m;
  return m;
}
OPSIN_INLINE int32_t ihsum(I a) {
  int32_t s = 0;
  OPSIN_LANES s += a.v[i];
  return s;
}
OPSIN_INLINE I round_int(F a) {
  I r;
  OPSIN_LANES {
    float t = __builtin_rintf(a.v[i]);
    r.v[i] = t >= -2147483648.0f && t < 2147483648.0f ? (int32_t)t : INT32_MIN;
  }
  return r;
}
OPSIN_INLINE void store_i8(int8_t* p, I a) {
  OPSIN_LANES p[i] = (int8_t)(a.v[i] > 127 ? 127 : a.v[i] < -128 ? -128 : a.v[i]);
}
OPSIN_INLINE V vload(const void* p) {
  V r;
  __builtin_memcpy(r.v, p, 64);
  return r;
}
OPSIN_INLINE void vstore(void* p, V a) { __builtin_memcpy(p, a.v, 64); }
OPSIN_INLINE V low_nibbles(V a) {
  for (int i = 0; i < 64; i++) a.v[i] &= 15;
  return a;
}
OPSIN_INLINE V high_nibbles(V a) {
  for (int i = 0; i < 64; i++) a.v[i] >>= 4;
  return a;
}
OPSIN_INLINE V low_sixes(V a) {
  for (int i = 0; i < 64; i++) a.v[i] &= 63;
  return a;
}
OPSIN_INLINE V high_sixes(V a, V b, V c) {
  for (int i = 0; i < 64; i++) {
    a.v[i] = (uint8_t)(a.v[i] >> 6 | (b.v[i] >> 4 & 12) | (c.v[i] >> 2 & 48));
  }
  return a;
}
OPSIN_INLINE V low_fives(V a) {
  for (int i = 0; i < 64; i++) a.v[i] &= 31;
  return a;
}
OPSIN_INLINE void high_fives(V a, V b, V c, V d, V e, V* out) {
  for (int i = 0; i < 64; i++) {
    out[0].v[i] = (uint8_t)(a.v[i] >> 5 | (b.v[i] >> 2 & 24));
    out[1].v[i] = (uint8_t)(b.v[i] >> 7 | (c.v[i] >> 4 & 14) | (d.v[i] >> 1 & 16));
    out[2].v[i] = (uint8_t)(d.v[i] >> 6 | (e.v[i] >> 3 & 28));
  }
}
OPSIN_INLINE F load_u8(const uint8_t* p) {
  F r;
  OPSIN_LANES r.v[i] = p[i];
  return r;
}
OPSIN_INLINE V bcast4(const void* p) {
  V r;
  OPSIN_LANES __builtin_memcpy(r.v + 4 * i, p, 4);
  return r;
}
#if defined(__ARM_FEATURE_DOTPROD)
OPSIN_INLINE I dot_u7(I acc, V w, V x) {
  for (int i = 0; i < 4; i++) {
    int8x16_t a = vreinterpretq_s8_u8(vld1q_u8(w.v + 16 * i));
    int8x16_t b = vreinterpretq_s8_u8(vld1q_u8(x.v + 16 * i));
    vst1q_s32(acc.v + 4 * i, vdotq_s32(vld1q_s32(acc.v + 4 * i), a, b));
  }
  return acc;
}
// The weight as signed (less 128), and 128 times the activation as twice 64 times it.
OPSIN_INLINE I dot_u8(I acc, V w, V x) {
  const int8x16_t half = vdupq_n_s8(64);
  for (int i = 0; i < 4; i++) {
    int8x16_t a = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w.v + 16 * i), vdupq_n_u8(128)));
    int8x16_t b = vreinterpretq_s8_u8(vld1q_u8(x.v + 16 * i));
    int32x4_t t = vdotq_s32(vdotq_s32(vld1q_s32(acc.v + 4 * i), half, b), half, b);
    vst1q_s32(acc.v + 4 * i, vdotq_s32(t, a, b));
  }
  return acc;
}
#else
OPSIN_INLINE I dot_u8(I acc, V w, V x) {
  OPSIN_LANES {
    const uint8_t* a = w.v + 4 * i;
    const int8_t* b = (const int8_t*)x.v + 4 * i;
    acc.v[i] += a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
  }
  return acc;
}
OPSIN_INLINE I dot_u7(I acc, V w, V x) { return dot_u8(acc, w, x); }
#endif
OPSIN_INLINE F even_bf16(V x) {
  F r;
  OPSIN_LANES {
    uint16_t half;
    __builtin_memcpy(&half, x.v + 4 * i, 2);
    r.v[i] = bf16_to_f32(half);
  }
  return r;
}
OPSIN_INLINE F odd_bf16(V x) {
  F r;
  OPSIN_LANES {
    uint16_t half;
    __builtin_memcpy(&half, x.v + 4 * i + 2, 2);
    r.v[i] = bf16_to_f32(half);
  }
  return r;
}
OPSIN_INLINE F reduce16(const F* a) {
  F r;
  OPSIN_LANES {
    float quads[4];
    for (int q = 0; q < 4; q++) {
      const float* v = a[i].v + 4 * q;
      quads[q] = (v[0] + v[2]) + (v[1] + v[3]);
    }
    r.v[i] = (quads[0] + quads[1]) + (quads[2] + quads[3]);
  }
  return r;
}
OPSIN_INLINE void interleave16(V x, V y, V* first, V* second) {
  OPSIN_LANES {
    __builtin_memcpy(first->v + 4 * i, x.v + 2 * i, 2);
    __builtin_memcpy(first->v + 4 * i + 2, y.v + 2 * i, 2);
    __builtin_memcpy(second->v + 4 * i, x.v + 32 + 2 * i, 2);
    __builtin_memcpy(second->v + 4 * i + 2, y.v + 32 + 2 * i, 2);
  }
}
template <class Row>
OPSIN_INLINE void transpose_quads(Row&& row, V* out) {
  OPSIN_LANES {
    for (int p = 0; p < 4; p++) __builtin_memcpy(out[p].v + 4 * i, row(i) + 2 * p, 4);
  }
}
#undef OPSIN_LANES
