// Products of up to 64 rows with 64 keys or values, where there are no tiles.
//
// Lanes are keys, or elements of values: nothing is summed across a vector. Each sum takes one
// step after the other, so that it is the same bits whatever rows are beside it.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace OPSIN_ISA {

using opsin::kKeyBlock;

// sums = kept * sums + factors (steps) * lanes (steps, 16 at a time); kept 0: sums are not read
struct RowProduct {
  const uint8_t* factors;
  float* sums;
  float kept;
};

// Sixteen rows of keys or values, so many elements from one to the next.
struct Sixteen {
  const uint16_t* at;
  int64_t stride;
};

OPSIN_INLINE void turn_quads(const Sixteen& keys, int d, V* pairs) {
  transpose_quads([&](int i) { return keys.at + i * keys.stride + d; }, pairs);
}

// What was made of 64 keys or values, of which many rows are multiplied.
struct Lanes {
  uint8_t* at;
  bool* made;
};

// Rows multiplied together, and with how many vectors: as many as there are registers for. Up to
// kDirectRows take keys and values from where they lie, kDirectTogether rows at a time; for more
// it is worth writing them down as lanes, less so where that takes twice the memory.
constexpr int kRowsTogether = 6;
#if defined(__AVX512F__)
#if defined(__AVX512BF16__)
constexpr int kDirectRows = 6, kDirectTogether = 6;
#else
constexpr int kDirectRows = 12, kDirectTogether = 6;
#endif
constexpr int vectors_together(int) { return 4; }
constexpr int values_together(int rows) { return rows <= 2 ? 8 : 4; }
constexpr int key_tiles_together(int rows) { return rows <= 3 ? 4 : 2; }
#else
constexpr int kDirectRows = 4, kDirectTogether = 2;
constexpr int vectors_together(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
constexpr int values_together(int rows) { return rows == 1 ? 4 : 2; }
constexpr int key_tiles_together(int rows) { return rows == 1 ? 2 : 1; }
#endif

template <int R, int N>
OPSIN_INLINE void begin_sums(const RowProduct* rows, int at, F (&sums)[R][N]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const F kept = set1(rows[r].kept);
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) {
      sums[r][i] = rows[r].kept == 0.0f ? set1(0.0f) : mul(load(rows[r].sums + at + 16 * i), kept);
    }
  }
}

template <int R, int N>
OPSIN_INLINE void end_sums(const RowProduct* rows, int at, const F (&sums)[R][N]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) store(rows[r].sums + at + 16 * i, sums[r][i]);
  }
}

// Pairs of two keys' values, of 32 elements; or one key's, the even ones, then the odd ones.
OPSIN_INLINE void value_lanes(const uint16_t* values, int64_t stride, Step* out) {
#if defined(__AVX512BF16__)
  interleave16(vload(values), vload(values + stride), &out[0].pairs, &out[1].pairs);
#else
  split(vload(values), out);
#endif
}
constexpr int kValuesTogether = 2 / kPairSteps;
constexpr int kSixteenSteps = 16 / kValuesTogether;

// Where the values of step s begin, of 64.
OPSIN_INLINE const uint16_t* values_at(const Sixteen* values, int s) {
  const Sixteen& of = values[s / kSixteenSteps];
  return of.at + s % kSixteenSteps * kValuesTogether * of.stride;
}

// R rows times N vectors that lie `stride` bytes apart, (N, steps, 64 bytes).
template <int R, int N>
static void multiply_tile(const uint8_t* lanes, int64_t stride, int steps, const RowProduct* rows,
                          int at) {
  F sums[R][N];
  begin_sums<R, N>(rows, at, sums);
  const uint8_t* factors[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) factors[r] = rows[r].factors;
  for (int64_t s = 0; s < steps; s++) {
    Step x[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) x[i] = lanes_at(lanes + i * stride + 64 * s);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) sums[r][i] = plus(sums[r][i], x[i], factors[r] + 4 * s);
    }
  }
  end_sums<R, N>(rows, at, sums);
}

// Products of lanes in memory, (vectors, steps, 64 bytes).
struct Multiply {
  static constexpr int kRows = kRowsTogether;
  template <int R>
  static void run(const RowProduct* rows, const uint8_t* lanes, int64_t stride, int steps,
                  int vectors) {
    constexpr int N = vectors_together(R);
    int i = 0;
    for (; i + N <= vectors; i += N) {
      multiply_tile<R, N>(lanes + i * stride, stride, steps, rows, 16 * i);
    }
    if (N == 4 && i < vectors) {  // their number is even
      multiply_tile<R, 2>(lanes + i * stride, stride, steps, rows, 16 * i);
    }
  }
};

// 64 keys as lanes of multiply, (4 tiles, steps, 16 keys).
static void turn_keys(const Sixteen* keys, int dim, uint8_t* out) {
  for (int tile = 0; tile < kKeyBlock / 16; tile++) {
    for (int d = 0; d < dim; d += 8) {
      V pairs[4];
      turn_quads(keys[tile], d, pairs);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++, out += 64 * kPairSteps) {
        Step x[kPairSteps];
        split(pairs[i], x);
        for (int j = 0; j < kPairSteps; j++) keep(out + 64 * j, x[j]);
      }
    }
  }
}

// Values as lanes of multiply, (dim / 16, steps, 16).
static void pack_lanes(const Sixteen* values, int steps, int dim, int64_t stride, uint8_t* out) {
  for (int s = 0; s < steps; s++) {
    const uint16_t* from = values_at(values, s);
    for (int d = 0; d < dim; d += 32) {
      Step x[2];
      value_lanes(from + d, values[s / kSixteenSteps].stride, x);
      keep(out + d / 16 * stride + 64 * s, x[0]);
      keep(out + (d / 16 + 1) * stride + 64 * s, x[1]);
    }
  }
}

// R rows times T tiles of sixteen keys, turned on the way.
template <int R, int T>
static void key_tile(const Sixteen* keys, int dim, const RowProduct* rows, int at,
                     const Ahead& ahead) {
  F sums[R][T];
  begin_sums<R, T>(rows, at, sums);
  int fetched = 0;
  for (int d = 0; d < dim; d += 8) {
    for (; ahead.from && fetched * dim < 16 * T * (d + 8); fetched++) ahead.fetch(at + fetched);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      V pairs[4];
      turn_quads(keys[at / 16 + t], d, pairs);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        Step x[kPairSteps];
        split(pairs[i], x);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const uint8_t* factor = rows[r].factors + 4 * kPairSteps * (d / 2 + i);
#pragma GCC unroll 2
          for (int j = 0; j < kPairSteps; j++) sums[r][t] = plus(sums[r][t], x[j], factor + 4 * j);
        }
      }
    }
  }
  end_sums<R, T>(rows, at, sums);
}

// R rows times N vectors of values from where they lie, of `dim`; of what is ahead each of these
// tiles fetches its share, evenly.
template <int R, int N>
static void value_tile(const Sixteen* values, int steps, const RowProduct* rows, int at, int dim,
                       const Ahead& ahead) {
  F sums[R][N];
  begin_sums<R, N>(rows, at, sums);
  const int first = kKeyBlock * at / dim, share = kKeyBlock * (at + 16 * N) / dim - first;
  int fetched = 0;
  for (int64_t s = 0; s < steps; s++) {
    const uint16_t* from = values_at(values, s) + at;
    const int64_t stride = values[s / kSixteenSteps].stride;
    for (; ahead.from && fetched * steps < share * (s + 1); fetched++) ahead.fetch(first + fetched);
    Step x[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; i += 2) value_lanes(from + 16 * i, stride, x + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) sums[r][i] = plus(sums[r][i], x[i], rows[r].factors + 4 * s);
    }
  }
  end_sums<R, N>(rows, at, sums);
}

struct MultiplyKeys {
  static constexpr int kRows = kDirectTogether;
  template <int R>
  static void run(const RowProduct* rows, const Sixteen* keys, int dim, const Ahead& ahead) {
    // Rows a kilobyte or more apart fall on few sets of the cache, which do not hold many of them.
    const bool crowded = keys->stride % 512 == 0;
    constexpr int T = key_tiles_together(R);
    for (int at = 0; at < kKeyBlock; at += crowded ? 16 : 16 * T) {
      crowded ? key_tile<R, 1>(keys, dim, rows, at, ahead)
              : key_tile<R, T>(keys, dim, rows, at, ahead);
    }
  }
};

struct MultiplyValues {
  static constexpr int kRows = kDirectTogether;
  template <int R>
  static void run(const RowProduct* rows, const Sixteen* values, int steps, int dim,
                  const Ahead& ahead) {
    constexpr int N = values_together(R);
    int d = 0;
    for (; d + 16 * N <= dim; d += 16 * N) value_tile<R, N>(values, steps, rows, d, dim, ahead);
    for (; d < dim; d += 32) value_tile<R, 2>(values, steps, rows, d, dim, ahead);
  }
};

// One of these products for any number of rows, in tiles of about the same size.
template <class Product, class... More>
static void for_rows(const RowProduct* rows, int count, const More&... more) {
  constexpr int most = Product::kRows;
  for (int tiles = (count + most - 1) / most; tiles > 0; tiles--) {
    const int own = (count + tiles - 1) / tiles;
    switch (own) {
      case 1: Product::template run<1>(rows, more...); break;
      case 2: Product::template run<2>(rows, more...); break;
      case 3: Product::template run<most < 3 ? most : 3>(rows, more...); break;
      case 4: Product::template run<most < 4 ? most : 4>(rows, more...); break;
      case 5: Product::template run<most < 5 ? most : 5>(rows, more...); break;
      default: Product::template run<most>(rows, more...);
    }
    rows += own;
    count -= own;
  }
}

// A few rows take their time: what is ahead is fetched meanwhile, bit by bit.
static void multiply_keys(const Sixteen* keys, int dim, Lanes turned, const RowProduct* rows,
                          int count, const Ahead& ahead) {
  if (count <= kDirectRows) {
    for_rows<MultiplyKeys>(rows, count, keys, dim, ahead);
    return;
  }
  ahead.fetch_all();
  const int steps = dim / 2 * kPairSteps;
  if (!*turned.made) turn_keys(keys, dim, turned.at);
  *turned.made = true;
  const int64_t stride = 64 * steps;
  for_rows<Multiply>(rows, count, (const uint8_t*)turned.at, stride, steps, kKeyBlock / 16);
}

static void multiply_values(const Sixteen* values, int visible, int dim, Lanes packed,
                            const RowProduct* rows, int count, const Ahead& ahead) {
  const int steps = (visible + kValuesTogether - 1) / kValuesTogether;
  if (count <= kDirectRows) {
    for_rows<MultiplyValues>(rows, count, values, steps, dim, ahead);
    return;
  }
  ahead.fetch_all();
  // A line apart, so that what is written together does not fall on few sets of the cache.
  const int64_t stride = 64 * (kKeyBlock + 1);
  if (!*packed.made) pack_lanes(values, steps, dim, stride, packed.at);
  *packed.made = true;
  for_rows<Multiply>(rows, count, (const uint8_t*)packed.at, stride, steps, dim / 16);
}

// Brings a row of sums over values, as value_lanes has them, back into its order.
static void order_values(float* row, int dim) {
  if (kPairSteps == 1) return;
  for (int d = 0; d < dim; d += 32) {
    float split[32];
    __builtin_memcpy(split, row + d, sizeof split);
    for (int i = 0; i < 16; i++) {
      row[d + 2 * i] = split[i];
      row[d + 2 * i + 1] = split[16 + i];
    }
  }
}

}  // namespace OPSIN_ISA
