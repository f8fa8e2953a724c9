// bfloat16 x bfloat16 -> float32 product on AVX512_BF16: both operands are packed into cache-sized panels of
// depth pairs (the unit of vdpbf16ps), and a register tile of 14 x 32 outputs runs over them.
//
// An output is one chain of vdpbf16ps per depth block, the blocks added in order; neither the tile it falls in,
// nor the thread, nor the strides change that chain. As everywhere in that instruction, subnormals count as zero.
#include <cstddef>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <utility>

#include "../gemm.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : defined(__GNUC__) && __GNUC__ >= 10)
#define KD_GEMM_BF16
// Only functions so marked use AVX-512: the file needs no flags, and the library loads on other processors.
#define KD_AVX512 __attribute__((target("avx512f,avx512bf16,avx512bw,avx512vl,avx512dq")))
#ifdef __clang__
#define KD_UNROLL _Pragma("unroll")
#else
#define KD_UNROLL _Pragma("GCC unroll 16")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's intrinsics read what they leave undefined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace kd {

#ifndef KD_GEMM_BF16

bool gemm_bf16_available() { return false; }
void gemm_bf16(const GemmBf16&) { throw std::runtime_error("gemm_bf16: built without AVX512_BF16"); }

#else

namespace {

using i64 = int64_t;

// Blocking, measured on Zen 4 (32 KB of L1 and 1 MB of L2 a core), in 32-bit words: a pair of bfloat16 or a float32.
// Blocks of 28 to 504 rows and depths of 1024 and 2048 run within 2 % of each other, since a tile reads 184 bytes
// in the 28 cycles of its arithmetic, which L2 supplies easily; a depth of 512 is 2 to 3 % slower. So blocks are
// low, to divide a small m evenly among threads. Packed b of 1 or 2 MB is best: at 8 MB, d hidden and row-major
// logits are 5 to 10 % slower, as L3 no longer holds it beside what streams through; less means more barriers.
constexpr i64 kLanes = 16;     // words of a vector
constexpr i64 kTileRows = 14;  // 28 registers accumulate, 2 hold b, 1 an element of a
constexpr i64 kTileCols = 2 * kLanes;
constexpr i64 kDepthPairs = 512;              // of a depth block, at most
constexpr i64 kBlockRows = 6 * kTileRows;     // packed a: 172 KB per thread
constexpr i64 kSharedWords = i64{1} << 19;    // packed b: 2 MB, shared
constexpr i64 kUnitCols = 4 * kLanes;         // of b, packed by one thread at a time: two cache lines of a row
constexpr i64 kChunk = 16;                    // pairs packed at a time
constexpr i64 kWorkPerThread = i64{1} << 18;  // products that pay for waking another thread

constexpr i64 least(i64 x, i64 y) { return x < y ? x : y; }
constexpr i64 most(i64 x, i64 y) { return x > y ? x : y; }
constexpr i64 parts(i64 total, i64 size) { return (total + size - 1) / size; }
constexpr i64 start(i64 total, i64 part, i64 count) { return total * part / count; }  // of an even split

// Rows of a, or columns of b: `lanes` of them, each k deep. One of the strides is 1.
struct Operand {
  const uint16_t* at;
  i64 lane, depth;
  i64 lanes, k;
  Operand part(i64 lane0, i64 most_lanes, i64 k0, i64 most_k) const {
    return {at + lane0 * lane + k0 * depth, lane, depth, least(most_lanes, lanes - lane0), least(most_k, k - k0)};
  }
};

KD_AVX512 inline __mmask16 first16(i64 n) { return static_cast<__mmask16>((1u << most(0, least(n, 16))) - 1); }
KD_AVX512 inline __mmask32 first32(i64 n) { return static_cast<__mmask32>((1ull << most(0, least(n, 32))) - 1); }

// out[p * width + i] = elements 2p and 2p + 1 of lane i, for 16 lanes and up to 16 pairs, zero outside the operand.
// All 16 words are written whatever the width, hence in ascending order of p.
KD_AVX512 void pack_across(const Operand& s, uint32_t* out, i64 width) {
  const __mmask16 keep = first16(s.lanes);
  for (i64 p = 0; p < kChunk && 2 * p < s.k; ++p) {
    const uint16_t* row = s.at + 2 * p * s.depth;
    // Rows lie too far apart for the hardware to prefetch: without these two, d hidden takes 6 % longer.
    __builtin_prefetch(row + 4 * kChunk * s.depth);
    __builtin_prefetch(row + (4 * kChunk + 1) * s.depth);
    const __m256i even = _mm256_maskz_loadu_epi16(keep, row);
    const __m256i odd = 2 * p + 1 < s.k ? _mm256_maskz_loadu_epi16(keep, row + s.depth) : _mm256_setzero_si256();
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
    _mm512_storeu_si512(out + p * width, _mm512_or_si512(high, _mm512_cvtepu16_epi32(even)));
  }
}

// The same where a lane is contiguous, and so its pairs are: a transposition of 16 x 16 words.
KD_AVX512 void pack_along(const Operand& s, uint32_t* out, i64 width) {
  const __mmask32 keep = first32(s.k);
  __m512i r[16], t[16];
  KD_UNROLL
  for (int i = 0; i < 16; ++i)
    r[i] = i < s.lanes ? _mm512_maskz_loadu_epi16(keep, s.at + i * s.lane) : _mm512_setzero_si512();
  KD_UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  KD_UNROLL
  for (int i = 0; i < 16; i += 4) {  // quarter q of r[i + c] becomes pair 4q + c of lanes i to i + 3
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  KD_UNROLL
  for (int p = 0; p < 4; ++p) {  // t[p] becomes pairs p, p + 8 of lanes 0 to 7; t[p + 8] of lanes 8 to 15
    t[p] = _mm512_shuffle_i32x4(r[p], r[p + 4], 0x88);
    t[p + 4] = _mm512_shuffle_i32x4(r[p], r[p + 4], 0xdd);
    t[p + 8] = _mm512_shuffle_i32x4(r[p + 8], r[p + 12], 0x88);
    t[p + 12] = _mm512_shuffle_i32x4(r[p + 8], r[p + 12], 0xdd);
  }
  KD_UNROLL
  for (int p = 0; p < 8; ++p) {
    r[p] = _mm512_shuffle_i32x4(t[p], t[p + 8], 0x88);
    r[p + 8] = _mm512_shuffle_i32x4(t[p], t[p + 8], 0xdd);
  }
  KD_UNROLL
  for (int p = 0; p < 16; ++p)
    if (2 * p < s.k) _mm512_storeu_si512(out + p * width, r[p]);
}

// Strip i, at out + i * strip, holds `step` lanes from i * step on: pair after pair, `width` words for each.
void pack(const Operand& s, i64 step, uint32_t* out, i64 width, i64 strip) {
  const i64 strips = parts(s.lanes, step);
  const auto block = [&](i64 i, i64 k0) { return s.part(i * step, step, k0, s.k); };
  const auto place = [&](i64 i, i64 k0) { return out + i * strip + k0 / 2 * width; };
  if (s.depth == 1) {
    for (i64 i = 0; i < strips; ++i)
      for (i64 k0 = 0; k0 < s.k; k0 += 2 * kChunk) pack_along(block(i, k0), place(i, k0), width);
  } else {
    for (i64 k0 = 0; k0 < s.k; k0 += 2 * kChunk)
      for (i64 i = 0; i < strips; ++i) pack_across(block(i, k0), place(i, k0), width);
  }
}

struct Tile {
  const uint32_t *a, *b0, *b1;  // a strip of a, two of b
  i64 pairs;
  float* c;
  i64 ldc, cols;
  bool add;
};

template <int Rows>
KD_AVX512 void multiply(const Tile& t) {
  __m512 acc[Rows][2];
  KD_UNROLL
  for (int i = 0; i < Rows; ++i) {
    KD_UNROLL
    for (int j = 0; j < 2; ++j) {
      acc[i][j] = _mm512_setzero_ps();
      __builtin_prefetch(t.c + i * t.ldc + j * kLanes, 1);  // c arrives during the sum; 3 to 5 % at k = 256
    }
  }
  const uint32_t *a = t.a, *b0 = t.b0, *b1 = t.b1;
  for (i64 p = 0; p < t.pairs; ++p, a += kTileRows, b0 += kLanes, b1 += kLanes) {
    const __m512bh right[2] = {(__m512bh)_mm512_load_si512(b0), (__m512bh)_mm512_load_si512(b1)};
    KD_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], left, right[0]);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], left, right[1]);
    }
  }
  const __mmask16 keep[2] = {first16(t.cols), first16(t.cols - kLanes)};
  KD_UNROLL
  for (int i = 0; i < Rows; ++i) {
    KD_UNROLL
    for (int j = 0; j < 2; ++j) {
      float* c = t.c + i * t.ldc + j * kLanes;
      if (t.add) acc[i][j] = _mm512_add_ps(_mm512_maskz_loadu_ps(keep[j], c), acc[i][j]);
      _mm512_mask_storeu_ps(c, keep[j], acc[i][j]);
    }
  }
}

template <size_t... I>
void multiply_rows(std::index_sequence<I...>, i64 rows, const Tile& tile) {
  static constexpr void (*kernels[])(const Tile&) = {multiply<static_cast<int>(I) + 1>...};
  kernels[rows - 1](tile);
}

// Grows and stays, one per calling thread: fresh pages at every call would cost more than filling them.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(at_); }
  uint32_t* reserve(i64 words) {
    if (words > words_) {
      std::free(at_);
      words_ = 0;
      at_ = static_cast<uint32_t*>(std::aligned_alloc(4096, static_cast<size_t>(parts(words, 1024)) * 4096));
      if (!at_) throw std::bad_alloc();
      words_ = words;
    }
    return at_;
  }

 private:
  uint32_t* at_ = nullptr;
  i64 words_ = 0;
};

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace

bool gemm_bf16_available() {
  static const bool yes = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return yes;
}

void gemm_bf16(const GemmBf16& g) {
  if (g.m <= 0 || g.n <= 0) return;
  if (g.k <= 0) {
    for (i64 i = 0; i < g.m && !g.accumulate; ++i)
      for (i64 j = 0; j < g.n; ++j) g.c[i * g.ldc + j] = 0.0f;
    return;
  }
  const Operand a{g.a, g.a_row, g.a_col, g.m, g.k}, b{g.b, g.b_col, g.b_row, g.n, g.k};
  const i64 threads = most(1, least(g.threads, g.m * g.n * g.k / kWorkPerThread));

  // A step packs `depths` blocks of `pairs` pairs of `cols` columns of b, together, and then multiplies.
  const i64 all_depths = parts(g.k, 2 * kDepthPairs), pairs = parts(parts(g.k, all_depths), 2);
  const i64 cols = least(parts(g.n, kTileCols), kSharedWords / (pairs * kTileCols)) * kTileCols;
  const i64 depths = least(all_depths, kSharedWords / (pairs * cols));

  // A task is a block of rows, by all columns unless there are fewer blocks than threads.
  const i64 row_blocks = least(parts(parts(g.m, kBlockRows), threads) * threads, parts(g.m, kTileRows));
  const i64 col_splits = parts(threads, row_blocks);

  const i64 a_strip = parts(kTileRows * pairs + 2, kLanes) * kLanes;  // pack_across runs over by 16 - 14 words
  const i64 b_strip = kLanes * pairs;
  const i64 a_words = kBlockRows / kTileRows * a_strip, b_words = cols / kLanes * b_strip;
  static thread_local Workspace workspace;
  uint32_t* const packed_b = workspace.reserve(depths * b_words + threads * a_words);

#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    uint32_t* const packed_a = packed_b + depths * b_words + thread_index() * a_words;
    for (i64 d0 = 0; d0 < all_depths; d0 += depths) {
      for (i64 n0 = 0; n0 < g.n; n0 += cols) {
        const i64 d1 = least(all_depths, d0 + depths), n1 = least(g.n, n0 + cols);
        const i64 units = parts(n1 - n0, kUnitCols), tiles = parts(n1 - n0, kTileCols);
#pragma omp for schedule(dynamic, 1)
        for (i64 unit = 0; unit < (d1 - d0) * units; ++unit) {
          const i64 d = unit / units, n = unit % units * kUnitCols;
          pack(b.part(n0 + n, least(kUnitCols, n1 - n0 - n), (d0 + d) * 2 * pairs, 2 * pairs), kLanes,
               packed_b + d * b_words + n / kLanes * b_strip, kLanes, b_strip);
        }
#pragma omp for schedule(dynamic, 1)
        for (i64 task = 0; task < row_blocks * col_splits; ++task) {
          const i64 block = task / col_splits, split = task % col_splits;
          const i64 m0 = start(g.m, block, row_blocks), rows = start(g.m, block + 1, row_blocks) - m0;
          const i64 height = parts(rows, parts(rows, kTileRows));  // no tile much lower than another
          for (i64 d = d0; d < d1; ++d) {
            const Operand strips = a.part(m0, rows, d * 2 * pairs, 2 * pairs);
            pack(strips, height, packed_a, kTileRows, a_strip);
            for (i64 q = start(tiles, split, col_splits); q < start(tiles, split + 1, col_splits); ++q) {
              const i64 n = n0 + q * kTileCols;
              const uint32_t* const panel = packed_b + (d - d0) * b_words + 2 * q * b_strip;
              for (i64 i = 0; i * height < rows; ++i) {
                const Tile tile{packed_a + i * a_strip,
                                panel,
                                panel + b_strip,
                                parts(strips.k, 2),
                                g.c + (m0 + i * height) * g.ldc + n,
                                g.ldc,
                                n1 - n,
                                g.accumulate || d > 0};
                multiply_rows(std::make_index_sequence<kTileRows>(), least(height, rows - i * height), tile);
              }
            }
          }
        }
      }
    }
  }
}

#endif

}  // namespace kd
