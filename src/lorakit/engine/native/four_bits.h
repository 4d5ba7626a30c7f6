// Products with weights of 4 bits: `int4_weight.py` says how these lie, and what they stand for.
#pragma once

#include "products.h"

constexpr int FOUR_BITS_BLOCK = 64;  // outputs whose integers lie together
constexpr int GROUP = 32;            // inputs with one step and middle

#ifdef __AVX512F__

// The lower four bits of each element, less 8.
inline v16 lower_bits(u16 q) {
  const v16 table = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  return (v16)_mm512_permutexvar_ps((__m512i)q, (__m512)table);
}

inline u16 load_bytes(const uint8_t* p) { return (u16)_mm512_cvtepu8_epi32(load<__m128i>(p)); }

#else

inline v16 lower_bits(u16 q) { return __builtin_convertvector((i16)(q & 15), v16) - 8.f; }

inline u16 load_bytes(const uint8_t* p) {
  typedef uint8_t b16 __attribute__((vector_size(16)));
  return __builtin_convertvector(load<b16>(p), u16);
}

#endif

// 64 outputs of a weight.
struct FourBits {
  const uint8_t* w;    // (d_in, 32): byte j has outputs j and 32 + j
  const bf16* scales;  // (d_in / GROUP, 64, 2), groups `stride` numbers apart
  int64_t stride, k;

  // Of one group, 16 outputs an element.
  struct Scales {
    v16 step[4], middle[4];
  };

  inline Scales scales_of(int64_t group) const {
    Scales found;
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
      const u16 both = load<u16>(scales + group * stride + 32 * c);
      found.step[c] = (v16)(both << 16);
      found.middle[c] = (v16)(both & 0xffff0000u);
    }
    return found;
  }

  // The weights of input i.
  inline void column(int64_t i, const Scales& own, v16* found) const {
    const u16 one = load_bytes(w + 32 * i), other = load_bytes(w + 32 * i + 16);
    const v16 q[4] = {lower_bits(one), lower_bits(other), lower_bits(one >> 4), lower_bits(other >> 4)};
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) found[c] = q[c] * own.step[c] + own.middle[c];
  }

  template <int R> void multiply_rows(const float* x, float* y) const {
    v16 acc[R][4] = {};
    for (int64_t group = 0; group < k / GROUP; group++) {
      const Scales own = scales_of(group);
      for (int64_t i = group * GROUP; i < (group + 1) * GROUP; i++) {
        v16 weights[4];
        column(i, own, weights);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
          for (int c = 0; c < 4; c++) acc[r][c] += weights[c] * x[r * k + i];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) std::memcpy(y + r * FOUR_BITS_BLOCK, acc[r], sizeof acc[r]);
  }

  // y (rows, 64), of x (rows, k).
  void multiply(const float* x, int64_t rows, float* y) const {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) multiply_rows<4>(x + r * k, y + r * FOUR_BITS_BLOCK);
    for (; r + 2 <= rows; r += 2) multiply_rows<2>(x + r * k, y + r * FOUR_BITS_BLOCK);
    if (r < rows) multiply_rows<1>(x + r * k, y + r * FOUR_BITS_BLOCK);
  }

  void widen(bf16* wide) const;
};

#ifdef HAS_TILES

// As tiles of bfloat16 that have 16 outputs and 32 inputs: [k / 32][output / 16][k % 32 / 2][output % 16][k % 2].
inline void FourBits::widen(bf16* wide) const {
  typedef uint16_t h32 __attribute__((vector_size(64)));
  const h32 beside = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  for (int64_t group = 0; group < k / GROUP; group++) {
    const Scales own = scales_of(group);
    for (int pair = 0; pair < 16; pair++) {
      v16 one[4], next[4];
      column(group * GROUP + 2 * pair, own, one);
      column(group * GROUP + 2 * pair + 1, own, next);
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) {
        const __m512bh both = _mm512_cvtne2ps_pbh((__m512)next[c], (__m512)one[c]);
        const __m512i found = _mm512_permutexvar_epi16((__m512i)beside, (__m512i)both);
        std::memcpy(wide + ((group * 4 + c) * 16 + pair) * 32, &found, sizeof found);
      }
    }
  }
}

// y (rows, 64) of what `widen` gave and x (rows, k); both have room for whole tiles of 16 rows.
inline void multiply_columns(const bf16* wide, const bf16* x, int64_t rows, int64_t k, float* y) {
  constexpr int ROW = 4 * FOUR_BITS_BLOCK;  // bytes
  for (int64_t r = 0; r < rows; r += 16, x += 16 * k, y += 16 * FOUR_BITS_BLOCK) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < k; i += 32) {
      const bf16* tile = wide + i * FOUR_BITS_BLOCK;
      _tile_loadd(4, x + i, 2 * k);
      _tile_loadd(5, tile, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, tile + 512, 64);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, tile + 1024, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, tile + 1536, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, y, ROW);
    _tile_stored(1, y + 16, ROW);
    _tile_stored(2, y + 32, ROW);
    _tile_stored(3, y + 48, ROW);
  }
}

#else

inline void FourBits::widen(bf16*) const {}
inline void multiply_columns(const bf16*, const bf16*, int64_t, int64_t, float*) {}

#endif
