// The pairwise_l1 kernel for one instruction set. A tile of the vocabulary, of the rows of a few whole groups, becomes
// probabilities, which the L2 cache holds up to some 120 rows; small blocks of row pairs then go through it in
// registers. The vocabulary is cut into sections, each one thread's, whose sums are added up in order; where those
// would take too much memory, threads share a tile instead and take whole pairs, or whole rows of the gradient. No sum
// depends on their number.
#include <omp.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "../pairwise_l1.h"
#include "isa.h"
#include "strip.h"

namespace kd {
namespace KD_ISA {
namespace {

template <class T>
constexpr int kTile = kSteps * kLanes<T>;
// From row to row: not a power of 2, or the same entry of all rows would fall on one set of the cache.
template <class T>
constexpr int kTileStride = kTile<T> + 64 / static_cast<int>(sizeof(T));

// Pairs in registers at once: two sums of each, or one sum of two vectors.
constexpr int kOwn = kVectorBytes == 64 ? 4 : 2;
constexpr int kOthers = 2;

// 1, -1 or 0; of NaN 1 or -1.
#if defined(__AVX512F__)
constexpr int kFirstAndSecondOrThird = 0xEA;  // of three operands' bits, as ternary logic is told
KD_INLINE Vec<float> sign(Vec<float> x) {
  const __m512i minus = _mm512_castps_si512((-Vec<float>(0.0)).v), one = _mm512_castps_si512(Vec<float>(1.0).v);
  const __mmask16 apart = _mm512_cmp_ps_mask(x.v, Vec<float>(0.0).v, _CMP_NEQ_UQ);
  return {_mm512_castsi512_ps(
      _mm512_maskz_ternarylogic_epi32(apart, _mm512_castps_si512(x.v), minus, one, kFirstAndSecondOrThird))};
}
KD_INLINE Vec<double> sign(Vec<double> x) {
  const __m512i minus = _mm512_castpd_si512((-Vec<double>(0.0)).v), one = _mm512_castpd_si512(Vec<double>(1.0).v);
  const __mmask8 apart = _mm512_cmp_pd_mask(x.v, Vec<double>(0.0).v, _CMP_NEQ_UQ);
  return {_mm512_castsi512_pd(
      _mm512_maskz_ternarylogic_epi64(apart, _mm512_castpd_si512(x.v), minus, one, kFirstAndSecondOrThird))};
}
#else
template <class T>
KD_INLINE Vec<T> sign(Vec<T> x) {
  const Vec<T> zero(0.0);
  const auto magnitude = to_bits(Vec<T>(1.0));
  return select(x == zero, zero, from_bits<T>((to_bits(x) & to_bits(-zero)) | magnitude));
}
#endif

template <class T>
KD_INLINE double total(Vec<T> x) {
  T lanes[Vec<T>::kLanes];
  x.store(lanes);
  double sums[4] = {};
  for (int i = 0; i < Vec<T>::kLanes; ++i) sums[i % 4] += static_cast<double>(lanes[i]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Rows of one side of a group that are taken together; past the last one, the last one again.
template <class T, int kRows>
struct RowBlock {
  const T* at[kRows];

  RowBlock(const T* tile, int64_t first, int64_t stop) {
    for (int r = 0; r < kRows; ++r) at[r] = tile + (first + r < stop ? first + r : stop - 1) * kTileStride<T>;
  }
};

struct PairSums {
  double cost[kOwn][kOthers], signs[kOwn][kOthers];
};

template <class T, bool kSigns>
void sum_pairs(const RowBlock<T, kOwn>& p, const RowBlock<T, kOthers>& q, int entries, PairSums& sums) {
  using V = Vec<T>;
  V cost[kOwn][kOthers], signs[kOwn][kOthers];
  for (int i = 0; i < kOwn; ++i) {
    for (int j = 0; j < kOthers; ++j) cost[i][j] = signs[i][j] = V(0.0);
  }
  for (int at = 0; at < entries; at += V::kLanes) {
    V others[kOthers];
#pragma GCC unroll 4
    for (int j = 0; j < kOthers; ++j) others[j] = V::load(q.at[j] + at);
#pragma GCC unroll 4
    for (int i = 0; i < kOwn; ++i) {
      const V own = V::load(p.at[i] + at);
#pragma GCC unroll 4
      for (int j = 0; j < kOthers; ++j) {
        const V difference = own - others[j], direction = sign(difference);
        cost[i][j] = fma(difference, direction, cost[i][j]);
        if (kSigns) signs[i][j] = fma(own, direction, signs[i][j]);
      }
    }
  }
  for (int i = 0; i < kOwn; ++i) {
    for (int j = 0; j < kOthers; ++j) {
      sums.cost[i][j] = total(cost[i][j]);
      if (kSigns) sums.signs[i][j] = total(signs[i][j]);
    }
  }
}

// Adds up sum_j weights[j][i] sign(own_i - other_j) for kOwn rows, entry by entry.
template <class T>
void sum_signs(const RowBlock<T, kOwn>& own, const T* others, const T* weights, int64_t count, int entries, T* out) {
  using V = Vec<T>;
  constexpr int kVectors = 2;  // of a row: kLanes is at least two vectors wide
  for (int at = 0; at < entries; at += kVectors * V::kLanes) {
    V mine[kOwn][kVectors], sums[kOwn][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kOwn; ++i) {
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; ++part) {
        mine[i][part] = V::load(own.at[i] + at + part * V::kLanes);
        sums[i][part] = V(0.0);
      }
    }
    const T* other = others + at;
    for (int64_t j = 0; j < count; ++j, other += kTileStride<T>) {
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; ++part) {
        const V theirs = V::load(other + part * V::kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kOwn; ++i) {
          const V weight(static_cast<typename V::Native>(typename V::Native{} + weights[j * kOwn + i]));
          sums[i][part] = fma(weight, sign(mine[i][part] - theirs), sums[i][part]);
        }
      }
    }
    for (int i = 0; i < kOwn; ++i) {
      for (int part = 0; part < kVectors; ++part) sums[i][part].store(out + i * kTile<T> + at + part * V::kLanes);
    }
  }
}

// One model's rows: to probabilities, and gradients back.
template <class T>
class Model : Strip<T> {
  using V = Vec<T>;

 public:
  Model(const Side& side, const double* statistics, const PairwiseL1& args)
      : Strip<T>(side, args.n, args.vocab), side_(side), statistics_(statistics) {}

  bool wants_gradient() const { return side_.grad != nullptr; }

  // Returns how many entries are filled: whole segments, with zeros at the end.
  int fill(int64_t row, int64_t v, T* target) {
    if (row + 1 < this->n_) ask_for<0>(side_.logits, side_.dtype, side_.offsets[row + 1] + v, v);
    this->move_to(row);
    const int entries = this->load(side_, v, z_) * kLanes<T>;
    const V max(statistics_[row * kPairwiseColumns + kPairwiseMax]), inverse(1.0 / side_.temperature[row]);
    // Not exp(x - logz): that difference would round to a larger number's last digit.
    const V share(__builtin_exp(-statistics_[row * kPairwiseColumns + kPairwiseLogz]));
    for (int at = 0; at < entries; at += V::kLanes)
      (exp((V::load(z_.at + at) - max) * inverse) * share).store(target + at);
    return entries;
  }

  void expect_gradient(int64_t row, int64_t v) const {
    ask_for<1>(side_.grad, side_.grad_dtype, side_.grad_offsets[row] + v, v);
  }

  // From the row's probabilities and the sums of signs, which it overwrites.
  void store_gradient(int64_t row, int64_t v, int entries, const T* p, double mean, bool live, T* sums) {
    this->move_to(row);
    if (side_.softcap != 0.0) this->load(side_, v, z_);
    const V means(mean), factor(side_.scale / side_.temperature[row]), zero(0.0);
    for (int at = 0; at < entries; at += V::kLanes) {
      const V gradient = V::load(p + at) * (V::load(sums + at) - means) * factor;
      (live ? gradient : zero).store(sums + at);
    }
    this->store(side_, v, z_, sums);
  }

 private:
  // A tile's part of a row, for the cache: the rows of a tile lie too far apart for the hardware to see what is next.
  template <int kToWrite>
  void ask_for(const void* base, Dtype dtype, int64_t first, int64_t v) const {
    const int64_t size = element_size(dtype), left = this->vocab_ - v;
    const char* at = static_cast<const char*>(base) + first * size;
    const char* const end = at + (left < kTile<T> ? left : int64_t{kTile<T>}) * size;
    for (; at < end; at += 64) __builtin_prefetch(at, kToWrite, 2);
  }

  const Side& side_;
  const double* statistics_;
  Block<T> z_;
};

// Memory is taken before a team starts: what is thrown within one cannot leave it.
struct Freed {
  void operator()(void* at) const { std::free(at); }
};

template <class Number>
std::unique_ptr<Number, Freed> owned(void* taken) {
  if (!taken) throw std::bad_alloc();
  return std::unique_ptr<Number, Freed>(static_cast<Number*>(taken));
}

// `pieces` times `size` numbers, which are whole cache lines.
template <class T>
std::unique_ptr<T, Freed> take(int64_t pieces, int64_t size) {
  return owned<T>(std::aligned_alloc(64, static_cast<size_t>(pieces * size) * sizeof(T)));
}

template <class T>
class PairwiseRunner {
 public:
  // Of each model in a tile: about `few`, and no fewer than the longest group has.
  static int64_t tile_rows(const PairwiseL1& args, int64_t few) {
    const int64_t most = args.longest > few ? args.longest : few;
    return most < args.n ? most : args.n;
  }
  static int64_t tile_size(int64_t rows) { return 2 * rows * kTileStride<T>; }
  // For each other row of a block of own ones.
  static int64_t weights_size(const PairwiseL1& args) { return (args.longest * kOwn / kLanes<T> + 1) * kLanes<T>; }

  PairwiseRunner(const PairwiseL1& args, unsigned phases, int64_t rows, T* tile, T* weights)
      : args_(args),
        phases_(phases),
        student_(args.student, args.student_statistics, args),
        teacher_(args.teacher, args.teacher_statistics, args),
        rows_(rows),
        p_(tile),
        q_(tile + rows * kTileStride<T>),
        weights_(weights) {}
  PairwiseRunner(const PairwiseRunner&) = delete;
  PairwiseRunner& operator=(const PairwiseRunner&) = delete;

  // The tiles from `first` to `last`, adding to cost and signs. With kTeam by every thread of the team at once, which
  // shares the tiles and waits for all of it at the end of each loop over rows.
  template <bool kTeam>
  void run(int64_t first, int64_t last, double* cost, double* signs) {
    for (int64_t v = first * kTile<T>; v < last * kTile<T> && v < args_.vocab; v += kTile<T>) {
      for (int64_t group = 0, stop; group < args_.groups; group = stop) {
        for (stop = group + 1; stop < args_.groups && args_.starts[stop + 1] - args_.starts[group] <= rows_;) ++stop;
        run_groups<kTeam>(group, stop, v, cost, signs);
      }
    }
  }

 private:
  template <bool kTeam>
  void run_groups(int64_t first, int64_t last, int64_t v, double* cost, double* signs) {
    base_ = args_.starts[first];
    const int64_t blocks = (args_.longest + kOwn - 1) / kOwn, items = (last - first) * blocks;
    const int64_t rows = args_.starts[last] - base_, left = args_.vocab - v;
    const int entries = static_cast<int>(left < kTile<T> ? (left + kLanes<T> - 1) / kLanes<T> * kLanes<T>
                                                         : static_cast<int64_t>(kTile<T>));
    each<kTeam>(2 * rows, [&](int64_t row) {
      if (row < rows) {
        student_.fill(base_ + row, v, p_ + row * kTileStride<T>);
      } else {
        teacher_.fill(base_ + row - rows, v, q_ + (row - rows) * kTileStride<T>);
      }
    });
    if (phases_ & kTerms) {
      each<kTeam>(items,
                  [&](int64_t item) { add_terms(first + item / blocks, item % blocks * kOwn, entries, cost, signs); });
    }
    if ((phases_ & kGradient) == 0) return;
    each<kTeam>(2 * items, [&](int64_t item) {
      const int64_t group = first + item / 2 / blocks, own = item / 2 % blocks * kOwn;
      if (item % 2 == 0) {
        write_gradient(student_, p_, q_, group, own, v, entries, args_.longest, 1, args_.student_means);
      } else {
        write_gradient(teacher_, q_, p_, group, own, v, entries, 1, args_.longest, args_.teacher_means);
      }
    });
  }

  template <bool kTeam, class Work>
  static void each(int64_t count, const Work& work) {
    if (kTeam) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count; ++i) work(i);
    } else {
      for (int64_t i = 0; i < count; ++i) work(i);
    }
  }

  void add_terms(int64_t group, int64_t first, int entries, double* cost, double* signs) const {
    const int64_t start = args_.starts[group], stop = args_.starts[group + 1], count = stop - start;
    if (first >= count) return;
    const RowBlock<T, kOwn> own(p_, start - base_ + first, stop - base_);
    for (int64_t other = 0; other < count; other += kOthers) {
      const RowBlock<T, kOthers> others(q_, start - base_ + other, stop - base_);
      PairSums sums;
      (signs ? sum_pairs<T, true> : sum_pairs<T, false>)(own, others, entries, sums);
      for (int i = 0; i < kOwn && first + i < count; ++i) {
        for (int j = 0; j < kOthers && other + j < count; ++j) {
          const int64_t at = (group * args_.longest + first + i) * args_.longest + other + j;
          cost[at] += sums.cost[i][j];
          if (signs) signs[at] += sums.signs[i][j];
        }
      }
    }
  }

  // The weight of own row i and other row j stands at i own_step + j other_step of the group's d_cost.
  void write_gradient(Model<T>& model, const T* own_tile, const T* other_tile, int64_t group, int64_t first, int64_t v,
                      int entries, int64_t own_step, int64_t other_step, const double* means) {
    const int64_t start = args_.starts[group], stop = args_.starts[group + 1], count = stop - start;
    if (!model.wants_gradient() || first >= count) return;
    const double* d_cost = args_.d_cost + group * args_.longest * args_.longest;
    bool live[kOwn] = {};
    for (int64_t j = 0; j < count; ++j) {
      for (int i = 0; i < kOwn; ++i) {
        const double weight = first + i < count ? d_cost[(first + i) * own_step + j * other_step] : 0.0;
        weights_[j * kOwn + i] = static_cast<T>(weight);
        live[i] = live[i] || weight != 0.0;
      }
    }
    for (int i = 0; i < kOwn && first + i < count; ++i) model.expect_gradient(start + first + i, v);
    sum_signs(RowBlock<T, kOwn>(own_tile, start - base_ + first, stop - base_),
              other_tile + (start - base_) * kTileStride<T>, weights_, count, entries, sums_);
    for (int i = 0; i < kOwn && first + i < count; ++i) {
      const int64_t row = start + first + i;
      model.store_gradient(row, v, entries, own_tile + (row - base_) * kTileStride<T>, means[row], live[i],
                           sums_ + i * kTile<T>);
    }
  }

  const PairwiseL1& args_;
  const unsigned phases_;
  Model<T> student_, teacher_;
  const int64_t rows_;
  int64_t base_ = 0;  // the first row in the tile
  T *const p_, *const q_;
  T* const weights_;
  alignas(64) T sums_[kOwn * kTile<T>];
};

template <class T>
void run_shared(const PairwiseL1& args, unsigned phases, int64_t tiles, int threads) {
  using Runner = PairwiseRunner<T>;
  // Work enough for a team, which waits for all of it at the end.
  const int64_t rows = Runner::tile_rows(args, 2048), each = Runner::weights_size(args);
  const auto tile = take<T>(1, Runner::tile_size(rows)), weights = take<T>(threads, each);
#pragma omp parallel num_threads(threads)
  {
    Runner runner(args, phases, rows, tile.get(), weights.get() + omp_get_thread_num() * each);
    runner.template run<true>(0, tiles, args.cost, args.signs);
  }
}

// `sums`: [sections, cost and signs, pairs] zeros, or null without kTerms.
template <class T>
void run_sections(const PairwiseL1& args, unsigned phases, int64_t tiles, int64_t sections, int64_t pairs, double* sums,
                  int threads) {
  using Runner = PairwiseRunner<T>;
  const int64_t rows = Runner::tile_rows(args, 64);  // of both models half a MiB
  const int64_t size = Runner::tile_size(rows), each = Runner::weights_size(args);
  const auto own = take<T>(threads, size), weights = take<T>(threads, each);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    Runner runner(args, phases, rows, own.get() + thread * size, weights.get() + thread * each);
#pragma omp for schedule(dynamic, 1)
    for (int64_t section = 0; section < sections; ++section) {
      double* cost = sums ? sums + 2 * section * pairs : nullptr;
      runner.template run<false>(tiles * section / sections, tiles * (section + 1) / sections, cost,
                                 args.signs ? cost + pairs : nullptr);
    }
  }
  if (!sums) return;
  for (int64_t section = 0; section < sections; ++section) {
    const double* cost = sums + 2 * section * pairs;
    for (int64_t i = 0; i < pairs; ++i) args.cost[i] += cost[i];
    for (int64_t i = 0; args.signs && i < pairs; ++i) args.signs[i] += cost[pairs + i];
  }
}

template <class T>
void run(const PairwiseL1& args, unsigned phases) {
  constexpr int64_t kSections = 32, kMostSums = int64_t{8} << 20;  // numbers
  const int64_t tiles = (args.vocab + kTile<T> - 1) / kTile<T>, sections = tiles < kSections ? tiles : kSections;
  const int64_t pairs = args.groups * args.longest * args.longest;
  // Waking a team costs some microseconds: as long as one thread takes for this many differences.
  constexpr double kSmall = 1 << 16;
  const double differences =
      static_cast<double>(args.n) * static_cast<double>(args.longest) * static_cast<double>(args.vocab);
  const int threads = differences < kSmall ? 1 : args.threads;
  if (2 * sections * pairs > kMostSums) return run_shared<T>(args, phases, tiles, threads);
  std::unique_ptr<double, Freed> sums;
  if (phases & kTerms) sums = owned<double>(std::calloc(static_cast<size_t>(2 * sections * pairs + 1), sizeof(double)));
  run_sections<T>(args, phases, tiles, sections, pairs, sums.get(),
                  static_cast<int>(threads < sections ? threads : sections));
}

}  // namespace

void pairwise_l1(const PairwiseL1& args, unsigned phases) {
  if (args.student.dtype == Dtype::float64 || args.teacher.dtype == Dtype::float64) {
    run<double>(args, phases);
  } else {
    run<float>(args, phases);
  }
}

}  // namespace KD_ISA
}  // namespace kd
