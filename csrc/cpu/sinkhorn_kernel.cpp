// The Sinkhorn kernel for one instruction set: solving. A problem stays in one core's cache; an iteration is one walk
// over it, in which each row is scaled and at once added to the columns' sums.
#include "../sinkhorn.h"
#include "isa.h"
#include "sinkhorn_implicit.h"
#include "sinkhorn_unrolled.h"

namespace kd {
namespace KD_ISA {
namespace {

template <class T>
class Solver : Transport<T> {
  using Base = Transport<T>;
  using V = Vec<T>;
  using Base::a_, Base::args_, Base::b_, Base::epsilon, Base::height_, Base::load_cost, Base::n_, Base::padded_,
      Base::phi_, Base::psi_, Base::tall_;

 public:
  explicit Solver(const Sinkhorn& args)
      : Base(args),
        entries_(height_ * padded_),
        least_(tall_),
        u_(tall_),
        next_u_(tall_),
        v_(padded_),
        columns_(padded_),
        part_(padded_),
        row_(padded_),
        row_logs_(tall_) {}

  void run(int64_t problem) {
    this->move_to(problem);
    numbers_ = args_.numbers + problem * kSinkhornNumbers;
    for (int i = 0; i < kSinkhornNumbers; ++i) numbers_[i] = 0.0;
    const double span = measure();
    lost_ = false;
    double least_epsilon = args_.epsilons[0];
    for (int64_t i = 1; i < args_.iterations; ++i)
      least_epsilon = args_.epsilons[i] < least_epsilon ? args_.epsilons[i] : least_epsilon;
    const bool scaling =
        args_.domain == kScalingDomain || (args_.domain == kAutoDomain && span <= kScalingRoom * least_epsilon);
    if (scaling) {
      iterate<true>();
      potentials(epsilon(), u_.at, v_.at);
    }
    if (!scaling || (args_.domain == kAutoDomain && !finite())) {
      infeasible_ = false;
      iterate<false>();
    }
    const double room = sizeof(T) == 4 ? 87.3 : 708.3;
    // What a change of epsilon took away may have been all that a row had.
    const bool out = span > room * least_epsilon || (lost_ && !finite());
    finish();
    if (args_.domain == kScalingDomain && out) {
      numbers_[kStatus] = kOutOfRoom;
    } else if (infeasible_) {
      numbers_[kStatus] = kInfeasible;
    }
  }

 private:
  // Each row's least cost, and by how much the costs of a row exceed it at most.
  double measure() {
    T span = 0;
    infeasible_ = false;
    for (int64_t i = 0; i < n_; ++i) {
      if (a_[i] == 0) continue;
      load_cost(i, row_.at);
      const Range<T> range(row_.at, padded_);
      least_.at[i] = range.least;
      if (range.most - range.least > span) span = range.most - range.least;
    }
    return static_cast<double>(span);
  }

  // exp(-(cost - row's least) / epsilon), or cost / epsilon.
  template <bool kScaling>
  void build(double epsilon) {
    const V inverse(1.0 / epsilon);
    for (int64_t i = 0; i < height_; ++i) {
      T* row = entries_.at + i * padded_;
      if (i >= n_ || a_[i] == 0) {
        for (int64_t j = 0; j < padded_; ++j) row[j] = kScaling ? T(0) : kInfinity<T>;
        continue;
      }
      load_cost(i, row);
      const V least(static_cast<double>(least_.at[i]));
      for (int64_t j = 0; j < padded_; j += V::kLanes) {
        const V cost = V::load(row + j);
        (kScaling ? exp((least - cost) * inverse) : cost * inverse).store(row + j);
      }
    }
  }

  template <bool kScaling>
  void iterate() {
    double mass = 0.0;
    for (int64_t i = 0; i < n_; ++i) {
      mass += static_cast<double>(a_[i]);
      u_.at[i] = kScaling ? T(0) : -kInfinity<T>;
    }
    for (int64_t j = 0; j < padded_; ++j)
      v_.at[j] = b_.at[j] > 0 ? T(kScaling ? 1 : 0) : kScaling ? T(0) : -kInfinity<T>;
    double before = 0.0;
    numbers_[kIterations] = 0.0;
    for (int64_t step = 0; step < args_.iterations; ++step) {
      const double epsilon = args_.epsilons[step];
      if (epsilon != before) {
        build<kScaling>(epsilon);
        if (step > 0) change_unit<kScaling>(before / epsilon);
        before = epsilon;
      }
      const double error = kScaling ? scale_rows() : step_rows();
      // What an earlier epsilon of a schedule solves is another problem.
      const double last = args_.epsilons[args_.iterations - 1];
      const bool looks = args_.tolerance > 0 && step > 0 && epsilon == last && args_.epsilons[step - 1] == last;
      if (looks && error <= args_.tolerance * mass) return;
      T* const used = u_.at;
      u_.at = next_u_.at;
      next_u_.at = used;
      kScaling ? scale_columns() : step_columns();
      numbers_[kIterations] += 1.0;
      remember<kScaling>(step);
    }
  }

  // The same potentials of the columns in units of another epsilon. The size of all scalings is of no account.
  template <bool kScaling>
  void change_unit(double ratio) {
    T size = 0;
    for (int64_t j = 0; kScaling && j < padded_; ++j) size = v_.at[j] > size ? v_.at[j] : size;
    for (int64_t j = 0; j < padded_; ++j) {
      if (!(b_.at[j] > 0)) continue;
      const double value = static_cast<double>(v_.at[j]);
      v_.at[j] = static_cast<T>(kScaling ? __builtin_pow(value / static_cast<double>(size), ratio) : value * ratio);
      lost_ = lost_ || (kScaling && v_.at[j] == 0);
    }
  }

  // Adds what this block of rows gave to the columns: sums of many rows are made of sums of few.
  void flush() {
    for (int64_t j = 0; j < padded_; j += V::kLanes) {
      (V::load(columns_.at + j) + V::load(part_.at + j)).store(columns_.at + j);
      V(0.0).store(part_.at + j);
    }
  }

  // u = a / (K v) into next_u_, and the columns' sums of u K. Returns the error that u had.
  double scale_rows() {
    double error = 0.0;
    walk(entries_.at, n_, padded_, v_.at, part_.at, columns_.at, [&](int64_t i, T sum) {
      if (a_[i] == 0) return next_u_.at[i] = 0;
      infeasible_ = infeasible_ || sum == 0;
      error += __builtin_fabs(static_cast<double>(u_.at[i] * sum - a_[i]));
      return next_u_.at[i] = a_[i] / sum;
    });
    return error;
  }

  void scale_columns() {
    for (int64_t j = 0; j < padded_; ++j) {
      if (!(b_.at[j] > 0)) continue;
      infeasible_ = infeasible_ || columns_.at[j] == 0;
      v_.at[j] = b_.at[j] / columns_.at[j];
    }
  }

  // The same in logarithms. Once a row is right, no entry of the plan exceeds its mass: sums cannot overflow, and one
  // exponential serves both.
  double step_rows() {
    double error = 0.0;
    columns_.fill(0);
    part_.fill(0);
    for (int64_t i = 0; i < n_; ++i) {
      next_u_.at[i] = -kInfinity<T>;
      if (a_[i] == 0) continue;
      const T* scaled = entries_.at + i * padded_;
      V top(-kInfinity<double>);
      for (int64_t j = 0; j < padded_; j += V::kLanes) {
        const V z = V::load(v_.at + j) - V::load(scaled + j);
        z.store(row_.at + j);
        top = max_or_second(top, z);
      }
      const T max = largest_lane(top);
      if (max == -kInfinity<T>) {
        infeasible_ = true;
        continue;
      }
      V sums(0.0);
      const V reference(static_cast<double>(max));
      for (int64_t j = 0; j < padded_; j += V::kLanes) {
        const V e = exp(V::load(row_.at + j) - reference);
        e.store(row_.at + j);
        sums = sums + e;
      }
      const T sum = sum_lanes(sums);
      const double log_sum = static_cast<double>(max) + __builtin_log(static_cast<double>(sum));
      error += __builtin_fabs(__builtin_exp(static_cast<double>(u_.at[i]) + log_sum) - static_cast<double>(a_[i]));
      next_u_.at[i] = static_cast<T>(__builtin_log(static_cast<double>(a_[i])) - log_sum);
      add_scaled(part_.at, a_[i] / sum, row_.at, padded_);
      if (i % kBlock == kBlock - 1) flush();
    }
    flush();
    return error;
  }

  void step_columns() {
    const T least = sizeof(T) == 4 ? T(1e-30) : T(1e-290);
    for (int64_t j = 0; j < padded_; ++j) {
      if (!(b_.at[j] > 0)) continue;
      const double mass = static_cast<double>(b_.at[j]);
      if (columns_.at[j] < least) {  // all of it rounded away: from its own largest term
        v_.at[j] = static_cast<T>(__builtin_log(mass) - log_sum_of_column(j));
      } else {
        v_.at[j] += static_cast<T>(__builtin_log(mass / static_cast<double>(columns_.at[j])));
      }
    }
  }

  double log_sum_of_column(int64_t j) {
    double max = -kInfinity<double>, sum = 0.0;
    for (int64_t i = 0; i < n_; ++i) {
      if (a_[i] == 0) continue;
      const double z = static_cast<double>(u_.at[i]) - static_cast<double>(entries_.at[i * padded_ + j]);
      max = z > max ? z : max;
    }
    if (max == -kInfinity<double>) {
      infeasible_ = true;
      return max;
    }
    for (int64_t i = 0; i < n_; ++i) {
      if (a_[i] == 0) continue;
      sum += __builtin_exp(static_cast<double>(u_.at[i]) - static_cast<double>(entries_.at[i * padded_ + j]) - max);
    }
    return max + __builtin_log(sum);
  }

  // Scalings to potentials; -inf where an entry is absent.
  void potentials(double epsilon, T* phi, T* psi) const {
    const V inverse(1.0 / epsilon);
    for (int64_t i = 0; i < tall_; i += V::kLanes)
      fma(V::load(least_.at + i), inverse, log(V::load(u_.at + i))).store(phi + i);
    for (int64_t j = 0; j < padded_; j += V::kLanes) log(V::load(v_.at + j)).store(psi + j);
  }

  template <bool kScaling>
  void remember(int64_t step) {
    if (!args_.phi_history) return;
    T *phi = this->phi_after(step), *psi = this->psi_after(step);
    const T *rows = u_.at, *columns = v_.at;
    if (kScaling) {
      potentials(args_.epsilons[step], row_logs_.at, row_.at);
      rows = row_logs_.at;
      columns = row_.at;
    }
    for (int64_t i = 0; i < n_; ++i) phi[i] = rows[i];
    for (int64_t j = 0; j < args_.m; ++j) psi[j] = columns[j];
  }

  bool finite() const {
    for (int64_t i = 0; i < n_; ++i)
      if (a_[i] != 0 && !(__builtin_fabs(static_cast<double>(u_.at[i])) < kInfinity<double>)) return false;
    for (int64_t j = 0; j < args_.m; ++j)
      if (b_.at[j] > 0 && !(__builtin_fabs(static_cast<double>(v_.at[j])) < kInfinity<double>)) return false;
    return true;
  }

  // From the potentials in u_ and v_: what is written and the numbers.
  void finish() {
    double transport = 0.0, error = 0.0, gap = 0.0, mass = 0.0;
    for (int64_t j = 0; j < args_.m; ++j) {
      psi_[j] = v_.at[j];
      if (!(b_.at[j] > 0)) continue;
      const double b = static_cast<double>(b_.at[j]);
      mass += b;
      gap += b * (static_cast<double>(v_.at[j]) - __builtin_log(b));
    }
    const V inverse(1.0 / epsilon());
    for (int64_t i = 0; i < n_; ++i) {
      phi_[i] = u_.at[i];
      if (a_[i] == 0) continue;
      load_cost(i, row_.at);
      const V phi(static_cast<double>(u_.at[i]));
      V sums(0.0), costs(0.0);
      for (int64_t j = 0; j < padded_; j += V::kLanes) {
        const V cost = V::load(row_.at + j);
        const V plan = plan_entry(phi, V::load(v_.at + j), cost * inverse);
        sums = sums + plan;
        costs = costs + times_plan(plan, cost);
      }
      const double sum = static_cast<double>(sum_lanes(sums)), a = static_cast<double>(a_[i]);
      transport += static_cast<double>(sum_lanes(costs));
      error += __builtin_fabs(sum - a);
      gap += sum * (static_cast<double>(u_.at[i]) - __builtin_log(a));
    }
    numbers_[kTransport] = transport;
    numbers_[kError] = error;
    numbers_[kGap] = mass == 0.0 ? 0.0 : (gap - transport / epsilon()) / mass + __builtin_log(mass);
  }

  static constexpr int64_t kBlock = 64;
  double* numbers_ = nullptr;
  bool infeasible_ = false, lost_ = false;
  Buffer<T> entries_, least_, u_, next_u_, v_, columns_, part_, row_, row_logs_;
};

template <class Runner>
void run_problems(const Sinkhorn& args) {
  const int64_t threads = args.threads < args.count ? args.threads : args.count;
  // An exception must not leave a team: a thread without memory takes no problem, and then the call has none.
  int64_t next = 0;
  bool out_of_memory = false;
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  {
    try {
      Runner runner(args);
      for (;;) {
        const int64_t problem = __atomic_fetch_add(&next, int64_t{1}, __ATOMIC_RELAXED);
        if (problem >= args.count) break;
        runner.run(problem);
      }
    } catch (const std::bad_alloc&) {
      __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

template <class T>
void run(const Sinkhorn& args, unsigned phases) {
  if (phases & kSolve) run_problems<Solver<T>>(args);
  if (phases & kUnrolled) run_problems<UnrolledAdjoint<T>>(args);
  if (phases & kImplicit) run_problems<ImplicitAdjoint<T>>(args);
}

}  // namespace

void sinkhorn(const Sinkhorn& args, unsigned phases) {
  if (args.wide) {
    run<double>(args, phases);
  } else {
    run<float>(args, phases);
  }
}

}  // namespace KD_ISA
}  // namespace kd
