// The way back from a plan by the linear system that the solution satisfies.
#pragma once
#include "sinkhorn_problem.h"

namespace kd {
namespace KD_ISA {
namespace {

// In double: where plans are nearly permutations the system is nearly singular.
template <class T>
class ImplicitAdjoint : Transport<T> {
  using Base = Transport<T>;
  using V = Vec<double>;
  using Base::a_, Base::args_, Base::at_row, Base::b_, Base::height_, Base::load_cost, Base::n_, Base::padded_;

 public:
  explicit ImplicitAdjoint(const Sinkhorn& args)
      : Base(args),
        plan_(height_ * padded_),
        through_(height_ * padded_),
        rows_(n_),
        by_row_(n_),
        psi_(padded_),
        columns_(padded_),
        averages_(padded_),
        part_(padded_),
        residual_(padded_),
        y_(padded_),
        direction_(padded_),
        image_(padded_),
        row_(padded_),
        cost_(padded_),
        cotangent_(padded_) {}

  void run(int64_t problem) {
    this->move_to(problem);
    begin();
    solve();
    T* d_a = static_cast<T*>(args_.d_a) + problem * n_;
    T* d_b = static_cast<T*>(args_.d_b) + problem * args_.m;
    for (int64_t j = 0; j < args_.m; ++j) d_b[j] = static_cast<T>(y_.at[j]);
    const double inverse = 1.0 / this->epsilon();
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
  void begin() {
    const double inverse = 1.0 / this->epsilon(), weight = this->number(args_.d_transport);
    columns_.fill(0);
    residual_.fill(0);
    for (int64_t j = 0; j < padded_; ++j)
      psi_.at[j] = j < args_.m ? static_cast<double>(Base::psi_[j]) : -kInfinity<double>;
    for (int64_t i = 0; i < n_; ++i) {
      double *plan = plan_.at + i * padded_, *through = through_.at + i * padded_;
      rows_.at[i] = by_row_.at[i] = 0.0;
      for (int64_t j = 0; j < padded_; ++j) plan[j] = through[j] = 0.0;
      if (a_[i] == 0) continue;
      load_cost(i, row_.at);
      widen(row_.at, cost_.at);
      this->load_plan_cotangent(i, row_.at);
      if (args_.d_plan) widen(row_.at, cotangent_.at);
      const V phi(static_cast<double>(Base::phi_[i])), scale(inverse), w(weight);
      V sums(0.0), sums_through(0.0);
      for (int64_t j = 0; j < padded_; j += V::kLanes) {
        const V cost = V::load(cost_.at + j), entry = plan_entry(phi, V::load(psi_.at + j), cost * scale);
        const V arrived = times_plan(entry, fma(w, cost, V::load(cotangent_.at + j)));
        entry.store(plan + j);
        arrived.store(through + j);
        sums = sums + entry;
        sums_through = sums_through + arrived;
        (V::load(columns_.at + j) + entry).store(columns_.at + j);
        (V::load(residual_.at + j) + arrived).store(residual_.at + j);
      }
      rows_.at[i] = sum_lanes(sums);
      by_row_.at[i] = sum_lanes(sums_through);
    }
  }

  void widen(const T* from, double* to) const {
    for (int64_t j = 0; j < padded_; ++j) to[j] = static_cast<double>(from[j]);
  }

  // target -= P' diag(1 / P1) x, of what each row has: x(row, the row's product with y).
  template <class OfRow>
  void subtract_average(const double* y, double* target, OfRow&& x) {
    walk(plan_.at, n_, padded_, y, part_.at, averages_.at,
         [&](int64_t i, double product) { return rows_.at[i] > 0 ? -x(i, product) / rows_.at[i] : 0.0; });
    for (int64_t j = 0; j < padded_; ++j) target[j] += averages_.at[j];
  }

  double preconditioned(const double* x, int64_t j) const { return columns_.at[j] > 0 ? x[j] / columns_.at[j] : 0.0; }

  // Conjugate gradients on (diag(P'1) - P' diag(1 / P1) P) y = residual.
  void solve() {
    y_.fill(0);
    subtract_average(y_.at, residual_.at, [&](int64_t i, double) { return by_row_.at[i]; });
    double rho = 0.0;
    for (int64_t j = 0; j < padded_; ++j) {
      direction_.at[j] = preconditioned(residual_.at, j);
      rho += residual_.at[j] * direction_.at[j];
    }
    const double enough = rho * kCgTolerance * kCgTolerance;
    for (int step = 0; step < kCgSteps && rho > enough; ++step) {
      double curvature = 0.0, length = 0.0;
      for (int64_t j = 0; j < padded_; ++j) image_.at[j] = columns_.at[j] * direction_.at[j];
      subtract_average(direction_.at, image_.at, [](int64_t, double product) { return product; });
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

  Buffer<double> plan_, through_, rows_, by_row_, psi_, columns_, averages_, part_, residual_, y_, direction_, image_;
  Buffer<T> row_;
  Buffer<double> cost_, cotangent_;
};

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
