// Vectors of sixteen floats and of 64 bytes, one spelling for every instruction set.
//
// A file that includes this one has chosen its instruction set by its compiler flags and has
// defined OPSIN_ISA, the namespace that keeps each build of the same source apart. Nothing here
// may come from a standard template: the linker would keep one copy of it, perhaps one that this
// machine cannot run.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define OPSIN_INLINE static inline __attribute__((always_inline))

namespace OPSIN_ISA {

OPSIN_INLINE float bf16_to_f32(uint16_t h) {
  union {
    uint32_t u;
    float f;
  } c = {(uint32_t)h << 16};
  return c.f;
}

OPSIN_INLINE uint16_t f32_to_bf16(float x) {
  union {
    float f;
    uint32_t u;
  } c = {x};
  if ((c.u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((c.u >> 16) | 0x40);
  return (uint16_t)((c.u + 0x7fffu + ((c.u >> 16) & 1)) >> 16);
}

OPSIN_INLINE float f16_to_f32(uint16_t h) {
  union {
    uint32_t u;
    float f;
  } c;
  uint32_t sign = (uint32_t)(h & 0x8000) << 16;
  uint32_t exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 0) {
    c.f = (float)mantissa * 5.9604644775390625e-8f;
    c.u |= sign;
    return c.f;
  }
  c.u = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  return c.f;
}

OPSIN_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

#if defined(__AVX512F__)

struct F { __m512 v; };   // 16 floats
struct V { __m512i v; };  // 64 bytes
struct I { __m512i v; };  // 16 int32

OPSIN_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
OPSIN_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
template <int N>  // the first N floats
OPSIN_INLINE void store_first(float* p, F a) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1 << N) - 1), a.v);
}
OPSIN_INLINE F set1(float x) { return {_mm512_set1_ps(x)}; }
// Compilers would load again what they can, which takes more than adding does.
template <typename T>
OPSIN_INLINE T in_register(T a) {
  __asm__("" : "+v"(a.v));
  return a;
}
OPSIN_INLINE F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
OPSIN_INLINE F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
OPSIN_INLINE F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
OPSIN_INLINE F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
OPSIN_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
OPSIN_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
OPSIN_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
OPSIN_INLINE F load_bf16(const uint16_t* p) {
  __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))};
}
OPSIN_INLINE F load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
// Round to nearest even, NaN kept: the same bits with and without AVX512-BF16.
OPSIN_INLINE void store_bf16(uint16_t* p, F a) {
  __m512i u = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}
OPSIN_INLINE F zero_below(F a, F x, float floor) {  // a where x >= floor, else 0
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(floor), _CMP_GE_OQ), a.v)};
}
// value where lo <= position < hi, else other
OPSIN_INLINE F select_range(F value, F other, I position, I lo, I hi) {
  __mmask16 m = _mm512_cmpge_epi32_mask(position.v, lo.v) &
                _mm512_cmplt_epi32_mask(position.v, hi.v);
  return {_mm512_mask_mov_ps(other.v, m, value.v)};
}
// Each lane plus the one whose number differs in bit N; where that is set, the other less the lane.
template <int N>
OPSIN_INLINE F butterfly(F a) {
  const __m512 other = N == 1   ? _mm512_permute_ps(a.v, 0xb1)
                       : N == 2 ? _mm512_permute_ps(a.v, 0x4e)
                       : N == 4 ? _mm512_shuffle_f32x4(a.v, a.v, 0xb1)
                                : _mm512_shuffle_f32x4(a.v, a.v, 0x4e);
  const __mmask16 set = N == 1 ? 0xaaaa : N == 2 ? 0xcccc : N == 4 ? 0xf0f0 : 0xff00;
  return {_mm512_mask_sub_ps(_mm512_add_ps(a.v, other), set, other, a.v)};
}
OPSIN_INLINE F round_even(F a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
OPSIN_INLINE F scale2(F a, F n) {  // a * 2^n, n whole and in [-126, 127]
  __m512i e = _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), e))};
}
OPSIN_INLINE float hsum(F a) { return _mm512_reduce_add_ps(a.v); }
OPSIN_INLINE float hmax(F a) { return _mm512_reduce_max_ps(a.v); }
OPSIN_INLINE F from_int(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
OPSIN_INLINE I izero() { return {_mm512_setzero_si512()}; }
OPSIN_INLINE I iset1(int32_t x) { return {_mm512_set1_epi32(x)}; }
OPSIN_INLINE I iload(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
OPSIN_INLINE I iadd(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
OPSIN_INLINE I imax(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
OPSIN_INLINE I abs_bits(F a) {
  return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))};
}
OPSIN_INLINE int32_t ihmax(I a) { return _mm512_reduce_max_epi32(a.v); }
OPSIN_INLINE int32_t ihsum(I a) { return _mm512_reduce_add_epi32(a.v); }
OPSIN_INLINE I round_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }
OPSIN_INLINE void store_i8(int8_t* p, I a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a.v));
}
OPSIN_INLINE V vload(const void* p) { return {_mm512_loadu_si512(p)}; }
OPSIN_INLINE void vstore(void* p, V a) { _mm512_storeu_si512(p, a.v); }
OPSIN_INLINE V low_nibbles(V a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
OPSIN_INLINE V high_nibbles(V a) {
  return {_mm512_and_si512(_mm512_srli_epi32(a.v, 4), _mm512_set1_epi8(15))};
}
// Codes of six and five bits: those in the lower bits, and those whose bits lie above others.
OPSIN_INLINE V low_sixes(V a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(63))}; }
OPSIN_INLINE V low_fives(V a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(31))}; }
OPSIN_INLINE __m512i shifted(V a, int bits) { return _mm512_srli_epi32(a.v, bits); }
// The first's bits where `mask` has some in a byte, else the second's.
OPSIN_INLINE __m512i chosen(int mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8((char)mask), a, b, 0xca);
}
OPSIN_INLINE V high_sixes(V a, V b, V c) {
  return low_sixes({chosen(15, chosen(3, shifted(a, 6), shifted(b, 4)), shifted(c, 2))});
}
OPSIN_INLINE void high_fives(V a, V b, V c, V d, V e, V* out) {
  out[0] = low_fives({chosen(7, shifted(a, 5), shifted(b, 2))});
  out[1] = low_fives({chosen(15, chosen(1, shifted(b, 7), shifted(c, 4)), shifted(d, 1))});
  out[2] = low_fives({chosen(3, shifted(d, 6), shifted(e, 3))});
}
OPSIN_INLINE F load_u8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
OPSIN_INLINE V bcast4(const void* p) { return {_mm512_set1_epi32(*(const int32_t*)p)}; }

// Sums of four products in each lane: bytes of any size, and bytes below 128, which may take less.
#if defined(__AVX512VNNI__)
OPSIN_INLINE I dot_u8(I acc, V w, V x) { return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)}; }
OPSIN_INLINE I dot_u7(I acc, V w, V x) { return dot_u8(acc, w, x); }
// The four bytes at x for all lanes, broadcast by the instruction itself: compilers use two.
OPSIN_INLINE I dot_u8_at(I acc, V w, const void* x) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*(const int32_t*)x));
  return acc;
}
OPSIN_INLINE I dot_u7_at(I acc, V w, const void* x) { return dot_u8_at(acc, w, x); }
#define OPSIN_DOT_AT
#else
OPSIN_INLINE I dot_u7(I acc, V w, V x) {
  __m512i t = _mm512_madd_epi16(_mm512_maddubs_epi16(w.v, x.v), _mm512_set1_epi16(1));
  return {_mm512_add_epi32(acc.v, t)};
}
// maddubs saturates for weights above 128: widen to 16 bits instead, which is exact.
OPSIN_INLINE I dot_u8(I acc, V w, V x) {
  __m512i we = _mm512_and_si512(w.v, _mm512_set1_epi16(255)), wo = _mm512_srli_epi16(w.v, 8);
  __m512i xe = _mm512_srai_epi16(_mm512_slli_epi16(x.v, 8), 8), xo = _mm512_srai_epi16(x.v, 8);
  __m512i t = _mm512_add_epi32(_mm512_madd_epi16(we, xe), _mm512_madd_epi16(wo, xo));
  return {_mm512_add_epi32(acc.v, t)};
}
#endif

#if defined(__AVX512BF16__)
OPSIN_INLINE F dot_bf16(F acc, V a, V b) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#endif
// The even and the odd of 32 halves.
OPSIN_INLINE F even_bf16(V a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
OPSIN_INLINE F odd_bf16(V a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32((int)0xffff0000)))};
}

// Sums of sixteen vectors, one a lane.
OPSIN_INLINE F reduce16(const F* a) {
  __m512 t[8], u[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v),
                         _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m512d p = _mm512_castps_pd(t[2 * i]), q = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  }
  __m512 v0 = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88),
                            _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
  __m512 v1 = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88),
                            _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(v0, v1, 0x88), _mm512_shuffle_f32x4(v0, v1, 0xdd))};
}

// Two rows of 32 halves to pairs (a[i], b[i]): first sixteen pairs, then the other sixteen.
OPSIN_INLINE void interleave16(V a, V b, V* first, V* second) {
  __m512i lo = _mm512_unpacklo_epi16(a.v, b.v), hi = _mm512_unpackhi_epi16(a.v, b.v);
  const __m512i i0 = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i i1 = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  first->v = _mm512_permutex2var_epi64(lo, i0, hi);
  second->v = _mm512_permutex2var_epi64(lo, i1, hi);
}

// Eight halves of sixteen rows, from row(i) on, as four vectors of pairs: vector i holds pair i of
// each row.
template <class Row>
OPSIN_INLINE void transpose_quads(Row&& row, V* out) {
  __m512i x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // a quarter holds four pairs of one row
    x[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)row(i)));
    x[i] = _mm512_inserti32x4(x[i], _mm_loadu_si128((const __m128i*)row(4 + i)), 1);
    x[i] = _mm512_inserti32x4(x[i], _mm_loadu_si128((const __m128i*)row(8 + i)), 2);
    x[i] = _mm512_inserti32x4(x[i], _mm_loadu_si128((const __m128i*)row(12 + i)), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
  const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  out[0].v = _mm512_unpacklo_epi64(a, c);
  out[1].v = _mm512_unpackhi_epi64(a, c);
  out[2].v = _mm512_unpacklo_epi64(b, d);
  out[3].v = _mm512_unpackhi_epi64(b, d);
}

#elif defined(__AVX2__)

struct F { __m256 a, b; };
struct V { __m256i a, b; };
struct I { __m256i a, b; };

OPSIN_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OPSIN_INLINE void store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
template <int N>  // the first N floats, twelve or all of them
OPSIN_INLINE void store_first(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  if (N == 12) {
    _mm_storeu_ps(p + 8, _mm256_castps256_ps128(x.b));
  } else {
    _mm256_storeu_ps(p + 8, x.b);
  }
}
OPSIN_INLINE F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
// Compilers would load again what they can, which takes more than adding does.
OPSIN_INLINE F in_register(F x) {
  __asm__("" : "+x"(x.a), "+x"(x.b));
  return x;
}
#define OPSIN_BOTH(name, op) \
  OPSIN_INLINE F name(F x, F y) { return {op(x.a, y.a), op(x.b, y.b)}; }
OPSIN_BOTH(add, _mm256_add_ps)
OPSIN_BOTH(sub, _mm256_sub_ps)
OPSIN_BOTH(mul, _mm256_mul_ps)
OPSIN_BOTH(div, _mm256_div_ps)
OPSIN_BOTH(max, _mm256_max_ps)
OPSIN_BOTH(min, _mm256_min_ps)
#undef OPSIN_BOTH
OPSIN_INLINE F fma(F x, F y, F z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
OPSIN_INLINE __m256 widen_bf16(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
OPSIN_INLINE F load_bf16(const uint16_t* p) {
  return {widen_bf16(_mm_loadu_si128((const __m128i*)p)),
          widen_bf16(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
OPSIN_INLINE F load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
OPSIN_INLINE __m256i round_bf16(__m256 x) {
  __m256i u = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
  return _mm256_srli_epi32(r, 16);
}
OPSIN_INLINE void store_bf16(uint16_t* p, F x) {
  __m256i t = _mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(t, 0xd8));
}
OPSIN_INLINE F zero_below(F y, F x, float floor) {
  __m256 f = _mm256_set1_ps(floor);
  return {_mm256_and_ps(y.a, _mm256_cmp_ps(x.a, f, _CMP_GE_OQ)),
          _mm256_and_ps(y.b, _mm256_cmp_ps(x.b, f, _CMP_GE_OQ))};
}
OPSIN_INLINE __m256 select_half(__m256 v, __m256 o, __m256i p, __m256i lo, __m256i hi) {
  __m256i m = _mm256_andnot_si256(_mm256_cmpgt_epi32(lo, p), _mm256_cmpgt_epi32(hi, p));
  return _mm256_blendv_ps(o, v, _mm256_castsi256_ps(m));
}
OPSIN_INLINE F select_range(F value, F other, I p, I lo, I hi) {
  return {select_half(value.a, other.a, p.a, lo.a, hi.a),
          select_half(value.b, other.b, p.b, lo.b, hi.b)};
}
template <int N>
OPSIN_INLINE __m256 butterfly_half(__m256 x) {
  const __m256 other = N == 1   ? _mm256_permute_ps(x, 0xb1)
                       : N == 2 ? _mm256_permute_ps(x, 0x4e)
                                : _mm256_permute2f128_ps(x, x, 1);
  const int set = N == 1 ? 0xaa : N == 2 ? 0xcc : 0xf0;
  return _mm256_blend_ps(_mm256_add_ps(x, other), _mm256_sub_ps(other, x), set);
}
template <int N>
OPSIN_INLINE F butterfly(F x) {
  if (N == 8) return {_mm256_add_ps(x.a, x.b), _mm256_sub_ps(x.a, x.b)};
  return {butterfly_half<N>(x.a), butterfly_half<N>(x.b)};
}
OPSIN_INLINE F round_even(F x) {
  const int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
OPSIN_INLINE __m256 scale2_half(__m256 a, __m256 n) {
  __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), e));
}
OPSIN_INLINE F scale2(F x, F n) { return {scale2_half(x.a, n.a), scale2_half(x.b, n.b)}; }
OPSIN_INLINE float hsum(F x) {
  __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
OPSIN_INLINE float hmax(F x) {
  __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
OPSIN_INLINE F from_int(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
OPSIN_INLINE I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
OPSIN_INLINE I iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
OPSIN_INLINE I iload(const int32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
OPSIN_INLINE I iadd(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
OPSIN_INLINE I imax(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
OPSIN_INLINE I abs_bits(F x) {
  __m256i m = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(x.a), m),
          _mm256_and_si256(_mm256_castps_si256(x.b), m)};
}
OPSIN_INLINE int32_t ihmax(I x) {
  __m256i m = _mm256_max_epi32(x.a, x.b);
  __m128i t = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
OPSIN_INLINE int32_t ihsum(I x) {
  __m256i m = _mm256_add_epi32(x.a, x.b);
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
OPSIN_INLINE I round_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
OPSIN_INLINE void store_i8(int8_t* p, I x) {
  __m256i t = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  __m128i r = _mm_packs_epi16(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1));
  _mm_storeu_si128((__m128i*)p, r);
}
OPSIN_INLINE V vload(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
OPSIN_INLINE void vstore(void* p, V x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
OPSIN_INLINE V low_nibbles(V x) {
  __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
OPSIN_INLINE V high_nibbles(V x) {
  return low_nibbles({_mm256_srli_epi32(x.a, 4), _mm256_srli_epi32(x.b, 4)});
}
OPSIN_INLINE V low_sixes(V x) {
  __m256i m = _mm256_set1_epi8(63);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
OPSIN_INLINE V low_fives(V x) {
  __m256i m = _mm256_set1_epi8(31);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
// Bits of each byte, so many places lower.
OPSIN_INLINE V shifted(V x, int bits, int mask) {
  __m256i m = _mm256_set1_epi8((char)mask);
  return {_mm256_and_si256(_mm256_srli_epi32(x.a, bits), m),
          _mm256_and_si256(_mm256_srli_epi32(x.b, bits), m)};
}
OPSIN_INLINE V either(V x, V y) {
  return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)};
}
OPSIN_INLINE V high_sixes(V x, V y, V z) {
  return either(either(shifted(x, 6, 3), shifted(y, 4, 12)), shifted(z, 2, 48));
}
OPSIN_INLINE void high_fives(V x, V y, V z, V u, V v, V* out) {
  out[0] = either(shifted(x, 5, 7), shifted(y, 2, 24));
  out[1] = either(either(shifted(y, 7, 1), shifted(z, 4, 14)), shifted(u, 1, 16));
  out[2] = either(shifted(u, 6, 3), shifted(v, 3, 28));
}
OPSIN_INLINE F load_u8(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
OPSIN_INLINE V bcast4(const void* p) {
  __m256i x = _mm256_set1_epi32(*(const int32_t*)p);
  return {x, x};
}
#if defined(__AVXVNNI__)
OPSIN_INLINE I dot_u8(I acc, V w, V x) {
  return {_mm256_dpbusd_avx_epi32(acc.a, w.a, x.a), _mm256_dpbusd_avx_epi32(acc.b, w.b, x.b)};
}
OPSIN_INLINE I dot_u7(I acc, V w, V x) { return dot_u8(acc, w, x); }
#else
OPSIN_INLINE __m256i dot_u7_half(__m256i acc, __m256i w, __m256i x) {
  __m256i t = _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
  return _mm256_add_epi32(acc, t);
}
OPSIN_INLINE I dot_u7(I acc, V w, V x) {
  return {dot_u7_half(acc.a, w.a, x.a), dot_u7_half(acc.b, w.b, x.b)};
}
OPSIN_INLINE __m256i dot_u8_half(__m256i acc, __m256i w, __m256i x) {
  __m256i we = _mm256_and_si256(w, _mm256_set1_epi16(255)), wo = _mm256_srli_epi16(w, 8);
  __m256i xe = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), xo = _mm256_srai_epi16(x, 8);
  __m256i t = _mm256_add_epi32(_mm256_madd_epi16(we, xe), _mm256_madd_epi16(wo, xo));
  return _mm256_add_epi32(acc, t);
}
OPSIN_INLINE I dot_u8(I acc, V w, V x) {
  return {dot_u8_half(acc.a, w.a, x.a), dot_u8_half(acc.b, w.b, x.b)};
}
#endif
OPSIN_INLINE F even_bf16(V x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
OPSIN_INLINE F odd_bf16(V x) {
  const __m256i high = _mm256_set1_epi32((int)0xffff0000);
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, high)),
          _mm256_castsi256_ps(_mm256_and_si256(x.b, high))};
}
// Each quarter's sum (a + c) + (b + d), of four rows.
OPSIN_INLINE __m256 quads4(__m256 w, __m256 x, __m256 y, __m256 z) {
  const __m256 wx = _mm256_add_ps(_mm256_unpacklo_ps(w, x), _mm256_unpackhi_ps(w, x));
  const __m256 yz = _mm256_add_ps(_mm256_unpacklo_ps(y, z), _mm256_unpackhi_ps(y, z));
  const __m256d p = _mm256_castps_pd(wx), q = _mm256_castps_pd(yz);
  return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(p, q)),
                       _mm256_castpd_ps(_mm256_unpackhi_pd(p, q)));
}
OPSIN_INLINE __m128 both_halves(__m256 x) {
  return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}
OPSIN_INLINE F reduce16(const F* a) {
  __m128 out[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m256 low = quads4(a[4 * i].a, a[4 * i + 1].a, a[4 * i + 2].a, a[4 * i + 3].a);
    const __m256 high = quads4(a[4 * i].b, a[4 * i + 1].b, a[4 * i + 2].b, a[4 * i + 3].b);
    out[i] = _mm_add_ps(both_halves(low), both_halves(high));
  }
  return {_mm256_set_m128(out[1], out[0]), _mm256_set_m128(out[3], out[2])};
}
OPSIN_INLINE void interleave16(V x, V y, V* first, V* second) {
  __m256i l0 = _mm256_unpacklo_epi16(x.a, y.a), h0 = _mm256_unpackhi_epi16(x.a, y.a);
  __m256i l1 = _mm256_unpacklo_epi16(x.b, y.b), h1 = _mm256_unpackhi_epi16(x.b, y.b);
  *first = {_mm256_permute2x128_si256(l0, h0, 0x20), _mm256_permute2x128_si256(l0, h0, 0x31)};
  *second = {_mm256_permute2x128_si256(l1, h1, 0x20), _mm256_permute2x128_si256(l1, h1, 0x31)};
}
template <class Row>
OPSIN_INLINE void transpose_half(Row&& row, int first, __m256i* out) {
  __m256i x[4];
#pragma GCC unroll 4
  for (int i = first; i < first + 4; i++) {
    const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)row(i)));
    x[i - first] = _mm256_inserti128_si256(low, _mm_loadu_si128((const __m128i*)row(4 + i)), 1);
  }
  const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
  const __m256i c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
  out[0] = _mm256_unpacklo_epi64(a, c);
  out[1] = _mm256_unpackhi_epi64(a, c);
  out[2] = _mm256_unpacklo_epi64(b, d);
  out[3] = _mm256_unpackhi_epi64(b, d);
}
template <class Row>
OPSIN_INLINE void transpose_quads(Row&& row, V* out) {
  __m256i low[4], high[4];
  transpose_half(row, 0, low);
  transpose_half(row, 8, high);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) out[i] = {low[i], high[i]};
}

#else
#include "simd_scalar.h"
#endif

// 64 columns of a row of bf13 as bfloat16; `least` is the row's least exponent.
OPSIN_INLINE void unpack64(const uint8_t* p, int16_t least, V* out) {
  uint64_t fifth;
  __builtin_memcpy(&fifth, p + 96, 8);
#if defined(__AVX512F__)
  const __m512i kept = _mm512_set1_epi16((short)0x807f), code = _mm512_set1_epi16(0x780);
  const __m512i base = _mm512_set1_epi16(least), sixteen = _mm512_set1_epi16(0x800);
  const __m512i own = _mm512_loadu_si512(p);
  const __m512i four = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(p + 64)));
  __m512i e[2] = {_mm512_and_si512(_mm512_slli_epi16(four, 7), code),
                  _mm512_and_si512(_mm512_slli_epi16(four, 3), code)};
  const __m512i twice[2] = {_mm512_unpacklo_epi8(own, own), _mm512_unpackhi_epi8(own, own)};
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    e[i] = _mm512_mask_add_epi16(e[i], (__mmask32)(fifth >> 32 * i), e[i], sixteen);
    e[i] = _mm512_maskz_add_epi16(_mm512_test_epi16_mask(e[i], e[i]), e[i], base);
    out[i].v = _mm512_ternarylogic_epi32(kept, twice[i], e[i], 0xca);
  }
#elif defined(__AVX2__)
  const __m256i kept = _mm256_set1_epi16((short)0x807f), code = _mm256_set1_epi16(0x780);
  const __m256i base = _mm256_set1_epi16(least), sixteen = _mm256_set1_epi16(0x800);
  const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096,
                                        8192, 16384, (short)0x8000);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // sixteen columns each
    const __m256i own = _mm256_loadu_si256((const __m256i*)(p + 32 * (i % 2)));
    const __m128i part = _mm_loadu_si128((const __m128i*)(p + 64 + 16 * (i % 2)));
    const __m256i four = _mm256_cvtepu8_epi16(part);
    __m256i e = _mm256_slli_epi16(four, i < 2 ? 7 : 3);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi16((short)(fifth >> 16 * i)), bit);
    e = _mm256_or_si256(_mm256_and_si256(e, code),
                        _mm256_and_si256(_mm256_cmpeq_epi16(set, bit), sixteen));
    const __m256i none = _mm256_cmpeq_epi16(e, _mm256_setzero_si256());
    e = _mm256_andnot_si256(none, _mm256_add_epi16(e, base));
    const __m256i twice = i < 2 ? _mm256_unpacklo_epi8(own, own) : _mm256_unpackhi_epi8(own, own);
    const __m256i all = _mm256_or_si256(_mm256_and_si256(kept, twice), _mm256_andnot_si256(kept, e));
    (i % 2 ? out[i / 2].b : out[i / 2].a) = all;
  }
#else
  for (int c = 0; c < 64; c++) {
    const int in = c % 32, own = p[in / 8 * 16 + c / 32 * 8 + in % 8];
    int e = (c < 32 ? p[64 + in] & 15 : p[64 + in] >> 4) | (int)(fifth >> c & 1) << 4;
    if (e) e = e * 128 + least;
    const uint16_t whole = (uint16_t)((own & 0x80) << 8 | (e & 0x7f80) | (own & 0x7f));
    __builtin_memcpy(out[c / 32].v + 2 * in, &whole, 2);
  }
#endif
}

// Of one step of sums: sixteen lanes, ready to be multiplied with one factor each of many rows.
// Pairs of bfloat16 are one step where an instruction adds both, else they are two, of floats.
#if defined(__AVX512BF16__)

struct Step { V pairs; };
constexpr int kPairSteps = 1;

OPSIN_INLINE void split(V pairs, Step* out) { out[0] = {pairs}; }
OPSIN_INLINE Step lanes_at(const uint8_t* p) { return {in_register(vload(p))}; }
OPSIN_INLINE void keep(uint8_t* p, Step x) { vstore(p, x.pairs); }
template <int N>  // the first N lanes
OPSIN_INLINE void keep_first(uint8_t* p, Step x) {
  store_first<N>((float*)p, {_mm512_castsi512_ps(x.pairs.v)});
}
OPSIN_INLINE F plus(F sum, Step x, const uint8_t* factor) {
  return dot_bf16(sum, x.pairs, bcast4(factor));
}

#else

struct Step { F one; };
constexpr int kPairSteps = 2;

OPSIN_INLINE F dot_bf16(F acc, V x, V y) {
  return fma(even_bf16(x), even_bf16(y), fma(odd_bf16(x), odd_bf16(y), acc));
}
OPSIN_INLINE void split(V pairs, Step* out) {
  out[0] = {even_bf16(pairs)};
  out[1] = {odd_bf16(pairs)};
}
OPSIN_INLINE Step lanes_at(const uint8_t* p) { return {in_register(load((const float*)p))}; }
OPSIN_INLINE void keep(uint8_t* p, Step x) { store((float*)p, x.one); }
template <int N>
OPSIN_INLINE void keep_first(uint8_t* p, Step x) { store_first<N>((float*)p, x.one); }
OPSIN_INLINE F plus(F sum, Step x, const uint8_t* factor) {
  return fma(x.one, set1(*(const float*)factor), sum);
}

#endif

#if !defined(OPSIN_DOT_AT)
OPSIN_INLINE I dot_u8_at(I acc, V w, const void* x) { return dot_u8(acc, w, bcast4(x)); }
OPSIN_INLINE I dot_u7_at(I acc, V w, const void* x) { return dot_u7(acc, w, bcast4(x)); }
#endif

// e^x within 2 units in the last place; e^0 is exactly 1, and anything below -87 is exactly 0.
OPSIN_INLINE F exp(F x) {
  F y = min(max(x, set1(-87.0f)), set1(88.0f));
  F n = round_even(mul(y, set1(1.44269504088896341f)));
  F r = fma(n, set1(-0.693359375f), y);
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return zero_below(scale2(p, n), x, -87.0f);
}

// 2^x within 2 units in the last place; 2^0 is exactly 1, far below zero it is exactly 0.
OPSIN_INLINE F exp2(F x) {
#if defined(__AVX512F__)
  const F y = max(x, set1(-200.0f));
#else
  const F y = max(x, set1(-126.0f));
#endif
  const F n = round_even(y), r = sub(y, n);
  F p = set1(1.535336188319500e-4f);
  p = fma(p, r, set1(1.339887440266574e-3f));
  p = fma(p, r, set1(9.618437357674640e-3f));
  p = fma(p, r, set1(5.550332471162809e-2f));
  p = fma(p, r, set1(2.402264791363012e-1f));
  p = fma(p, r, set1(6.931472028550421e-1f));
  p = fma(p, r, set1(1.0f));
#if defined(__AVX512F__)
  return {_mm512_scalef_ps(p.v, n.v)};
#else
  return zero_below(scale2(p, n), x, -126.0f);
#endif
}

OPSIN_INLINE F sigmoid(F x) {
  return div(set1(1.0f), add(set1(1.0f), exp(sub(set1(0.0f), x))));
}

OPSIN_INLINE F tanh(F x) {  // 2 sigmoid(2x) - 1
  return sub(mul(set1(2.0f), sigmoid(mul(set1(2.0f), x))), set1(1.0f));
}

OPSIN_INLINE float exp2_of(float x) {
  float t[16];
  store(t, exp2(set1(x)));
  return t[0];
}

}  // namespace OPSIN_ISA
