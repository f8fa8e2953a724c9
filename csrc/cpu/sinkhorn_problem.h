// One transport problem in padded rows, and the walks over it that solving and its adjoints are made of.
// kd_kernels/problems.py and docs/sinkhorn.md have the formulas.
#pragma once
#include <cstdlib>
#include <new>

#include "../sinkhorn.h"
#include "convert.h"
#include "lanes.h"

namespace kd {
namespace KD_ISA {
namespace {

template <class T>
struct Buffer {
  explicit Buffer(int64_t size)
      : at(static_cast<T*>(std::aligned_alloc(kVectorBytes, bytes(size)))), size_(size), own_(at) {
    if (!at) throw std::bad_alloc();
    fill(0);
  }
  ~Buffer() { std::free(own_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void fill(T value) {
    for (int64_t i = 0; i < size_; ++i) at[i] = value;
  }

  T* at;

 private:
  // Whole vectors, which shall not straddle cache lines.
  static size_t bytes(int64_t size) {
    const size_t used = static_cast<size_t>(size > 0 ? size : 1) * sizeof(T);
    return (used + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
  }

  int64_t size_;
  T* own_;
};

// The least number of a row, 0 where all are infinite, and the largest finite one, no less than that. NaN is neither.
template <class T>
struct Range {
  T least, most;

  KD_INLINE Range(const T* row, int64_t size) {
    using V = Vec<T>;
    const V infinity(kInfinity<double>);
    V low = infinity, high = -infinity;
    for (int64_t j = 0; j < size; j += V::kLanes) {
      const V x = V::load(row + j);
      low = select(x < low, x, low);
      high = max_or_second(select(x < infinity, x, -infinity), high);
    }
    least = -largest_lane(-low);
    most = largest_lane(high);
    if (!(least < kInfinity<T>)) least = 0;
    if (!(most > least)) most = least;
  }
};

// Lengths are multiples of 2 vectors.
template <class T>
T dot(const T* x, const T* y, int64_t size) {
  using V = Vec<T>;
  V even(0.0), odd(0.0);
  for (int64_t j = 0; j < size; j += 2 * V::kLanes) {
    even = fma(V::load(x + j), V::load(y + j), even);
    odd = fma(V::load(x + j + V::kLanes), V::load(y + j + V::kLanes), odd);
  }
  return sum_lanes(even + odd);
}

template <class T>
void add_scaled(T* target, T scale, const T* x, int64_t size) {
  using V = Vec<T>;
  const V factor(static_cast<double>(scale));
  for (int64_t j = 0; j < size; j += V::kLanes) fma(factor, V::load(x + j), V::load(target + j)).store(target + j);
}

// Matrices have whole blocks of so many rows.
constexpr int64_t kBlockRows = 4;

// One walk over a matrix: each row's product with `v` becomes a number, row of_row(i, product), and the row times that
// number is added to `columns`. A block's rows share what is read of `v` and `columns`; sums of many rows are made of
// sums of few, in `part`.
template <class T, class OfRow>
void walk(const T* matrix, int64_t rows, int64_t padded, const T* v, T* part, T* columns, OfRow&& of_row) {
  using V = Vec<T>;
  constexpr int64_t kFewRows = 64;
  for (int64_t j = 0; j < padded; j += V::kLanes) {
    V(0.0).store(columns + j);
    V(0.0).store(part + j);
  }
  for (int64_t first = 0; first < rows; first += kBlockRows) {
    const T* block = matrix + first * padded;
    V even[kBlockRows], odd[kBlockRows];
    for (int64_t r = 0; r < kBlockRows; ++r) even[r] = odd[r] = V(0.0);
    for (int64_t j = 0; j < padded; j += 2 * V::kLanes) {
      const V low = V::load(v + j), high = V::load(v + j + V::kLanes);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kBlockRows; ++r) {
        even[r] = fma(V::load(block + r * padded + j), low, even[r]);
        odd[r] = fma(V::load(block + r * padded + j + V::kLanes), high, odd[r]);
      }
    }
    V weights[kBlockRows];
    for (int64_t r = 0; r < kBlockRows; ++r)
      weights[r] = V(first + r < rows ? static_cast<double>(of_row(first + r, sum_lanes(even[r] + odd[r]))) : 0.0);
    for (int64_t j = 0; j < padded; j += V::kLanes) {
      V sum = V::load(part + j);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kBlockRows; ++r) sum = fma(weights[r], V::load(block + r * padded + j), sum);
      sum.store(part + j);
    }
    if (first % kFewRows == kFewRows - kBlockRows || first + kBlockRows >= rows) {
      for (int64_t j = 0; j < padded; j += V::kLanes) {
        (V::load(columns + j) + V::load(part + j)).store(columns + j);
        V(0.0).store(part + j);
      }
    }
  }
}

// target += left' right: `left` [rank, tall], `right` [rank, padded], rows in whole blocks.
template <class T>
void add_product(T* target, const T* left, const T* right, int64_t rank, int64_t rows, int64_t tall, int64_t padded) {
  using V = Vec<T>;
  for (int64_t first = 0; first < rows; first += kBlockRows) {
    for (int64_t j = 0; j < padded; j += 2 * V::kLanes) {
      T* block = target + first * padded + j;
      V low[kBlockRows], high[kBlockRows];
#pragma GCC unroll 4
      for (int64_t r = 0; r < kBlockRows; ++r) {
        low[r] = V::load(block + r * padded);
        high[r] = V::load(block + r * padded + V::kLanes);
      }
      for (int64_t t = 0; t < rank; ++t) {
        const V x = V::load(right + t * padded + j), y = V::load(right + t * padded + j + V::kLanes);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kBlockRows; ++r) {
          const V factor(typename V::Native{} + left[t * tall + first + r]);
          low[r] = fma(factor, x, low[r]);
          high[r] = fma(factor, y, high[r]);
        }
      }
#pragma GCC unroll 4
      for (int64_t r = 0; r < kBlockRows; ++r) {
        low[r].store(block + r * padded);
        high[r].store(block + r * padded + V::kLanes);
      }
    }
  }
}

// exp(phi + psi - cost / epsilon); 0 where an entry is absent or the pair forbidden.
template <class T>
KD_INLINE Vec<T> plan_entry(Vec<T> phi, Vec<T> psi, Vec<T> scaled) {
  return exp((phi + psi) - scaled);
}

// plan * x, 0 where the plan is, whatever x holds there.
template <class T>
KD_INLINE Vec<T> times_plan(Vec<T> plan, Vec<T> x) {
  return select(plan == Vec<T>(0.0), plan, plan * x);
}

// The part of a call that belongs to one problem. Rows are padded to whole segments, matrices to whole blocks of rows,
// numbers of rows to whole segments (`tall_`); padding is absent.
template <class T>
class Transport {
 protected:
  explicit Transport(const Sinkhorn& args)
      : args_(args),
        n_(args.n),
        padded_(up(args.m, kLanes<T>)),
        height_(up(args.n, kBlockRows)),
        tall_(up(args.n, kLanes<T>)),
        b_(padded_) {}

  static int64_t up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

  void move_to(int64_t problem) {
    problem_ = problem;
    a_ = static_cast<const T*>(args_.a) + problem * n_;
    phi_ = static_cast<T*>(args_.phi) + problem * n_;
    psi_ = static_cast<T*>(args_.psi) + problem * args_.m;
    copy(static_cast<const T*>(args_.b) + problem * args_.m, args_.m, b_.at, T(0));
  }

  double epsilon() const { return args_.epsilons[args_.iterations - 1]; }

  // The logarithms that an iteration left, where they are kept.
  T* phi_after(int64_t step) const {
    return static_cast<T*>(args_.phi_history) + (problem_ * args_.iterations + step) * n_;
  }
  T* psi_after(int64_t step) const {
    return static_cast<T*>(args_.psi_history) + (problem_ * args_.iterations + step) * args_.m;
  }

  // `size` numbers and padding.
  void copy(const T* source, int64_t size, T* target, T padding) const {
    for (int64_t j = 0; j < padded_; ++j) target[j] = j < size ? source[j] : padding;
  }

  void load_row(const void* base, Dtype dtype, int64_t first, T* row) const {
    const int steps = static_cast<int>(padded_ / kLanes<T>);
    const BlockShape shape{first, kLanes<T>, steps, kLanes<T>,
                           static_cast<int>(args_.m - (steps - 1) * int64_t{kLanes<T>})};
    load_block(base, dtype, shape, row);
  }

  // A row of the cost; infinite where a column is absent.
  void load_cost(int64_t i, T* row) const {
    load_row(args_.cost, args_.cost_dtype, problem_ * args_.cost_batch + i * args_.cost_row, row);
    const Vec<T> zero(0.0), infinity(kInfinity<double>);
    for (int64_t j = 0; j < padded_; j += Vec<T>::kLanes)
      select(zero < Vec<T>::load(b_.at + j), Vec<T>::load(row + j), infinity).store(row + j);
  }

  static constexpr Dtype kDtype = sizeof(T) == 4 ? Dtype::float32 : Dtype::float64;
  // Logarithms of scalings become scalings.
  void exp_all(T* x, int64_t size) const {
    for (int64_t j = 0; j < size; j += Vec<T>::kLanes) exp(Vec<T>::load(x + j)).store(x + j);
  }

  int64_t at_row(int64_t i) const { return (problem_ * n_ + i) * args_.m; }
  // What arrives at the plan besides the transport cost; zeros where nothing does.
  void load_plan_cotangent(int64_t i, T* row) const {
    if (args_.d_plan) load_row(args_.d_plan, kDtype, at_row(i), row);
  }
  double number(const void* of_problems) const {
    return static_cast<double>(static_cast<const T*>(of_problems)[problem_]);
  }

  const Sinkhorn& args_;
  const int64_t n_, padded_, height_, tall_;
  Buffer<T> b_;
  int64_t problem_ = 0;
  const T* a_ = nullptr;
  T *phi_ = nullptr, *psi_ = nullptr;
};
}  // namespace
}  // namespace KD_ISA
}  // namespace kd
