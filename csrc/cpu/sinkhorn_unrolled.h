// The way back from a plan through all iterations.
#pragma once
#include "sinkhorn_problem.h"

namespace kd {
namespace KD_ISA {
namespace {

template <class T>
class UnrolledAdjoint : Transport<T> {
  using Base = Transport<T>;
  using V = Vec<T>;
  using Base::a_, Base::args_, Base::at_row, Base::b_, Base::height_, Base::load_cost, Base::n_, Base::padded_,
      Base::tall_;

 public:
  explicit UnrolledAdjoint(const Sinkhorn& args)
      : Base(args),
        entries_(height_ * padded_),
        gradient_(height_ * padded_),
        least_(tall_),
        rows_(tall_),
        d_phi_(tall_),
        d_psi_(padded_),
        columns_(padded_),
        part_(padded_),
        psi_(padded_),
        before_(padded_),
        per_b_(padded_),
        cost_(padded_),
        cotangent_(padded_),
        left_(kRank * tall_),
        right_(kRank * padded_) {}

  void run(int64_t problem) {
    this->move_to(problem);
    this->copy(static_cast<const T*>(args_.d_psi) + problem * args_.m, args_.m, d_psi_.at, T(0));
    d_a_ = static_cast<T*>(args_.d_a) + problem * n_;
    d_b_ = static_cast<T*>(args_.d_b) + problem * args_.m;
    for (int64_t i = 0; i < n_; ++i) d_a_[i] = 0;
    for (int64_t j = 0; j < args_.m; ++j) d_b_[j] = 0;
    gradient_.fill(0);
    load();
    has_room() ? go_back<true>() : go_back<false>();
  }

 private:
  static constexpr int64_t kRank = 64;

  // Costs over epsilon, the least of each row and what a row spans at most.
  void load() {
    span_ = 0;
    const V inverse(1.0 / this->epsilon());
    for (int64_t i = 0; i < height_; ++i) {
      T* scaled = entries_.at + i * padded_;
      if (i >= n_ || a_[i] == 0) {
        for (int64_t j = 0; j < padded_; ++j) scaled[j] = kInfinity<T>;
        least_.at[i] = 0;
        continue;
      }
      load_cost(i, scaled);
      for (int64_t j = 0; j < padded_; j += V::kLanes) (V::load(scaled + j) * inverse).store(scaled + j);
      const Range<T> range(scaled, padded_);
      least_.at[i] = range.least;
      if (range.most - range.least > span_) span_ = range.most - range.least;
    }
  }

  // Whether scalings do in the place of their logarithms: one exponential of a cost serves all iterations then.
  bool has_room() {
    if (args_.domain == kLogDomain) return false;
    V largest(static_cast<double>(span_)), top[2] = {V(0.0), V(0.0)};  // not of absent entries
    const V zero(0.0), infinity(kInfinity<double>);
    const auto meet = [&](V x, V& top_of_side) {
      const V size = select(x < zero, -x, x);
      largest = max_or_second(select(size < infinity, size, zero), largest);
      top_of_side = max_or_second(x, top_of_side);
    };
    for (int64_t step = 0; step < args_.iterations; ++step) {
      read_rows(step);
      this->copy(this->psi_after(step), args_.m, psi_.at, T(0));
      for (int64_t i = 0; i < tall_; i += V::kLanes) meet(V::load(rows_.at + i), top[0]);
      for (int64_t j = 0; j < padded_; j += V::kLanes) meet(V::load(psi_.at + j), top[1]);
    }
    // Factors of the gradient meet before the kernel makes them small.
    return largest_lane(largest) <= T(kScalingRoom) && largest_lane(top[0]) + largest_lane(top[1]) <= T(kScalingRoom);
  }

  // The rows' logarithms after a step, of the scalings that go with costs above a row's least; -inf where absent.
  void read_rows(int64_t step) {
    for (int64_t i = 0; i < tall_; ++i)
      rows_.at[i] = i < n_ && a_[i] != 0 ? this->phi_after(step)[i] - least_.at[i] : -kInfinity<T>;
  }

  template <bool kScaling>
  void go_back() {
    if (kScaling) {
      for (int64_t i = 0; i < height_; ++i) {
        const V least(static_cast<double>(least_.at[i]));
        T* row = entries_.at + i * padded_;
        for (int64_t j = 0; j < padded_; j += V::kLanes) exp(least - V::load(row + j)).store(row + j);
      }
    }
    read_plan<kScaling>();
    for (int64_t i = 0; i < n_; ++i) begin<kScaling>(i);
    for (int64_t step = args_.iterations - 1; step >= 0; --step) {
      for (int64_t j = 0; j < args_.m; ++j) d_b_[j] += d_psi_.at[j];
      kScaling ? scaled_step(step) : log_step(step);
    }
    if (kScaling) add_factors();
    read_plan<kScaling>();
    for (int64_t i = 0; i < n_; ++i) write<kScaling>(i);
  }

  // The plan's columns into psi_, as logarithms or as what they are logarithms of.
  template <bool kScaling>
  void read_plan() {
    this->copy(Base::psi_, args_.m, psi_.at, -kInfinity<T>);
    if (kScaling) this->exp_all(psi_.at, padded_);
  }

  // Calls of_entry(j, plan, what arrives at the plan times the plan) along row i.
  template <bool kScaling, class OfEntry>
  void each_entry(int64_t i, OfEntry&& of_entry) {
    const V weight(this->number(args_.d_transport)), own(static_cast<double>(Base::phi_[i]));
    const V row = kScaling ? exp(own - V(static_cast<double>(least_.at[i]))) : own;
    load_cost(i, cost_.at);
    this->load_plan_cotangent(i, cotangent_.at);
    const T* entries = entries_.at + i * padded_;
    for (int64_t j = 0; j < padded_; j += V::kLanes) {
      const V column = V::load(psi_.at + j), entry = V::load(entries + j);
      const V plan = kScaling ? (row * entry) * column : plan_entry(row, column, entry);
      of_entry(j, plan, times_plan(plan, fma(weight, V::load(cost_.at + j), V::load(cotangent_.at + j))));
    }
  }

  // From the plan to its potentials.
  template <bool kScaling>
  void begin(int64_t i) {
    d_phi_.at[i] = 0;
    if (a_[i] == 0) return;
    V sums(0.0);
    each_entry<kScaling>(i, [&](int64_t j, V, V through) {
      (V::load(d_psi_.at + j) + through).store(d_psi_.at + j);
      sums = sums + through;
    });
    d_phi_.at[i] = static_cast<const T*>(args_.d_phi)[this->problem_ * n_ + i] + sum_lanes(sums);
  }

  // The costs' gradient: what came through the potentials, and what the plan itself gives.
  template <bool kScaling>
  void write(int64_t i) {
    T *out = static_cast<T*>(args_.d_cost) + at_row(i), *gradient = gradient_.at + i * padded_;
    const V weight(this->number(args_.d_transport)), inverse(1.0 / this->epsilon());
    if (a_[i] != 0) {
      each_entry<kScaling>(i, [&](int64_t j, V plan, V through) {
        V came = V::load(gradient + j);
        if (kScaling) came = times_plan(V::load(entries_.at + i * padded_ + j), came);
        fma(came - through, inverse, weight * plan).store(gradient + j);
      });
    }
    for (int64_t j = 0; j < args_.m; ++j) out[j] = gradient[j];
  }

  // The columns' logarithms before and after a step, and what arrives at them over their marginals.
  void read_columns(int64_t step) {
    this->copy(this->psi_after(step), args_.m, psi_.at, -kInfinity<T>);
    if (step > 0) {
      this->copy(this->psi_after(step - 1), args_.m, before_.at, -kInfinity<T>);
    } else {
      for (int64_t j = 0; j < padded_; ++j) before_.at[j] = b_.at[j] > 0 ? T(0) : -kInfinity<T>;
    }
    for (int64_t j = 0; j < padded_; ++j) per_b_.at[j] = b_.at[j] > 0 ? d_psi_.at[j] / b_.at[j] : T(0);
  }

  // What arrives at row i's potential before the column step `taken` from it; returns it over the row's marginal.
  T row_step(int64_t i, T taken) {
    const T d_phi = d_phi_.at[i] - taken;
    d_phi_.at[i] = 0;
    d_a_[i] += d_phi;
    return d_phi / a_[i];
  }

  // Through one iteration: from d_phi_ and d_psi_ behind it to d_psi_ before it. The gradient of an entry is the kernel
  // times two products of a number of its row and one of its column: of many iterations, a product of matrices.
  void scaled_step(int64_t step) {
    read_columns(step);
    if (used_ == kRank) add_factors();
    T *own = left_.at + used_ * tall_, *rows = own + tall_;
    T *columns = right_.at + used_ * padded_, *before = columns + padded_;
    used_ += 2;
    for (int64_t j = 0; j < padded_; j += V::kLanes) {
      (exp(V::load(psi_.at + j)) * V::load(per_b_.at + j)).store(columns + j);
      exp(V::load(before_.at + j)).store(before + j);
    }
    read_rows(step);
    for (int64_t i = 0; i < tall_; i += V::kLanes) {
      V(0.0).store(rows + i);
      exp(V::load(rows_.at + i)).store(own + i);
    }
    walk(entries_.at, n_, padded_, columns, part_.at, columns_.at,
         [&](int64_t i, T product) { return rows[i] = a_[i] == 0 ? T(0) : own[i] * row_step(i, own[i] * product); });
    for (int64_t j = 0; j < padded_; j += V::kLanes)
      (-(V::load(before + j) * V::load(columns_.at + j))).store(d_psi_.at + j);
  }

  void add_factors() {
    add_product(gradient_.at, left_.at, right_.at, used_, height_, tall_, padded_);
    used_ = 0;
  }

  // The same in logarithms, into the gradient at once.
  void log_step(int64_t step) {
    read_columns(step);
    columns_.fill(0);
    for (int64_t i = 0; i < n_; ++i) {
      if (a_[i] == 0) continue;
      const T* scaled = entries_.at + i * padded_;
      T* gradient = gradient_.at + i * padded_;
      const V own(static_cast<double>(this->phi_after(step)[i]));
      V sums(0.0);
      for (int64_t j = 0; j < padded_; j += V::kLanes) {
        const V column = plan_entry(own, V::load(psi_.at + j), V::load(scaled + j)) * V::load(per_b_.at + j);
        column.store(part_.at + j);
        sums = sums + column;
      }
      const V per_a(static_cast<double>(row_step(i, sum_lanes(sums))));
      for (int64_t j = 0; j < padded_; j += V::kLanes) {
        const V row = plan_entry(own, V::load(before_.at + j), V::load(scaled + j)) * per_a;
        (V::load(gradient + j) + (V::load(part_.at + j) + row)).store(gradient + j);
        (V::load(columns_.at + j) - row).store(columns_.at + j);
      }
    }
    for (int64_t j = 0; j < padded_; ++j) d_psi_.at[j] = columns_.at[j];
  }

  Buffer<T> entries_, gradient_, least_, rows_, d_phi_, d_psi_, columns_, part_, psi_, before_, per_b_, cost_,
      cotangent_, left_, right_;
  T span_ = 0;
  int64_t used_ = 0;  // factors waiting in left_ and right_
  T *d_a_ = nullptr, *d_b_ = nullptr;
};

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
