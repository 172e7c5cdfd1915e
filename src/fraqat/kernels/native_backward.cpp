// The gradient products of a quantized linear layer for CPUs with AMX bfloat16 tiles.
//
// Shape suffixes: M tokens, K input channels, O output channels. Both products are left @ right. The left operand is the
// scaled gradient of the output, rounded to bfloat16 (and transposed for the weight's gradient); the right one is codes,
// which bfloat16 holds exactly. It is converted to tiles once. The left one is packed into tiles part by part, so that a
// part stays in the second-level cache while the right one streams past; where its rows are long, the sum is cut in
// passes, and in chunks for the nearest cache, and what has been summed waits in float32. Each result is one chain of
// float32 additions in the order of the sum, whatever the cut and the number of threads.

#include "native_tiles.h"

#include <cpuid.h>
#include <omp.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

using namespace fraqat;

extern "C" struct GradientProduct {
  const void* grad_MO;
  const float* scale;  // [O] for the input's gradient, [M] or [1] for the weight's
  const void* codes;   // [O, K] for the input's gradient, [M, K] for the weight's; int8 where is_unsigned is 0
  void* out;           // [M, K] or [O, K]
  float* bias_O;       // receives the sums of the gradient over the tokens; or null; for the weight's gradient
  int64_t num_tokens, num_inputs, num_outputs;
  int64_t scale_stride;  // 0 where all tokens share one
  int32_t zero_point, is_unsigned, is_weight_gradient, accumulates;
  int32_t grad_is_bfloat16, out_is_bfloat16, num_threads;
};

namespace {

constexpr int64_t kDepth = 32;               // summands of a tile
constexpr int64_t kPair = 2 * kTile;         // bytes of 32 rows or columns of 32 summands
constexpr int64_t kNearTiles = 18;           // pairs of tiles of the right operand that stay in the nearest cache
constexpr int64_t kPassDepth = 1536;         // most summands of a pass
constexpr int64_t kLeftBytes = 1000 * 1024;  // of the left operand that stay in the second-level cache
constexpr int64_t kRightBytes = 32 << 20;    // of the right operand that are kept

// Memory that a thread keeps from call to call: pages that are new cost as much as what is done with them.
class Scratch {
 public:
  uint8_t* at_least(int64_t size) {
    if (size > size_) {
      size_ = ceil_div(size, kPage) * kPage;
      bytes_.reset(static_cast<uint8_t*>(std::aligned_alloc(kPage, size_)));
      if (!bytes_) throw std::bad_alloc();
    }
    return bytes_.get();
  }

 private:
  static constexpr int64_t kPage = 4096;
  std::unique_ptr<uint8_t[], decltype(&std::free)> bytes_{nullptr, std::free};
  int64_t size_ = 0;
};

thread_local Scratch left_scratch, right_scratch, sums_scratch;

int64_t rows_of(const GradientProduct& p) { return p.is_weight_gradient ? p.num_outputs : p.num_tokens; }
int64_t depth_of(const GradientProduct& p) { return p.is_weight_gradient ? p.num_tokens : p.num_outputs; }
int64_t column_bytes_of(const GradientProduct& p) { return ceil_div(depth_of(p), kDepth) * kPair; }

// A part of the result, by rows and blocks of columns, and the summands of the pass.
struct Part {
  int64_t row, end_row, block, end_block, begin, end;

  int64_t depth_tiles() const { return ceil_div(end - begin, kDepth); }
  int64_t num_row_blocks() const { return ceil_div(end_row - row, kBlock); }
};

// --- The left operand ---------------------------------------------------------------------------------------------
//
// Blocks of 32 rows; in each, for one group of 32 summands after the other, two tiles of 16 rows. Missing summands are
// zero; missing rows may hold anything, for their sums are not stored.

__m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// grad * scale of each summand.
template <typename Grad>
void pack_rows(const GradientProduct& p, const Part& part, uint8_t* left) {
  constexpr int64_t kAhead = 3;  // rows
  const int64_t block_bytes = part.depth_tiles() * kPair;
  for (int64_t i = part.row; i < part.end_row; ++i) {
    const Grad* grad = static_cast<const Grad*>(p.grad_MO) + i * p.num_outputs;
    const int64_t local = i - part.row;
    uint8_t* to = left + local / kBlock * block_bytes + local % kBlock * kTileRow;
    for (int64_t o = part.begin; o < part.end; o += kDepth, to += kPair) {
      _mm_prefetch(grad + o + kAhead * p.num_outputs, _MM_HINT_T0);
      if constexpr (sizeof(Grad) == 4) _mm_prefetch(grad + o + kLanes + kAhead * p.num_outputs, _MM_HINT_T0);
      const __mmask16 low = lanes_below(part.end - o), high = lanes_below(part.end - o - kLanes);
      _mm512_store_si512(to, rounded(_mm512_mul_ps(load(grad + o, low), load(p.scale + o, low)),
                                     _mm512_mul_ps(load(grad + o + kLanes, high), load(p.scale + o + kLanes, high))));
    }
  }
}

// One tile: grad * scale of up to 32 tokens for 16 output channels, transposed. Adds grad to `sums`.
template <typename Grad>
void pack_column_tile(const GradientProduct& p, int64_t token, int64_t end, int64_t output, uint8_t* tile, float* sums) {
  constexpr int64_t kAhead = 64;  // output channels
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                               5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __mmask16 lanes = lanes_below(p.num_outputs - output);
  __m512i rows[16];
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int i = 0; i < 16; ++i) {
    __m512 scaled[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int odd = 0; odd < 2; ++odd) {
      const int64_t m = token + 2 * i + odd;
      if (m >= end) break;
      const Grad* from = static_cast<const Grad*>(p.grad_MO) + m * p.num_outputs + output;
      _mm_prefetch(from + kAhead, _MM_HINT_T0);
      const __m512 grad = load(from, lanes);
      sum[odd] = _mm512_add_ps(sum[odd], grad);
      scaled[odd] = _mm512_mul_ps(grad, _mm512_set1_ps(p.scale[m * p.scale_stride]));
    }
    rows[i] = _mm512_permutexvar_epi16(interleaved, rounded(scaled[0], scaled[1]));
  }
  transpose_tile(rows, tile);
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_add_ps(sum[0], sum[1])));
}

template <typename Grad>
void pack_columns(const GradientProduct& p, const Part& part, uint8_t* left, float* sums) {
  const int64_t depth_tiles = part.depth_tiles();
  for (int64_t tile = 0; tile < depth_tiles; ++tile) {
    for (int64_t o = part.row; o < part.end_row; o += kLanes) {
      const int64_t local = o - part.row;
      uint8_t* to = left + (local / kBlock * depth_tiles + tile) * kPair + local % kBlock * kTileRow;
      pack_column_tile<Grad>(p, part.begin + tile * kDepth, part.end, o, to, sums + local);
    }
  }
}

// --- The right operand --------------------------------------------------------------------------------------------
//
// Blocks of 32 columns; in each, for one group of 32 summands after the other, two tiles of 16 columns: 16 rows of pairs
// of summands. Where summands are missing, any finite number will do, for the left operand is zero there.

// Codes less the zero point as float32; the lower half of the bits is zero.
template <typename Code>
__m512i bits_of(const Code* codes, __mmask16 lanes, __m512i zero_point) {
  const __m128i bytes = _mm_maskz_loadu_epi8(lanes, codes);
  const __m512i code = std::is_signed_v<Code> ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
  return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, zero_point)));
}

// Converts one or two blocks.
template <typename Code>
void convert(const GradientProduct& p, int64_t block, int64_t num_blocks, uint8_t* right) {
  constexpr int64_t kAhead = 16;  // summands
  const int64_t depth = depth_of(p), stride = p.num_inputs, column = block * kBlock, num_tiles = 2 * num_blocks;
  const __m512i zero_point = _mm512_set1_epi32(p.zero_point);
  __mmask16 lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = lanes_below(p.num_inputs - column - i * kLanes);
  for (int64_t pair = 0; pair < ceil_div(depth, kDepth) * kLanes; ++pair) {
    const Code* first = static_cast<const Code*>(p.codes) + std::min(2 * pair, depth - 1) * stride + column;
    const Code* second = 2 * pair + 1 < depth ? first + stride : first;
    _mm_prefetch(first + kAhead * stride, _MM_HINT_T0);
    _mm_prefetch(second + kAhead * stride, _MM_HINT_T0);
    uint8_t* to = right + pair / kLanes * kPair + pair % kLanes * kTileRow;
    for (int i = 0; i < num_tiles; ++i) {
      const __m512i low = _mm512_srli_epi32(bits_of(first + i * kLanes, lanes[i], zero_point), 16);
      const __m512i high = bits_of(second + i * kLanes, lanes[i], zero_point);
      _mm512_store_si512(to + i / 2 * column_bytes_of(p) + i % 2 * kTile, _mm512_or_si512(low, high));
    }
  }
}

// --- Beside the sums ----------------------------------------------------------------------------------------------

// Sums of a block that wait to be stored; this is done a few rows at a time beside the sums of the next block.
template <typename Out>
class Waiting {
 public:
  Waiting() = default;

  Waiting(const GradientProduct& p, const float* sums, int64_t row, int64_t end_row, int64_t column)
      : sums_(sums),
        out_(static_cast<Out*>(p.out) + row * p.num_inputs + column),
        rows_(std::min(kBlock, end_row - row)),
        stride_(p.num_inputs),
        accumulates_(p.accumulates) {
    const int64_t size = rows_of(p) * p.num_inputs * static_cast<int64_t>(sizeof(Out));
    const bool is_aligned = reinterpret_cast<uintptr_t>(p.out) % 64 == 0 && p.num_inputs % kBlock == 0;
    streams_ = is_aligned && size >= kStreamBytes && !accumulates_;
    const __mmask32 high = lanes_below(p.num_inputs - column - kLanes);
    lanes_ = lanes_below(p.num_inputs - column) | high << kLanes;
    for (int64_t i = 0; accumulates_ && i < kAhead; ++i) fetch(i);
  }

  void finish(int64_t rows) {
    for (const int64_t end = std::min(done_ + rows, rows_); done_ < end; ++done_, sums_ += kBlock, out_ += stride_) {
      __m512 low = _mm512_load_ps(sums_), high = _mm512_load_ps(sums_ + kLanes);
      if (accumulates_) {
        fetch(kAhead);
        low = _mm512_add_ps(low, load(out_, static_cast<__mmask16>(lanes_)));
        high = _mm512_add_ps(high, load(out_ + kLanes, static_cast<__mmask16>(lanes_ >> kLanes)));
      }
      store(out_, lanes_, streams_, low, high);
    }
  }

 private:
  static constexpr int64_t kAhead = 8;  // rows

  void fetch(int64_t row) const {
    _mm_prefetch(out_ + row * stride_, _MM_HINT_T0);
    _mm_prefetch(out_ + row * stride_ + kLanes, _MM_HINT_T0);
  }

  const float* sums_ = nullptr;
  Out* out_ = nullptr;
  int64_t done_ = 0, rows_ = 0, stride_ = 0;
  __mmask32 lanes_ = 0;
  bool accumulates_ = false, streams_ = false;
};

// Brings memory to the second-level cache, as many lines per step as it takes to be done in time.
class Fetching {
 public:
  Fetching(const uint8_t* from, int64_t size, int64_t num_steps)
      : from_(from), end_(from + size), step_bytes_(ceil_div(size, num_steps * kTileRow) * kTileRow) {}

  void fetch() {
    for (const uint8_t* end = std::min(from_ + step_bytes_, end_); from_ < end; from_ += kTileRow)
      _mm_prefetch(from_, _MM_HINT_T1);
  }

 private:
  const uint8_t *from_, *end_;
  int64_t step_bytes_;
};

// --- Sums ---------------------------------------------------------------------------------------------------------

// Adds to the sums of a block, or starts them. The left operand passes by the nearest cache, where the right one stays.
template <typename Out>
void sum_block(const uint8_t* left, const uint8_t* right, int64_t depth_tiles, bool starts, float* sums, Fetching& fetching,
               Waiting<Out>& waiting) {
  constexpr int64_t kStride = kBlock * sizeof(float);
  const int64_t rows_per_step = ceil_div(kBlock, depth_tiles);
  if (starts) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kStride);
    _tile_loadd(1, sums + kLanes, kStride);
    _tile_loadd(2, sums + kLanes * kBlock, kStride);
    _tile_loadd(3, sums + kLanes * kBlock + kLanes, kStride);
  }
  for (const uint8_t* end = left + depth_tiles * kPair; left < end; left += kPair, right += kPair) {
    _tile_loadd(6, right, kTileRow);
    _tile_stream_loadd(4, left, kTileRow);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + kTile, kTileRow);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, left + kTile, kTileRow);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    fetching.fetch();
    waiting.finish(rows_per_step);
  }
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + kLanes, kStride);
  _tile_stored(2, sums + kLanes * kBlock, kStride);
  _tile_stored(3, sums + kLanes * kBlock + kLanes, kStride);
}

// One pass over the packed rows of a part, for one block of columns. `next`: that of the next one, or null.
template <typename Out>
void sum_column_block(const GradientProduct& p, const Part& part, int64_t column, const uint8_t* left, const uint8_t* right,
                      const uint8_t* next, float* sums) {
  const int64_t depth_tiles = part.depth_tiles(), num_blocks = part.num_row_blocks();
  const int64_t chunk = ceil_div(depth_tiles, ceil_div(depth_tiles, kNearTiles));
  Fetching fetching(next, next ? depth_tiles * kPair : 0, depth_tiles * num_blocks);
  for (int64_t tile = 0; tile < depth_tiles; tile += chunk) {
    const int64_t tiles = std::min(chunk, depth_tiles - tile);
    const bool starts = part.begin + tile == 0, ends = part.end == depth_of(p) && tile + tiles == depth_tiles;
    Waiting<Out> waiting;
    for (int64_t block = 0; block < num_blocks; ++block) {
      float* to = sums + block * kBlock * kBlock;
      sum_block(left + (block * depth_tiles + tile) * kPair, right + tile * kPair, tiles, starts, to, fetching, waiting);
      if (ends) waiting = Waiting<Out>(p, to, part.row + block * kBlock, part.end_row, column);
    }
    waiting.finish(kBlock);
  }
}

// `right`: its blocks of columns from `first_block` on.
template <typename Grad, typename Out>
void multiply(const GradientProduct& p, Part part, int64_t pass_depth, const uint8_t* right, int64_t first_block, uint8_t* left,
              float* sums) {
  const int64_t depth = depth_of(p), pass_sums = pass_depth < depth ? part.num_row_blocks() * kBlock * kBlock : 0;
  const std::unique_ptr<float[]> bias(new float[part.num_row_blocks() * kBlock]());
  for (; part.begin < depth; part.begin = part.end) {
    part.end = std::min(part.begin + pass_depth, depth);
    if (p.is_weight_gradient) pack_columns<Grad>(p, part, left, bias.get());
    else pack_rows<Grad>(p, part, left);
    finish_writing(left);
    for (int64_t block = part.block; block < part.end_block; ++block) {
      const uint8_t* from = right + (block - first_block) * column_bytes_of(p) + part.begin / kDepth * kPair;
      const uint8_t* next = block + 1 < part.end_block ? from + column_bytes_of(p) : nullptr;
      sum_column_block<Out>(p, part, block * kBlock, left, from, next, sums + (block - part.block) * pass_sums);
    }
  }
  if (p.bias_O && part.block == 0) std::copy_n(bias.get(), part.end_row - part.row, p.bias_O + part.row);
}

template <typename Grad>
auto multiply_for(const GradientProduct& p) {
  return p.out_is_bfloat16 ? multiply<Grad, uint16_t> : multiply<Grad, float>;
}

}  // namespace

// Whether the CPU has the tiles that this file needs; every one so far that has those of native.cpp does.
extern "C" int32_t fraqat_has_bfloat16_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}

// Columns are cut where the right operand would take too much memory, and for several threads; neither this nor the number
// of threads decides how rows and sums are cut.
extern "C" void fraqat_gradient_product(const GradientProduct* product) {
  const GradientProduct& p = *product;
  const int64_t num_rows = rows_of(p), depth = depth_of(p), num_blocks = ceil_div(p.num_inputs, kBlock);
  const int64_t pass_depth = ceil_div(ceil_div(depth, ceil_div(depth, kPassDepth)), kDepth) * kDepth;
  const int64_t most_rows = std::max(kBlock, kLeftBytes / (2 * pass_depth) / kBlock * kBlock);
  const int64_t row_parts = ceil_div(num_rows, most_rows);
  const int64_t rows = ceil_div(ceil_div(num_rows, row_parts), kBlock) * kBlock;
  const int64_t group = std::clamp<int64_t>(kRightBytes / column_bytes_of(p) / 2 * 2, 2, num_blocks);
  const int64_t wanted = p.num_threads == 1 ? 1 : std::max<int64_t>(1, ceil_div(4 * p.num_threads, row_parts));
  const int64_t blocks = ceil_div(group, wanted), block_parts = ceil_div(group, blocks);
  const int64_t sum_blocks = rows / kBlock * (pass_depth < depth ? blocks : 1);
  const auto convert_blocks = p.is_unsigned ? convert<uint8_t> : convert<int8_t>;
  const auto multiply_part = p.grad_is_bfloat16 ? multiply_for<uint16_t>(p) : multiply_for<float>(p);
  uint8_t* const right = right_scratch.at_least(group * column_bytes_of(p));
#pragma omp parallel num_threads(p.num_threads)
  {
    configure_tiles();
    uint8_t* const left = left_scratch.at_least(rows * pass_depth * 2);
    float* const sums = reinterpret_cast<float*>(sums_scratch.at_least(sum_blocks * kBlock * kBlock * sizeof(float)));
    for (int64_t first = 0; first < num_blocks; first += group) {
      const int64_t end = std::min(first + group, num_blocks);
#pragma omp for
      for (int64_t block = first; block < end; block += 2)
        convert_blocks(p, block, std::min<int64_t>(2, end - block), right + (block - first) * column_bytes_of(p));
      finish_writing(right);
#pragma omp for schedule(dynamic)
      for (int64_t index = 0; index < row_parts * block_parts; ++index) {
        const int64_t row = index / block_parts * rows, block = first + index % block_parts * blocks;
        if (row >= num_rows || block >= end) continue;
        const Part part{row, std::min(row + rows, num_rows), block, std::min(block + blocks, end), 0, 0};
        multiply_part(p, part, pass_depth, right, first, left, sums);
      }
    }
    _mm_sfence();
    _tile_release();
  }
}
