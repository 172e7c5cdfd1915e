// What the kernels share: AMX tiles of 16 rows of 64 bytes, vectors of 16 lanes, and how results are rounded and stored.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace fraqat {

constexpr int64_t kLanes = 16;               // of a vector of 32-bit numbers; rows of a tile
constexpr int64_t kTileRow = 64;             // bytes
constexpr int64_t kTile = kLanes * kTileRow;  // bytes
constexpr int64_t kBlock = 2 * kLanes;       // rows and columns summed at once
constexpr int64_t kStreamBytes = 1 << 20;    // results that would not stay in the second-level cache pass it by

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline __mmask16 lanes_below(int64_t count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

inline __mmask64 bytes_below(int64_t count) { return count >= kTileRow ? ~0ull : (1ull << count) - 1; }

// --- Tiles --------------------------------------------------------------------------------------------------------

// The tile intrinsics do not tell the compiler what memory they read: everything written to it must be there by now.
inline void finish_writing(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// Tiles 0 to 3 hold sums, 4 and 5 the left operand, 6 and 7 the right one.
inline void configure_tiles() {
  alignas(64) uint8_t config[64] = {1};
  for (int tile = 0; tile < 8; ++tile) {
    config[16 + 2 * tile] = kTileRow;
    config[48 + tile] = kLanes;
  }
  finish_writing(config);
  _tile_loadconfig(config);
}

// Transposes 16 x 16 groups of 32 bits: rows to columns of a tile.
inline void transpose_tile(const __m512i rows[16], void* tile) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i even_low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    uint8_t* out = static_cast<uint8_t*>(tile) + kTileRow * i;
    _mm512_storeu_si512(out, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(out + 512, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    _mm512_storeu_si512(out + 256, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(out + 768, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}

// --- Floats -------------------------------------------------------------------------------------------------------

inline __m512 load(const float* x, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, x); }

// bfloat16
inline __m512 load(const uint16_t* x, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x)), 16));
}

// `streams`: past the caches, which spares reading what is overwritten; for whole aligned lines only.
inline void store(float* out, __mmask32 lanes, bool streams, __m512 low, __m512 high) {
  if (streams) {
    _mm512_stream_ps(out, low);
    _mm512_stream_ps(out + kLanes, high);
  } else {
    _mm512_mask_storeu_ps(out, static_cast<__mmask16>(lanes), low);
    _mm512_mask_storeu_ps(out + kLanes, static_cast<__mmask16>(lanes >> kLanes), high);
  }
}

// bfloat16, to nearest even. The CPU's own conversion flushes denormals: where there are some, integers do it.
inline void store(uint16_t* out, __mmask32 lanes, bool streams, __m512 low, __m512 high) {
  constexpr int kDenormal = 0x20;
  __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  const __mmask16 low_denormal = _mm512_fpclass_ps_mask(low, kDenormal);
  const __mmask16 high_denormal = _mm512_fpclass_ps_mask(high, kDenormal);
  if (__builtin_expect(low_denormal | high_denormal, 0)) {
    const auto round = [](__m512 y) {
      const __m512i bits = _mm512_castps_si512(y);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
    };
    const __m512i exact = _mm512_inserti64x4(_mm512_castsi256_si512(round(low)), round(high), 1);
    halves = _mm512_mask_mov_epi16(halves, low_denormal | static_cast<__mmask32>(high_denormal) << kLanes, exact);
  }
  if (streams) _mm512_stream_si512(reinterpret_cast<__m512i*>(out), halves);
  else _mm512_mask_storeu_epi16(out, lanes, halves);
}

}  // namespace fraqat
