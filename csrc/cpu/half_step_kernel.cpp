// The half_step kernel for one instruction set: a product with few rows, which reads the shared kernel once for several
// problems at a time, and divides what it has summed while that is in registers.
#include "../half_step.h"
#include "isa.h"
#include "lanes.h"
#include "strip.h"

namespace kd {
namespace KD_ISA {
namespace {

// Sums in registers: rows of the kernel by problems, and, transposed, problems by vectors of columns.
constexpr bool kManyRegisters = kVectorBytes == 64;
constexpr int kRows = 4, kProblems = kManyRegisters ? 4 : 2;
constexpr int kColumnVectors = kManyRegisters ? 3 : 2, kColumnProblems = kManyRegisters ? 8 : 4;
// Sums of many rows are made of sums of few, which rounds less.
constexpr int64_t kFewRows = 64, kAhead = 16;

template <class T>
class HalfStepRunner {
  using V = Vec<T>;
  static constexpr int64_t kColumns = kColumnVectors * V::kLanes;

 public:
  static int64_t strips(const HalfStep& args) {
    return args.transposed ? (args.m + kColumns - 1) / kColumns : (args.n + kRows - 1) / kRows;
  }

  explicit HalfStepRunner(const HalfStep& args)
      : args_(args),
        kernel_(static_cast<const T*>(args.kernel)),
        x_(static_cast<const T*>(args.x)),
        weight_(static_cast<const T*>(args.weight)),
        extra_(static_cast<const T*>(args.extra)),
        out_(static_cast<T*>(args.out)) {}

  void run(int64_t strip) {
    if (args_.transposed) {
      const int64_t first = strip * kColumns, end = first + kColumns < args_.m ? first + kColumns : args_.m;
      if (end - first == kColumns) {
        columns<kColumnVectors>(first, V::kLanes);
        return;
      }
      for (int64_t j = first; j < end; j += V::kLanes) columns<1>(j, end - j < V::kLanes ? end - j : V::kLanes);
    } else {
      const int64_t first = strip * kRows, left = args_.n - first;
      if (left >= kRows) {
        rows<kRows>(first);
      } else {
        for (int64_t i = first; i < args_.n; ++i) rows<1>(i);
      }
    }
  }

 private:
  template <int height>
  void rows(int64_t i) {
    int64_t problem = 0;
    for (; problem + kProblems <= args_.count; problem += kProblems) products<height, kProblems>(i, problem);
    for (; problem < args_.count; ++problem) products<height, 1>(i, problem);
  }

  template <int height, int problems>
  void products(int64_t i, int64_t problem) {
    const T *kernel = kernel_ + i * args_.ld, *x = x_ + problem * args_.x_ld;
    V sums[problems][height];
    for (int p = 0; p < problems; ++p)
      for (int r = 0; r < height; ++r) sums[p][r] = V(0.0);
    const auto add = [&](auto load, int64_t j) {
      V k[height];
#pragma GCC unroll 4
      for (int r = 0; r < height; ++r) k[r] = load(kernel + r * args_.ld + j);
#pragma GCC unroll 4
      for (int p = 0; p < problems; ++p) {
        const V of_problem = load(x + p * args_.x_ld + j);
#pragma GCC unroll 4
        for (int r = 0; r < height; ++r) sums[p][r] = fma(k[r], of_problem, sums[p][r]);
      }
    };
    const int64_t whole = args_.m / V::kLanes * V::kLanes, left = args_.m - whole;
    for (int64_t j = 0; j < whole; j += V::kLanes) add([](const T* at) { return V::load(at); }, j);
    if (left > 0) add([left](const T* at) { return load_some(at, left); }, whole);
    T sum_of[height * problems > V::kLanes ? height * problems : V::kLanes];
    sum_lanes_of_many<height * problems, V::kLanes>(&sums[0][0], sum_of);
    for (int p = 0; p < problems; ++p) finish<height>(sum_of + p * height, problem + p, i);
  }

  // `width` lanes of the last vector are columns.
  template <int vectors>
  void columns(int64_t j, int64_t width) {
    int64_t problem = 0;
    for (; problem + kColumnProblems <= args_.count; problem += kColumnProblems)
      combinations<vectors, kColumnProblems>(j, width, problem);
    for (; problem + kColumnProblems / 2 <= args_.count; problem += kColumnProblems / 2)
      combinations<vectors, kColumnProblems / 2>(j, width, problem);
    for (; problem < args_.count; ++problem) combinations<vectors, 1>(j, width, problem);
  }

  template <int vectors, int problems>
  void combinations(int64_t j, int64_t width, int64_t problem) {
    const T *kernel = kernel_ + j, *x = x_ + problem * args_.x_ld;
    const bool whole = width == V::kLanes;
    V totals[problems][vectors];
    for (int p = 0; p < problems; ++p)
      for (int w = 0; w < vectors; ++w) totals[p][w] = V(0.0);
    for (int64_t first = 0; first < args_.n; first += kFewRows) {
      const int64_t end = first + kFewRows < args_.n ? first + kFewRows : args_.n;
      V sums[problems][vectors];
      for (int p = 0; p < problems; ++p)
        for (int w = 0; w < vectors; ++w) sums[p][w] = V(0.0);
      for (int64_t i = first; i < end; ++i) {
        V k[vectors];
        // Rows stand on pages of their own, across which the hardware does not look ahead.
#pragma GCC unroll 4
        for (int w = 0; w < vectors; ++w) __builtin_prefetch(kernel + (i + kAhead) * args_.ld + w * V::kLanes);
#pragma GCC unroll 4
        for (int w = 0; w < vectors; ++w) {
          const T* at = kernel + i * args_.ld + w * V::kLanes;
          k[w] = whole ? V::load(at) : load_some(at, width);
        }
#pragma GCC unroll 8
        for (int p = 0; p < problems; ++p) {
          const V of_problem(static_cast<double>(x[p * args_.x_ld + i]));
#pragma GCC unroll 4
          for (int w = 0; w < vectors; ++w) sums[p][w] = fma(of_problem, k[w], sums[p][w]);
        }
      }
      for (int p = 0; p < problems; ++p)
        for (int w = 0; w < vectors; ++w) totals[p][w] = totals[p][w] + sums[p][w];
    }
    for (int p = 0; p < problems; ++p)
      for (int w = 0; w < vectors; ++w) {
        const int64_t column = j + w * V::kLanes;
        T sum_of[V::kLanes];
        totals[p][w].store(sum_of);
        if (whole) {
          finish<V::kLanes>(sum_of, problem + p, column);
        } else {
          for (int64_t lane = 0; lane < width; ++lane) finish<1>(sum_of + lane, problem + p, column + lane);
        }
      }
  }

  // The sums of `size` entries side by side.
  template <int size>
  KD_INLINE void finish(const T* sum_of, int64_t problem, int64_t entry) const {
    const T* weight = weight_ + problem * args_.weight_ld + entry;
    T* out = out_ + problem * args_.out_ld + entry;
#pragma GCC unroll 16
    for (int i = 0; i < size; ++i) {
      if (!args_.divide) {
        out[i] = weight[i] * sum_of[i];
        continue;
      }
      const T denominator = sum_of[i] + (extra_ ? extra_[entry + i] : T(0));
      out[i] = weight[i] == 0 || denominator == 0 ? T(0) : weight[i] / denominator;
    }
  }

  const HalfStep& args_;
  const T *kernel_, *x_, *weight_, *extra_;
  T* out_;
};

template <class T>
void run(const HalfStep& args) {
  const double products = static_cast<double>(args.count) * static_cast<double>(args.n) * static_cast<double>(args.m);
  // A product takes a fraction of the time that a strip's usual entry does.
  run_strips<HalfStepRunner<T>>(HalfStepRunner<T>::strips(args), products / 16.0, args.threads, args);
}

}  // namespace

void half_step(const HalfStep& args) {
  if (args.wide) {
    run<double>(args);
  } else {
    run<float>(args);
  }
}

}  // namespace KD_ISA
}  // namespace kd
