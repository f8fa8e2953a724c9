// One transport problem in padded rows, and the two ways back from its plan: through all iterations, or by the linear
// system that the solution satisfies. kd_kernels/problems.py and docs/sinkhorn.md have the formulas.
#pragma once
#include <cstdlib>
#include <new>

#include "../sinkhorn.h"
#include "convert.h"

namespace kd {
namespace KD_ISA {
namespace {

template <class T>
struct Buffer {
  explicit Buffer(int64_t size)
      : at(static_cast<T*>(std::malloc(static_cast<size_t>(size > 0 ? size : 1) * sizeof(T)))), size_(size), own_(at) {
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
  int64_t size_;
  T* own_;
};

template <class T>
KD_INLINE T sum_lanes(Vec<T> x) {
  T lanes[Vec<T>::kLanes];
  x.store(lanes);
  T sum = 0;
  for (int i = 0; i < Vec<T>::kLanes; ++i) sum += lanes[i];
  return sum;
}

template <class T>
KD_INLINE T largest_lane(Vec<T> x) {
  T lanes[Vec<T>::kLanes];
  x.store(lanes);
  T max = lanes[0];
  for (int i = 1; i < Vec<T>::kLanes; ++i) max = lanes[i] > max ? lanes[i] : max;
  return max;
}

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

// The part of a call that belongs to one problem. Rows are padded to whole segments; padding is absent.
template <class T>
class Transport {
 protected:
  explicit Transport(const Sinkhorn& args)
      : args_(args), n_(args.n), padded_((args.m + kLanes<T> - 1) / kLanes<T> * kLanes<T>), b_(padded_) {}

  void move_to(int64_t problem) {
    problem_ = problem;
    a_ = static_cast<const T*>(args_.a) + problem * n_;
    phi_ = static_cast<T*>(args_.phi) + problem * n_;
    psi_ = static_cast<T*>(args_.psi) + problem * args_.m;
    copy(static_cast<const T*>(args_.b) + problem * args_.m, args_.m, b_.at, T(0));
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
  int64_t at_row(int64_t i) const { return (problem_ * n_ + i) * args_.m; }
  // What arrives at the plan besides the transport cost; zeros where nothing does.
  void load_plan_cotangent(int64_t i, T* row) const {
    if (args_.d_plan) load_row(args_.d_plan, kDtype, at_row(i), row);
  }
  double number(const void* of_problems) const {
    return static_cast<double>(static_cast<const T*>(of_problems)[problem_]);
  }

  const Sinkhorn& args_;
  const int64_t n_, padded_;
  Buffer<T> b_;
  int64_t problem_ = 0;
  const T* a_ = nullptr;
  T *phi_ = nullptr, *psi_ = nullptr;
};

template <class T>
class UnrolledAdjoint : Transport<T> {
  using Base = Transport<T>;
  using V = Vec<T>;
  using Base::a_, Base::args_, Base::at_row, Base::b_, Base::load_cost, Base::n_, Base::padded_;

 public:
  explicit UnrolledAdjoint(const Sinkhorn& args)
      : Base(args),
        scaled_(n_ * padded_),
        gradient_(n_ * padded_),
        least_(n_),
        d_phi_(n_),
        d_psi_(padded_),
        next_d_psi_(padded_),
        per_b_(padded_),
        psi_(padded_),
        before_(padded_),
        row_(padded_),
        plan_(padded_) {}

  void run(int64_t problem) {
    this->move_to(problem);
    begin();
    const bool scaling = to_scalings();
    T* d_a = static_cast<T*>(args_.d_a) + problem * n_;
    T* d_b = static_cast<T*>(args_.d_b) + problem * args_.m;
    for (int64_t i = 0; i < n_; ++i) d_a[i] = 0;
    for (int64_t j = 0; j < args_.m; ++j) d_b[j] = 0;
    for (int64_t step = args_.iterations - 1; step >= 0; --step) {
      for (int64_t j = 0; j < args_.m; ++j) d_b[j] += d_psi_.at[j];
      scaling ? back<true>(step, d_a) : back<false>(step, d_a);
    }
    for (int64_t i = 0; i < n_; ++i) {
      T* out = static_cast<T*>(args_.d_cost) + at_row(i);
      for (int64_t j = 0; j < args_.m; ++j) out[j] = a_[i] == 0 ? T(0) : gradient_.at[i * padded_ + j];
    }
  }

 private:
  double epsilon() const { return args_.epsilons[args_.iterations - 1]; }

  // From the plan to its potentials.
  void begin() {
    const V inverse(1.0 / epsilon()), weight(this->number(args_.d_transport));
    const T* d_phi = static_cast<const T*>(args_.d_phi) + this->problem_ * n_;
    this->copy(static_cast<const T*>(args_.d_psi) + this->problem_ * args_.m, args_.m, d_psi_.at, T(0));
    this->copy(Base::psi_, args_.m, psi_.at, -kInfinity<T>);
    for (int64_t i = 0; i < n_; ++i) {
      d_phi_.at[i] = 0;
      if (a_[i] == 0) continue;
      T *scaled = scaled_.at + i * padded_, *gradient = gradient_.at + i * padded_;
      load_cost(i, scaled);
      this->load_plan_cotangent(i, row_.at);
      const V phi(static_cast<double>(Base::phi_[i]));
      V sums(0.0);
      for (int64_t j = 0; j < padded_; j += V::kLanes) {
        const V cost = V::load(scaled + j), y = cost * inverse;
        y.store(scaled + j);
        const V plan = plan_entry(phi, V::load(psi_.at + j), y);
        const V through = times_plan(plan, fma(weight, cost, V::load(row_.at + j)));
        (weight * plan - through * inverse).store(gradient + j);
        (V::load(d_psi_.at + j) + through).store(d_psi_.at + j);
        sums = sums + through;
      }
      d_phi_.at[i] = d_phi[i] + sum_lanes(sums);
    }
  }

  const T* phi(int64_t step) const {
    return static_cast<const T*>(args_.phi_history) + (this->problem_ * args_.iterations + step) * n_;
  }
  const T* psi(int64_t step) const {
    return static_cast<const T*>(args_.psi_history) + (this->problem_ * args_.iterations + step) * args_.m;
  }

  // Where scalings have room, exponentials of the costs in the place of the costs: one for all iterations. Returns
  // whether they had.
  bool to_scalings() {
    if (args_.domain == kLogDomain) return false;
    T largest = 0;  // of all logarithms
    const auto meet = [&](T x) { largest = largest > x ? largest : x > -x ? x : -x; };
    for (int64_t i = 0; i < n_; ++i) {
      if (a_[i] == 0) continue;
      T least = kInfinity<T>;
      const T* scaled = scaled_.at + i * padded_;
      for (int64_t j = 0; j < padded_; ++j) least = scaled[j] < least ? scaled[j] : least;
      least_.at[i] = least < kInfinity<T> ? least : 0;
      for (int64_t j = 0; j < padded_; ++j)
        if (scaled[j] < kInfinity<T>) meet(scaled[j] - least_.at[i]);
      for (int64_t step = 0; step < args_.iterations; ++step) meet(phi(step)[i] - least_.at[i]);
    }
    for (int64_t step = 0; step < args_.iterations; ++step)
      for (int64_t j = 0; j < args_.m; ++j)
        if (b_.at[j] > 0) meet(psi(step)[j]);
    if (!(largest <= T(kScalingRoom))) return false;
    for (int64_t i = 0; i < n_; ++i) {
      if (a_[i] == 0) continue;
      T* scaled = scaled_.at + i * padded_;
      const V least(static_cast<double>(least_.at[i]));
      for (int64_t j = 0; j < padded_; j += V::kLanes) exp(least - V::load(scaled + j)).store(scaled + j);
    }
    return true;
  }

  template <bool kScaling>
  static KD_INLINE V entry(V row, V column, V scaled) {
    return kScaling ? (row * column) * scaled : plan_entry(row, column, scaled);
  }

  // Through one iteration: from d_phi_ and d_psi_ behind it to d_psi_ before it.
  template <bool kScaling>
  void back(int64_t step, T* d_a) {
    this->copy(psi(step), args_.m, psi_.at, -kInfinity<T>);
    if (step > 0) {
      this->copy(psi(step - 1), args_.m, before_.at, -kInfinity<T>);
    } else {
      for (int64_t j = 0; j < padded_; ++j) before_.at[j] = b_.at[j] > 0 ? T(0) : -kInfinity<T>;
    }
    for (int64_t j = 0; j < padded_; ++j) per_b_.at[j] = b_.at[j] > 0 ? d_psi_.at[j] / b_.at[j] : T(0);
    if (kScaling) {
      for (int64_t j = 0; j < padded_; j += V::kLanes) {
        exp(V::load(psi_.at + j)).store(psi_.at + j);
        exp(V::load(before_.at + j)).store(before_.at + j);
      }
    }
    next_d_psi_.fill(0);
    const V inverse(1.0 / epsilon());
    for (int64_t i = 0; i < n_; ++i) {
      if (a_[i] == 0) continue;
      const T* scaled = scaled_.at + i * padded_;
      T* gradient = gradient_.at + i * padded_;
      const double log_row = static_cast<double>(phi(step)[i]);
      const V own(kScaling ? __builtin_exp(log_row - static_cast<double>(least_.at[i])) : log_row);
      V sums(0.0);
      for (int64_t j = 0; j < padded_; j += V::kLanes) {
        const V column = entry<kScaling>(own, V::load(psi_.at + j), V::load(scaled + j)) * V::load(per_b_.at + j);
        column.store(plan_.at + j);
        sums = sums + column;
      }
      const T d_phi = d_phi_.at[i] - sum_lanes(sums);
      d_phi_.at[i] = 0;
      d_a[i] += d_phi;
      const V per_a(static_cast<double>(d_phi / a_[i]));
      for (int64_t j = 0; j < padded_; j += V::kLanes) {
        const V row = entry<kScaling>(own, V::load(before_.at + j), V::load(scaled + j)) * per_a;
        fma(V::load(plan_.at + j) + row, inverse, V::load(gradient + j)).store(gradient + j);
        (V::load(next_d_psi_.at + j) - row).store(next_d_psi_.at + j);
      }
    }
    for (int64_t j = 0; j < padded_; ++j) d_psi_.at[j] = next_d_psi_.at[j];
  }

  Buffer<T> scaled_, gradient_, least_, d_phi_, d_psi_, next_d_psi_, per_b_, psi_, before_, row_, plan_;
};

// In double: where plans are nearly permutations the system is nearly singular.
template <class T>
class ImplicitAdjoint : Transport<T> {
  using Base = Transport<T>;
  using V = Vec<double>;
  using Base::a_, Base::args_, Base::at_row, Base::b_, Base::load_cost, Base::n_, Base::padded_;

 public:
  explicit ImplicitAdjoint(const Sinkhorn& args)
      : Base(args),
        plan_(n_ * padded_),
        through_(n_ * padded_),
        rows_(n_),
        by_row_(n_),
        columns_(padded_),
        residual_(padded_),
        y_(padded_),
        direction_(padded_),
        image_(padded_),
        cost_(padded_),
        cotangent_(padded_) {}

  void run(int64_t problem) {
    this->move_to(problem);
    begin();
    solve();
    T* d_a = static_cast<T*>(args_.d_a) + problem * n_;
    T* d_b = static_cast<T*>(args_.d_b) + problem * args_.m;
    for (int64_t j = 0; j < args_.m; ++j) d_b[j] = static_cast<T>(y_.at[j]);
    const double inverse = 1.0 / epsilon();
    const double weight = this->number(args_.d_transport) + this->number(args_.d_value);
    for (int64_t i = 0; i < n_; ++i) {
      T* out = static_cast<T*>(args_.d_cost) + at_row(i);
      const double *plan = plan_.at + i * padded_, *through = through_.at + i * padded_;
      const double x = rows_.at[i] > 0 ? (by_row_.at[i] - dot(plan, y_.at, padded_)) / rows_.at[i] : 0.0;
      d_a[i] = static_cast<T>(x);
      for (int64_t j = 0; j < args_.m; ++j)
        out[j] = static_cast<T>(weight * plan[j] - (through[j] - plan[j] * (x + y_.at[j])) * inverse);
    }
  }

 private:
  double epsilon() const { return args_.epsilons[args_.iterations - 1]; }

  void begin() {
    const double inverse = 1.0 / epsilon(), weight = this->number(args_.d_transport);
    columns_.fill(0);
    residual_.fill(0);
    for (int64_t i = 0; i < n_; ++i) {
      double *plan = plan_.at + i * padded_, *through = through_.at + i * padded_;
      rows_.at[i] = by_row_.at[i] = 0.0;
      for (int64_t j = 0; j < padded_; ++j) plan[j] = through[j] = 0.0;
      if (a_[i] == 0) continue;
      load_cost(i, cost_.at);
      this->load_plan_cotangent(i, cotangent_.at);
      const double phi = static_cast<double>(Base::phi_[i]);
      for (int64_t j = 0; j < padded_; ++j)  // exp below takes whole vectors
        plan[j] = j < args_.m ? phi + static_cast<double>(Base::psi_[j]) - static_cast<double>(cost_.at[j]) * inverse
                              : -kInfinity<double>;
      for (int64_t j = 0; j < padded_; j += V::kLanes) exp(V::load(plan + j)).store(plan + j);
      for (int64_t j = 0; j < padded_; ++j) {
        if (plan[j] == 0.0) continue;
        through[j] = plan[j] * (weight * static_cast<double>(cost_.at[j]) + static_cast<double>(cotangent_.at[j]));
        rows_.at[i] += plan[j];
        by_row_.at[i] += through[j];
        columns_.at[j] += plan[j];
        residual_.at[j] += through[j];
      }
    }
  }

  // residual -= P' diag(1 / P1) of x [n] (or of P y, where x is null)
  void subtract_average(const double* x, const double* y, double* target) const {
    for (int64_t i = 0; i < n_; ++i) {
      if (!(rows_.at[i] > 0)) continue;
      const double* plan = plan_.at + i * padded_;
      const double along = x ? x[i] : dot(plan, y, padded_);
      add_scaled(target, -along / rows_.at[i], plan, padded_);
    }
  }

  double preconditioned(const double* x, int64_t j) const { return columns_.at[j] > 0 ? x[j] / columns_.at[j] : 0.0; }

  // Conjugate gradients on (diag(P'1) - P' diag(1 / P1) P) y = residual.
  void solve() {
    subtract_average(by_row_.at, nullptr, residual_.at);
    double rho = 0.0;
    for (int64_t j = 0; j < padded_; ++j) {
      y_.at[j] = 0.0;
      direction_.at[j] = preconditioned(residual_.at, j);
      rho += residual_.at[j] * direction_.at[j];
    }
    const double enough = rho * kCgTolerance * kCgTolerance;
    for (int step = 0; step < kCgSteps && rho > enough; ++step) {
      double curvature = 0.0, length = 0.0;
      for (int64_t j = 0; j < padded_; ++j) image_.at[j] = columns_.at[j] * direction_.at[j];
      subtract_average(nullptr, direction_.at, image_.at);
      for (int64_t j = 0; j < padded_; ++j) {
        curvature += direction_.at[j] * image_.at[j];
        length += columns_.at[j] * direction_.at[j] * direction_.at[j];
      }
      if (!(curvature > 2.2e-14 * length)) break;  // along a constant only rounding is left
      const double alpha = rho / curvature, last = rho;
      rho = 0.0;
      for (int64_t j = 0; j < padded_; ++j) {
        y_.at[j] += alpha * direction_.at[j];
        residual_.at[j] -= alpha * image_.at[j];
        rho += residual_.at[j] * preconditioned(residual_.at, j);
      }
      const double beta = rho / last;
      for (int64_t j = 0; j < padded_; ++j)
        direction_.at[j] = preconditioned(residual_.at, j) + beta * direction_.at[j];
    }
  }

  Buffer<double> plan_, through_, rows_, by_row_, columns_, residual_, y_, direction_, image_;
  Buffer<T> cost_, cotangent_;
};

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
