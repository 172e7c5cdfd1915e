// The integer product of fraqat.kernels.product for CPUs with AMX int8 tiles, and the loops around it.
//
// Shape suffixes: M tokens, K input channels, O output channels. The weight's codes are packed in panels of 16 output
// channels: [ceil(O/16), ceil(K/64), 16, 16, 4], where the last three are four consecutive input channels (last) of each
// of 16 output channels, for 16 groups of input channels: one tile of 1 KiB. What is missing to full tiles is zero.

#include "native_tiles.h"

#include <omp.h>

#include <cstdlib>
#include <memory>

using namespace fraqat;

namespace {

constexpr int64_t kDepth = 64;               // input channels of a tile
constexpr int64_t kRowsBytes = 1000 * 1024;  // activation codes that stay in the second-level cache

}  // namespace

extern "C" struct Product {
  const uint8_t* codes_MK;  // int8 where is_unsigned is 0
  const int8_t* packed;
  const float* weight_scale_O;
  const float* token_scale;
  const int32_t* row_sums_O;  // or null
  const float* bias_O;        // or null
  void* y_MO;
  int64_t num_tokens, num_inputs, num_outputs;
  int64_t token_scale_stride;  // 0 where all tokens share one
  int32_t zero_point, is_unsigned, is_bfloat16, num_threads;
};

namespace {

// --- Everything after the sum -------------------------------------------------------------------------------------

// Sums of a block that wait to be scaled and stored; this is done a few rows at a time beside the sums of the next block.
template <typename Out>
class Waiting {
 public:
  Waiting() = default;

  Waiting(const Product& p, const int32_t* sums, int64_t row, int64_t rows, int64_t column)
      : sums_(sums),
        token_scale_(p.token_scale + row * p.token_scale_stride),
        out_(static_cast<Out*>(p.y_MO) + row * p.num_outputs + column),
        rows_(rows),
        token_scale_stride_(p.token_scale_stride),
        out_stride_(p.num_outputs) {
    const int64_t size = p.num_tokens * p.num_outputs * static_cast<int64_t>(sizeof(Out));
    const bool is_aligned = reinterpret_cast<uintptr_t>(p.y_MO) % 64 == 0 && p.num_outputs % kBlock == 0;
    streams_ = is_aligned && size >= kStreamBytes;
    for (int half = 0; half < 2; ++half, column += kLanes) {
      const __mmask16 lanes = lanes_below(p.num_outputs - column);
      lanes_ |= static_cast<__mmask32>(lanes) << half * kLanes;
      scale_[half] = _mm512_maskz_loadu_ps(lanes, p.weight_scale_O + column);
      // Adding minus zero changes nothing, not even the sign of a zero.
      bias_[half] = p.bias_O ? _mm512_maskz_loadu_ps(lanes, p.bias_O + column) : _mm512_set1_ps(-0.0f);
      offset_[half] = _mm512_setzero_si512();
      if (p.row_sums_O) {
        const __m512i row_sums = _mm512_maskz_loadu_epi32(lanes, p.row_sums_O + column);
        offset_[half] = _mm512_mullo_epi32(_mm512_set1_epi32(p.zero_point), row_sums);
      }
    }
  }

  void finish(int64_t rows) {
    for (const int64_t end = std::min(done_ + rows, rows_); done_ < end; ++done_) {
      const __m512 token_scale = _mm512_set1_ps(*token_scale_);
      store(out_, lanes_, streams_, scaled(0, token_scale), scaled(1, token_scale));
      sums_ += kBlock;
      out_ += out_stride_;
      token_scale_ += token_scale_stride_;
    }
  }

 private:
  __m512 scaled(int half, __m512 token_scale) const {
    const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums_ + half * kLanes), offset_[half]);
    const __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale_[half]), token_scale);
    return _mm512_add_ps(y, bias_[half]);
  }

  __m512 scale_[2], bias_[2];
  __m512i offset_[2];
  const int32_t* sums_ = nullptr;
  const float* token_scale_ = nullptr;
  Out* out_ = nullptr;
  int64_t done_ = 0, rows_ = 0, token_scale_stride_ = 0, out_stride_ = 0;
  __mmask32 lanes_ = 0;
  bool streams_ = false;
};

// --- Sums ---------------------------------------------------------------------------------------------------------

// Sums of kRowTiles x kPanels tiles. Activations pass by the nearest cache, where the weights are to stay.
template <bool kUnsigned, int kRowTiles, int kPanels, typename Out>
void sum_block(const uint8_t* codes, const int8_t* panel, int64_t depth_tiles, int32_t* sums, Waiting<Out>& waiting) {
  const uint8_t* lower_codes = codes + depth_tiles * kTile;
  const int8_t* next_panel = panel + depth_tiles * kTile;
  const int64_t rows_per_step = ceil_div(kBlock, depth_tiles);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t offset = 0; offset < depth_tiles * kTile; offset += kTile) {
    _tile_loadd(6, panel + offset, kDepth);
    if constexpr (kPanels == 2) _tile_loadd(7, next_panel + offset, kDepth);
    _tile_stream_loadd(4, codes + offset, kDepth);
    if constexpr (kRowTiles == 2) _tile_stream_loadd(5, lower_codes + offset, kDepth);
    if constexpr (kUnsigned) {
      _tile_dpbusd(0, 4, 6);
      if constexpr (kPanels == 2) _tile_dpbusd(1, 4, 7);
      if constexpr (kRowTiles == 2) _tile_dpbusd(2, 5, 6);
      if constexpr (kRowTiles == 2 && kPanels == 2) _tile_dpbusd(3, 5, 7);
    } else {
      _tile_dpbssd(0, 4, 6);
      if constexpr (kPanels == 2) _tile_dpbssd(1, 4, 7);
      if constexpr (kRowTiles == 2) _tile_dpbssd(2, 5, 6);
      if constexpr (kRowTiles == 2 && kPanels == 2) _tile_dpbssd(3, 5, 7);
    }
    waiting.finish(rows_per_step);
  }
  constexpr int64_t kStride = kBlock * sizeof(int32_t);
  _tile_stored(0, sums, kStride);
  if constexpr (kPanels == 2) _tile_stored(1, sums + kLanes, kStride);
  if constexpr (kRowTiles == 2) _tile_stored(2, sums + kLanes * kBlock, kStride);
  if constexpr (kRowTiles == 2 && kPanels == 2) _tile_stored(3, sums + kLanes * kBlock + kLanes, kStride);
}

// Copies rows of codes to tiles [ceil(rows/16), ceil(K/64), 16, 64], with zeros for missing input channels.
void copy_to_tiles(const uint8_t* codes, int64_t rows, int64_t num_inputs, uint8_t* tiles) {
  const int64_t depth_tiles = ceil_div(num_inputs, kDepth);
  for (int64_t i = 0; i < rows; ++i) {
    const uint8_t* from = codes + i * num_inputs;
    uint8_t* to = tiles + i / kLanes * depth_tiles * kTile + i % kLanes * kDepth;
    for (int64_t k = 0; k < num_inputs; k += kDepth, to += kTile)
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi8(bytes_below(num_inputs - k), from + k));
  }
  finish_writing(tiles);
}

// Rows [row, end_row) times panels [panel, end_panel). `tiles` has room for the rows, rounded up to tiles.
template <bool kUnsigned, typename Out>
void multiply(const Product& p, int64_t row, int64_t end_row, int64_t panel, int64_t end_panel, uint8_t* tiles) {
  alignas(64) int32_t sums[kBlock * kBlock];
  const int64_t depth_tiles = ceil_div(p.num_inputs, kDepth);
  copy_to_tiles(p.codes_MK + row * p.num_inputs, end_row - row, p.num_inputs, tiles);
  Waiting<Out> waiting;
  for (; panel < end_panel; panel += 2) {
    const bool has_two = panel + 1 < end_panel;
    for (int64_t i = row; i < end_row; i += kBlock) {
      const int64_t rows = std::min(kBlock, end_row - i);
      auto* sum = rows > kLanes ? (has_two ? sum_block<kUnsigned, 2, 2, Out> : sum_block<kUnsigned, 2, 1, Out>)
                                : (has_two ? sum_block<kUnsigned, 1, 2, Out> : sum_block<kUnsigned, 1, 1, Out>);
      // What waits in `sums` is gone before the new sums are stored there.
      sum(tiles + (i - row) / kLanes * depth_tiles * kTile, p.packed + panel * depth_tiles * kTile, depth_tiles, sums, waiting);
      waiting = Waiting<Out>(p, sums, i, rows, panel * kLanes);
    }
  }
  waiting.finish(kBlock);
}

template <bool kUnsigned>
void multiply(const Product& p, int64_t row, int64_t end_row, int64_t panel, int64_t end_panel, uint8_t* tiles) {
  if (p.is_bfloat16) multiply<kUnsigned, uint16_t>(p, row, end_row, panel, end_panel, tiles);
  else multiply<kUnsigned, float>(p, row, end_row, panel, end_panel, tiles);
}

}  // namespace

// Rows are cut so that their codes stay in the second-level cache while the weight streams past; panels are cut too
// where there are several threads.
extern "C" void fraqat_product(const Product* product) {
  const Product& p = *product;
  const int64_t padded_inputs = ceil_div(p.num_inputs, kDepth) * kDepth;
  const int64_t num_panels = ceil_div(p.num_outputs, kLanes);
  const int64_t most_rows = std::max(kBlock, kRowsBytes / padded_inputs / kBlock * kBlock);
  const int64_t row_parts = std::max<int64_t>(1, ceil_div(p.num_tokens, most_rows));
  const int64_t rows = ceil_div(ceil_div(p.num_tokens, row_parts), kBlock) * kBlock;
  const int64_t wanted = p.num_threads == 1 ? 1 : std::max<int64_t>(1, ceil_div(4 * p.num_threads, row_parts));
  const int64_t panels = ceil_div(ceil_div(num_panels, wanted), 2) * 2;
  const int64_t panel_parts = ceil_div(num_panels, panels);
#pragma omp parallel num_threads(p.num_threads)
  {
    configure_tiles();
    const std::unique_ptr<uint8_t[], decltype(&std::free)> tiles(
        static_cast<uint8_t*>(std::aligned_alloc(kTile, rows * padded_inputs)), std::free);
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < row_parts * panel_parts; ++part) {
      const int64_t row = part / panel_parts * rows, end_row = std::min(row + rows, p.num_tokens);
      const int64_t panel = part % panel_parts * panels, end_panel = std::min(panel + panels, num_panels);
      if (row >= end_row) continue;
      if (p.is_unsigned) multiply<true>(p, row, end_row, panel, end_panel, tiles.get());
      else multiply<false>(p, row, end_row, panel, end_panel, tiles.get());
    }
    _mm_sfence();
    _tile_release();
  }
}

// --- Packing ------------------------------------------------------------------------------------------------------

namespace {

// One panel from up to 16 rows of codes.
void pack_panel(const int8_t* codes, int64_t rows, int64_t num_inputs, int8_t* panel) {
  for (int64_t k = 0; k < num_inputs; k += kDepth, panel += kTile) {
    const __mmask64 lanes = bytes_below(num_inputs - k);
    __m512i tile[16];
    for (int i = 0; i < 16; ++i)
      tile[i] = i < rows ? _mm512_maskz_loadu_epi8(lanes, codes + i * num_inputs + k) : _mm512_setzero_si512();
    transpose_tile(tile, panel);
  }
}

}  // namespace

extern "C" void fraqat_pack(const int8_t* codes_OK, int64_t num_outputs, int64_t num_inputs, int8_t* packed,
                            int32_t num_threads) {
  const int64_t panel_bytes = ceil_div(num_inputs, kDepth) * kTile;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t panel = 0; panel < ceil_div(num_outputs, kLanes); ++panel) {
    const int64_t row = panel * kLanes;
    pack_panel(codes_OK + row * num_inputs, std::min(kLanes, num_outputs - row), num_inputs, packed + panel * panel_bytes);
  }
}

// --- Quantizing ---------------------------------------------------------------------------------------------------

namespace {

// x / scale, rounded as a division is but at a fifth of its cost: two Newton steps from the product with the rounded
// reciprocal, the second of them exact by Markstein's theorem (the first estimate is off by less than two units in the
// last place, the second by less than one). Where an estimate could leave the range of normal numbers, it divides.
// kBounded: the quotients are known to be small.
template <bool kBounded>
class Divider {
 public:
  explicit Divider(float scale)
      : scale_(_mm512_set1_ps(scale)),
        reciprocal_(_mm512_set1_ps(1.0f / scale)),
        is_plain_(!(scale > 0x1p-90f && scale < 0x1p90f)) {}

  __m512 operator()(__m512 x) const {
    if (is_plain_) return _mm512_div_ps(x, scale_);
    const __m512 guess = _mm512_mul_ps(x, reciprocal_);
    __m512 y = _mm512_fmadd_ps(_mm512_fnmadd_ps(guess, scale_, x), reciprocal_, guess);
    y = _mm512_fmadd_ps(_mm512_fnmadd_ps(y, scale_, x), reciprocal_, y);
    if constexpr (kBounded) return y;
    // Beyond every grid of codes, where the steps could overflow, the guess will do.
    const __mmask16 is_far = _mm512_cmp_ps_mask(_mm512_abs_ps(guess), _mm512_set1_ps(4096.0f), _CMP_GT_OQ);
    return _mm512_mask_mov_ps(y, is_far, guess);
  }

 private:
  __m512 scale_, reciprocal_;
  bool is_plain_;
};

// codes = clamp(round(x / scale), qmin, qmax); returns their sum.
template <typename In>
int32_t quantize_row(const In* x, int64_t size, float scale, float qmin, float qmax, int8_t* codes) {
  const Divider<false> divide(scale);
  const __m512 low = _mm512_set1_ps(qmin), high = _mm512_set1_ps(qmax);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < size; k += kLanes) {
    const __mmask16 lanes = lanes_below(size - k);
    const __m512 y = _mm512_min_ps(_mm512_max_ps(divide(load(x + k, lanes)), low), high);
    const __m512i code = _mm512_cvtps_epi32(y);  // to nearest even
    sum = _mm512_mask_add_epi32(sum, lanes, sum, code);
    _mm_mask_storeu_epi8(codes + k, lanes, _mm512_cvtepi32_epi8(code));
  }
  return _mm512_reduce_add_epi32(sum);
}

// codes = round(x / scale), where no quotient is beyond the grid.
template <typename In>
void quantize_bounded_row(const In* x, int64_t size, float scale, int8_t* codes) {
  const Divider<true> divide(scale);
  for (int64_t k = 0; k < size; k += kLanes) {
    const __mmask16 lanes = lanes_below(size - k);
    const __m512i code = _mm512_cvtps_epi32(divide(load(x + k, lanes)));
    _mm_mask_storeu_epi8(codes + k, lanes, _mm512_cvtepi32_epi8(code));
  }
}

// The bits of numbers without a sign are ordered as the numbers are, NaN above all.
template <typename In>
float max_abs(const In* x, int64_t size) {
  const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < size; k += kLanes) {
    const __m512 value = load(x + k, lanes_below(size - k));
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(value), no_sign));
  }
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(most))));
}

// max(max|x| / divisor, least normal number); NaN stays.
template <typename In>
float scale_of(const In* x, int64_t size, float divisor) {
  const float scale = max_abs(x, size) / divisor;
  return scale < 0x1p-126f ? 0x1p-126f : scale;
}

template <typename In>
void quantize_weight(const In* weight, float* scale, float divisor, int64_t num_outputs, int64_t num_inputs, float qmin,
                     float qmax, int8_t* codes, int8_t* packed, int32_t* row_sums, int32_t num_threads) {
  const int64_t panel_bytes = ceil_div(num_inputs, kDepth) * kTile;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t panel = 0; panel < ceil_div(num_outputs, kLanes); ++panel) {
    const int64_t row = panel * kLanes, end_row = std::min(row + kLanes, num_outputs);
    for (int64_t i = row; i < end_row; ++i) {
      const int64_t start = i * num_inputs;
      if (divisor > 0) scale[i] = scale_of(weight + start, num_inputs, divisor);
      row_sums[i] = quantize_row(weight + start, num_inputs, scale[i], qmin, qmax, codes + start);
    }
    pack_panel(codes + row * num_inputs, end_row - row, num_inputs, packed + panel * panel_bytes);
  }
}

template <typename In>
void quantize_tokens(const In* x, int64_t num_tokens, int64_t num_inputs, int8_t* codes, float* scale,
                     int32_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < num_tokens; ++i) {
    const In* row = x + i * num_inputs;
    scale[i] = scale_of(row, num_inputs, 127.0f);
    quantize_bounded_row(row, num_inputs, scale[i], codes + i * num_inputs);
  }
}

}  // namespace

// `divisor`: positive where the scales are to be computed and written, else 0.
extern "C" void fraqat_quantize_weight(const void* weight_OK, int32_t is_bfloat16, float* scale_O, float divisor,
                                       int64_t num_outputs, int64_t num_inputs, float qmin, float qmax, int8_t* codes_OK,
                                       int8_t* packed, int32_t* row_sums_O, int32_t num_threads) {
  if (is_bfloat16)
    quantize_weight(static_cast<const uint16_t*>(weight_OK), scale_O, divisor, num_outputs, num_inputs, qmin, qmax, codes_OK,
                    packed, row_sums_O, num_threads);
  else
    quantize_weight(static_cast<const float*>(weight_OK), scale_O, divisor, num_outputs, num_inputs, qmin, qmax, codes_OK,
                    packed, row_sums_O, num_threads);
}

extern "C" void fraqat_quantize_tokens(const void* x_MK, int32_t is_bfloat16, int64_t num_tokens, int64_t num_inputs,
                                       int8_t* codes_MK, float* scale_M, int32_t num_threads) {
  if (is_bfloat16)
    quantize_tokens(static_cast<const uint16_t*>(x_MK), num_tokens, num_inputs, codes_MK, scale_M, num_threads);
  else
    quantize_tokens(static_cast<const float*>(x_MK), num_tokens, num_inputs, codes_MK, scale_M, num_threads);
}
