// Products of a few rows with matrices that are read once: plain C++ with vectors of 16 numbers,
// and AMX's tiles where the processor has them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES 1
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));

// bfloat16: the upper half of a float.
struct bf16 {
  uint16_t bits;
};

template <class V> inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline v16 load16(const float* p) { return load<v16>(p); }

#ifdef __AVX512F__

inline v16 load16(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(load<__m256i>(p));
  return (v16)_mm512_slli_epi32(wide, 16);
}

inline v16 load16(const int8_t* p) {
  return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(p)));
}

#else

inline v16 load16(const bf16* p) {
  typedef uint16_t h16 __attribute__((vector_size(32)));
  return (v16)(__builtin_convertvector(load<h16>(p), u16) << 16);
}

inline v16 load16(const int8_t* p) {
  typedef int8_t b16 __attribute__((vector_size(16)));
  return __builtin_convertvector(load<b16>(p), v16);
}

#endif

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  return load<float>(&bits);
}

template <class T> T rounded(float x);
template <> inline float rounded<float>(float x) { return x; }
template <> inline bf16 rounded<bf16>(float x) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits = load<uint32_t>(&x);
  if (x != x) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Rounds n numbers, as `rounded` does each.
inline void round_all(const float* x, int64_t n, float* y) { std::memcpy(y, x, n * sizeof(float)); }
inline void round_all(const float* x, int64_t n, bf16* y) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  for (; i + 16 <= n; i += 16) {
    const __m256bh own = _mm512_cvtneps_pbh((__m512)load16(x + i));
    std::memcpy(y + i, &own, sizeof own);
  }
#endif
  for (; i < n; i++) y[i] = rounded<bf16>(x[i]);
}

// Elements that stand beside each other are added: those of `a`, then those of `b`.
inline v16 add_pairs(v16 a, v16 b) {
  const i16 even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}

inline float sum(v16 v) {
  for (int i = 0; i < 4; i++) v = add_pairs(v, v);
  return v[0];
}

// Element i is the sum of v[i].
template <int N> struct Sums {
  static inline v16 of(const v16* v) {
    return add_pairs(Sums<N / 2>::of(v), Sums<N / 2>::of(v + N / 2));
  }
};
template <> struct Sums<1> {
  static inline v16 of(const v16* v) { return v[0]; }
};

// Element o * R + r is the product of row o of `w` with row r of `x`; O * R is 16. Rows of `w`
// from `last` on are taken to be that one.
template <int O, int R, class W>
inline v16 dots(const W* w, int64_t stride, int64_t last, const float* x, int64_t x_stride, int64_t k) {
  const W* row[O];
  row[0] = w;
#pragma GCC unroll 16
  for (int o = 1; o < O; o++) row[o] = o <= last ? row[o - 1] + stride : row[o - 1];
  v16 acc[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) acc[i] = v16{};
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
#pragma GCC unroll 16
    for (int o = 0; o < O; o++) {
      const v16 own = load16(row[o] + i);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[o * R + r] += own * load16(x + r * x_stride + i);
    }
  }
  v16 y = Sums<16>::of(acc);
  if (i == k) return y;
  float rest[16];
  std::memcpy(rest, &y, sizeof y);
  for (; i < k; i++)
#pragma GCC unroll 1
    for (int e = 0; e < 16; e++)
      rest[e] += to_float(w[std::min<int64_t>(e / R, last) * stride + i]) * x[e % R * x_stride + i];
  return load16(rest);
}

constexpr int BLOCK = 32;  // rows of a matrix that are multiplied at a time

// y[r * BLOCK + o] for `rows` rows of `x` and `outputs` rows of `w`, at most BLOCK.
template <class W>
void multiply(const W* w, int64_t stride, int64_t outputs, const float* x, int64_t rows, int64_t k, float* y) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    for (int64_t o = 0; o < outputs; o += 4) {
      v16 found = dots<4, 4>(w + o * stride, stride, outputs - 1 - o, x + r * k, k, k);
      for (int i = 0; i < 16; i++) y[(r + i % 4) * BLOCK + o + i / 4] = found[i];
    }
  for (; r < rows; r++)
    for (int64_t o = 0; o < outputs; o += 16) {
      v16 found = dots<16, 1>(w + o * stride, stride, outputs - 1 - o, x + r * k, k, k);
      std::memcpy(y + r * BLOCK + o, &found, sizeof found);
    }
}

// Row r of numbers as a column of tiles: [r / 16][k / 32][k % 32 / 2][r % 16][k % 2].
inline void lay_in_tiles(const bf16* x, int64_t r, int64_t k, bf16* tiled) {
  bf16* to = tiled + r / 16 * 16 * k + r % 16 * 2;
  for (int64_t i = 0; i < k; i += 2, to += 32) std::memcpy(to, x + i, 4);
}

#ifdef HAS_TILES

inline bool ask_for_tiles() {  // the kernel gives them to processes that ask
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
}

inline void begin_tiles() {
  alignas(64) uint8_t config[64] = {1};
  for (int tile = 0; tile < 8; tile++) {
    config[16 + 2 * tile] = 64;  // bytes in a row
    config[48 + tile] = 16;      // rows
  }
  _tile_loadconfig(config);
}

inline void end_tiles() { _tile_release(); }

// As `multiply`, of BLOCK rows of `w` and k that 32 divides, with rows laid out by `lay_in_tiles`.
inline void multiply_tiles(const bf16* w, int64_t stride, const bf16* x, int64_t rows, int64_t k, float* y) {
  alignas(64) float found[4][16][16];
  for (int64_t r = 0; r < rows; r += 32) {
    const bf16 *one = x + r * k, *other = one + 16 * k;
    const bool both = rows - r > 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < k; i += 32) {
      _tile_loadd(4, w + i, stride * 2);
      _tile_loadd(5, w + 16 * stride + i, stride * 2);
      _tile_loadd(6, one + i * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (both) {
        _tile_loadd(7, other + i * 16, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      if (r == 0)  // what comes next, unless it lies behind the end, where this does nothing
        for (int o = BLOCK; o < 2 * BLOCK; o++) _mm_prefetch(w + o * stride + i, _MM_HINT_T1);
    }
    _tile_stored(0, found[0], 64);
    _tile_stored(1, found[1], 64);
    _tile_stored(2, found[2], 64);
    _tile_stored(3, found[3], 64);
    for (int64_t b = 0; b < std::min<int64_t>(32, rows - r); b++)
      for (int o = 0; o < BLOCK; o++)
        y[(r + b) * BLOCK + o] = found[b / 16 * 2 + o / 16][o % 16][b % 16];
  }
}

// Integers as bfloat16, which has each of them exactly: (BLOCK, k).
inline void widen(const int8_t* w, int64_t stride, int64_t k, bf16* wide) {
  for (int o = 0; o < BLOCK; o++)
    for (int64_t i = 0; i < k; i += 32) {
      alignas(64) float own[32];
      const v16 one = load16(w + o * stride + i), other = load16(w + o * stride + i + 16);
      std::memcpy(own, &one, sizeof one);
      std::memcpy(own + 16, &other, sizeof other);
      round_all(own, 32, wide + o * k + i);
    }
}

#else

inline bool ask_for_tiles() { return false; }
inline void begin_tiles() {}
inline void end_tiles() {}
inline void multiply_tiles(const bf16*, int64_t, const bf16*, int64_t, int64_t, float*) {}
inline void widen(const int8_t*, int64_t, int64_t, bf16*) {}

#endif
