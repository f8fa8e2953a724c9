// The arithmetic of the row kernel on one block: kSteps x kLanes numbers that lie in the L1 cache.
// Lanes are independent here; whether they are tokens or parts of one row is the strip's business.
#pragma once
#include "convert.h"

namespace kd {
namespace KD_ISA {

constexpr int kSteps = 32;  // of a block; 4 KiB per plane, and few enough for float32 partial sums
constexpr int kBlockBytes = kSteps * 128;

template <class T>
struct alignas(64) Lanes {
  T at[kLanes<T>];
  KD_INLINE Vec<T> vec(int lane) const { return Vec<T>::load(at + lane); }
};

template <class T>
struct alignas(64) Block {
  T at[kSteps * kLanes<T>];
};

// Per lane, what one model's logits need on their way to probabilities and the gradient on its way back.
template <class T>
struct SideLanes {
  Lanes<T> inverse_temperature;
  Lanes<T> max, logz;    // once the statistics are known
  Lanes<T> sum;          // once the terms are known: sum of the parts over the mass
  Lanes<T> coefficient;  // weight of the divergence's gradient; 0 silences even NaN
};

template <class T>
struct HardLanes {
  Lanes<T> logz;
  Lanes<T> coefficient;
  Lanes<T> temperature_is_one;  // 1 or 0
  Lanes<T> poison;              // NaN where the label is out of range, else 0
};

template <class T>
struct PairLanes {
  Lanes<T> logz_difference;  // logz student - logz teacher, subtracted in double
  Lanes<T> first, first_complement, second;
};

// The running sum of exponentials. Blocks are summed in T and added up in double.
template <class T>
struct OnlineSum {
  Lanes<T> max;
  double soft[kLanes<T>];
  double hard[kLanes<T>];  // the same at temperature 1

  void reset() {
    for (int i = 0; i < kLanes<T>; ++i) {
      max.at[i] = -kInfinity<T>;
      soft[i] = hard[i] = 0.0;
    }
  }
};

template <class T>
KD_INLINE void add_lanes(Vec<T> values, int lane, double* totals) {
  typedef double Wide __attribute__((vector_size(Vec<T>::kLanes * sizeof(double))));
  Wide sum;
  std::memcpy(&sum, totals + lane, sizeof sum);
  sum += __builtin_convertvector(values.v, Wide);
  std::memcpy(totals + lane, &sum, sizeof sum);
}

// Brings sums made relative to old_max to new_max; a double, so that many rescalings do not drift.
template <class T>
void rescale(const T* old_max, const T* new_max, const T* inverse_temperature, int lane, OnlineSum<T>& online) {
  for (int i = 0; i < Vec<T>::kLanes; ++i) {
    if (!(new_max[i] > old_max[i]) || online.soft[lane + i] == 0.0) continue;
    const double step = static_cast<double>(old_max[i]) - static_cast<double>(new_max[i]);
    online.soft[lane + i] *= __builtin_exp(step * static_cast<double>(inverse_temperature[i]));
    online.hard[lane + i] *= __builtin_exp(step);
  }
}

// Where the next block stands in memory. In the vocabulary-major layout its steps are a page apart, in the other one a
// block is a page itself; no hardware prefetcher follows into the next page, so the arithmetic asks for each of the
// block's lines while it works on this one.
struct Ahead {
  uintptr_t address = 0;
  intptr_t step_bytes = 0;
  int number_bytes = 0;

  KD_INLINE void touch(int step, int lane) const {
    __builtin_prefetch(
        reinterpret_cast<const void*>(address + static_cast<uintptr_t>(step * step_bytes + lane * number_bytes)));
  }
};

template <class T, bool kHard>
void accumulate_exp(const T* z, int steps, const SideLanes<T>& side, const Ahead& ahead, OnlineSum<T>& online) {
  using V = Vec<T>;
  const V lowest(-kInfinity<double>);
  for (int lane = 0; lane < kLanes<T>; lane += V::kLanes) {
    const V old_max = online.max.vec(lane);
    V max = old_max;
    for (int step = 0; step < steps; ++step) max = max_or_second(V::load(z + step * kLanes<T> + lane), max);
    if ((max > old_max).any()) {
      T previous[V::kLanes];
      old_max.store(previous);
      max.store(online.max.at + lane);
      rescale(previous, online.max.at + lane, side.inverse_temperature.at + lane, lane, online);
    }
    // Nothing but -inf so far: any finite reference makes the exponentials 0 instead of NaN.
    const V reference = select(max == lowest, V(0.0), max);
    const V inverse_temperature = side.inverse_temperature.vec(lane);
    V soft(0.0), hard(0.0);
    for (int step = 0; step < steps; ++step) {
      ahead.touch(step, lane);
      const V x = V::load(z + step * kLanes<T> + lane) - reference;
      soft = soft + exp(x * inverse_temperature);
      if (kHard) hard = hard + exp(x);
    }
    add_lanes(soft, lane, online.soft);
    if (kHard) add_lanes(hard, lane, online.hard);
  }
}

// Where soft_block leaves each entry's parts, in the block's own order; null: not wanted.
template <class T>
struct Planes {
  T *student = nullptr, *q = nullptr;
  T *teacher = nullptr, *p = nullptr;
};

template <class T>
struct Sums {
  double term[kLanes<T>], student[kLanes<T>], teacher[kLanes<T>];
  double student_mass[kLanes<T>], teacher_mass[kLanes<T>];
  double student_entropy[kLanes<T>], teacher_entropy[kLanes<T>];
};

template <class T>
using SoftBlock = void (*)(const T*, const T*, int, const SideLanes<T>&, const SideLanes<T>&, const PairLanes<T>&,
                           const Ahead&, const Ahead&, const Planes<T>&, Sums<T>*);

// Log-probabilities of both sides and their difference at one vector of a block.
template <class T>
struct LogPair {
  Vec<T> log_p, log_q, difference;

  KD_INLINE LogPair(Vec<T> u_student, Vec<T> u_teacher, Vec<T> logz_student, Vec<T> logz_teacher,
                    Vec<T> logz_difference)
      : log_p(u_teacher - logz_teacher), log_q(u_student - logz_student) {
    const Vec<T> zero_probability(-kInfinity<double>);
    const auto both_absent = (log_p == zero_probability) & (log_q == zero_probability);
    difference = select(both_absent, Vec<T>(0.0), (u_student - u_teacher) - logz_difference);
  }
};

// kSums: add up the terms and parts; without it the terms are not even formed. kTeacher: its parts too.
template <class Functor, class T, bool kSums, bool kTeacher>
void soft_block(const T* z_student, const T* z_teacher, int steps, const SideLanes<T>& student,
                const SideLanes<T>& teacher, const PairLanes<T>& lanes, const Ahead& ahead_student,
                const Ahead& ahead_teacher, const Planes<T>& planes, Sums<T>* sums) {
  using V = Vec<T>;
  for (int lane = 0; lane < kLanes<T>; lane += V::kLanes) {
    const Parameters<V> parameters{lanes.first.vec(lane), lanes.first_complement.vec(lane), lanes.second.vec(lane)};
    const V max_student = student.max.vec(lane), max_teacher = teacher.max.vec(lane);
    const V inverse_student = student.inverse_temperature.vec(lane);
    const V inverse_teacher = teacher.inverse_temperature.vec(lane);
    const V logz_student = student.logz.vec(lane), logz_teacher = teacher.logz.vec(lane);
    const V logz_difference = lanes.logz_difference.vec(lane);
    V term(0.0), student_sum(0.0), teacher_sum(0.0), student_mass(0.0), teacher_mass(0.0);
    for (int step = 0; step < steps; ++step) {
      const int at = step * kLanes<T> + lane;
      ahead_student.touch(step, lane);
      ahead_teacher.touch(step, lane);
      const V u_student = (V::load(z_student + at) - max_student) * inverse_student;
      const V u_teacher = (V::load(z_teacher + at) - max_teacher) * inverse_teacher;
      const LogPair<T> logs(u_student, u_teacher, logz_student, logz_teacher, logz_difference);
      const Pair<V> pair(logs.log_p, logs.log_q, logs.difference);
      const Parts<V> parts = Functor::evaluate(pair, parameters);
      if (kSums) {
        term = term + parts.term;
        if (!Functor::kStudentSumsToZero) {
          student_sum = student_sum + parts.student;
          student_mass = student_mass + pair.q();
        }
        if (kTeacher && !Functor::kTeacherSumsToZero) {
          teacher_sum = teacher_sum + parts.teacher;
          teacher_mass = teacher_mass + pair.p();
        }
      }
      if (planes.student) parts.student.store(planes.student + at);
      if (planes.q) pair.q().store(planes.q + at);
      if (kTeacher) {
        if (planes.teacher) parts.teacher.store(planes.teacher + at);
        if (planes.p) pair.p().store(planes.p + at);
      }
    }
    if (kSums) {
      add_lanes(term, lane, sums->term);
      if (!Functor::kStudentSumsToZero) {
        add_lanes(student_sum, lane, sums->student);
        add_lanes(student_mass, lane, sums->student_mass);
      }
      if (kTeacher && !Functor::kTeacherSumsToZero) {
        add_lanes(teacher_sum, lane, sums->teacher);
        add_lanes(teacher_mass, lane, sums->teacher_mass);
      }
    }
  }
}

// Adds -sum p log p of one side.
template <class T>
void entropy_block(const T* z, int steps, const SideLanes<T>& side, double* entropy) {
  using V = Vec<T>;
  for (int lane = 0; lane < kLanes<T>; lane += V::kLanes) {
    V sum(0.0);
    for (int step = 0; step < steps; ++step) {
      const V u = (V::load(z + step * kLanes<T> + lane) - side.max.vec(lane)) * side.inverse_temperature.vec(lane);
      const V log_p = u - side.logz.vec(lane), p = exp(log_p);
      sum = sum - select(p == V(0.0), V(0.0), p * log_p);
    }
    add_lanes(sum, lane, entropy);
  }
}

// part -> coefficient (part - probability sum), in place. probability is null where the sum is 0.
// `target`: where the next block's gradient will be stored.
template <class T>
void finish_block(T* part, const T* probability, int steps, const SideLanes<T>& side, const Ahead& target) {
  using V = Vec<T>;
  const V zero(0.0);
  for (int lane = 0; lane < kLanes<T>; lane += V::kLanes) {
    const V sum = side.sum.vec(lane), coefficient = side.coefficient.vec(lane);
    const auto silent = coefficient == zero;
    for (int step = 0; step < steps; ++step) {
      const int at = step * kLanes<T> + lane;
      target.touch(step, lane);
      V gradient = V::load(part + at);
      if (probability) gradient = fma(-V::load(probability + at), sum, gradient);
      select(silent, zero, coefficient * gradient).store(part + at);
    }
  }
}

// Adds the cross-entropy's gradient except for the label's own entry. q serves where the temperature is 1.
template <class T>
void add_hard_block(T* gradient, const T* q, const T* z, int steps, const SideLanes<T>& student,
                    const HardLanes<T>& hard) {
  using V = Vec<T>;
  const V zero(0.0);
  for (int lane = 0; lane < kLanes<T>; lane += V::kLanes) {
    const V coefficient = hard.coefficient.vec(lane), poison = hard.poison.vec(lane);
    const V max = student.max.vec(lane), logz = hard.logz.vec(lane);
    const auto silent = coefficient == zero;
    const auto tempered = hard.temperature_is_one.vec(lane) == zero;
    const bool any_tempered = tempered.any();
    for (int step = 0; step < steps; ++step) {
      const int at = step * kLanes<T> + lane;
      V probability = V::load(q + at);
      if (any_tempered) probability = select(tempered, exp(V::load(z + at) - max - logz), probability);
      (V::load(gradient + at) + select(silent, zero, coefficient * probability) + poison).store(gradient + at);
    }
  }
}

// logit -> z = scale * logit, or softcap * tanh(scale * logit / softcap).
template <class T>
void apply_head(T* z, int steps, double scale, double softcap) {
  using V = Vec<T>;
  const bool capped = softcap != 0.0;
  const V factor(capped ? scale / softcap : scale), cap(softcap);
  for (int at = 0; at < steps * kLanes<T>; at += V::kLanes) {
    const V x = V::load(z + at) * factor;
    (capped ? cap * tanh(x) : x).store(z + at);
  }
}

// The softcap's derivative 1 - (z / softcap)^2. A gradient of exactly 0 stays 0 whatever z is.
template <class T>
void chain_softcap(T* gradient, const T* z, int steps, double softcap) {
  using V = Vec<T>;
  const V inverse(1.0 / softcap), one(1.0), zero(0.0);
  for (int at = 0; at < steps * kLanes<T>; at += V::kLanes) {
    const V y = V::load(z + at) * inverse, g = V::load(gradient + at);
    select(g == zero, zero, g * (one - y) * (one + y)).store(gradient + at);
  }
}

}  // namespace KD_ISA
}  // namespace kd
