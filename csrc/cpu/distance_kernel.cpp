// The distance kernel for one instruction set. A row is one thread's in every phase, columns run along the lanes.
#include "../distance.h"
#include "isa.h"
#include "smooth_l1.h"
#include "strip.h"

namespace kd {
namespace KD_ISA {
namespace {

using V = Vec<double>;
constexpr int kRows = 4;  // to a strip: one alone is less work than handing it out

class DistanceRunner {
 public:
  DistanceRunner(const Distance& args, unsigned phase)
      : args_(args),
        phase_(phase),
        eps_(args.numbers[kEps]),
        root_eps_(sqrt(V(args.numbers[kEps]))),
        smooth_(args.numbers[kBeta]),
        student_{args.student, args.student_grad, V(args.numbers[kStudentMean]), V(args.numbers[kStudentShift])},
        teacher_{args.teacher, args.teacher_grad, V(args.numbers[kTeacherMean]), V(args.numbers[kTeacherShift])} {}

  void run(int64_t strip) {
    const int64_t first = strip * kRows, end = first + kRows < args_.n ? first + kRows : args_.n;
    for (int64_t row = first; row < end; ++row) {
      if (phase_ == kStatistics) {
        statistics(student_, row, args_.statistics);
        statistics(teacher_, row, args_.statistics + 2 * args_.n);
      } else if (phase_ == kTerms) {
        terms(row);
      } else if (student_.grad && teacher_.grad) {
        gradient<true, true>(row);
      } else if (student_.grad) {
        gradient<true, false>(row);
      } else if (teacher_.grad) {
        gradient<false, true>(row);
      }
    }
  }

 private:
  struct Points {
    const double* squared;
    double* grad;
    V mean, shift;
  };

  KD_INLINE V distance_of(V s) const {
    return select(s < V(0.0), V(0.0), select(s <= eps_, root_eps_, sqrt(s)));  // NaN stays
  }

  void statistics(const Points& points, int64_t row, double* out) const {
    V sum(0.0), positive(0.0);
    for (int64_t k = 0; k < args_.ld; k += V::kLanes) {
      const V d = distance_of(V::load(points.squared + row * args_.ld + k));
      sum = sum + d;
      positive = positive + select(d == V(0.0), V(0.0), V(1.0));
    }
    out[row] = sum_lanes(sum);
    out[args_.n + row] = sum_lanes(positive);
  }

  void terms(int64_t row) const {
    V total(0.0), student(0.0), teacher(0.0);
    for (int64_t at = row * args_.ld; at < (row + 1) * args_.ld; at += V::kLanes) {
      const V x = distance_of(V::load(student_.squared + at)) / student_.mean;
      const V y = distance_of(V::load(teacher_.squared + at)) / teacher_.mean;
      const V slope = smooth_.slope(x - y);
      total = smooth_.add_term(slope, x - y, total);
      student = fma(slope, x, student);
      teacher = fma(slope, y, teacher);
    }
    args_.terms[row] = sum_lanes(total);
    args_.terms[args_.n + row] = sum_lanes(student);
    args_.terms[2 * args_.n + row] = sum_lanes(teacher);
  }

  template <bool kStudent, bool kTeacher>
  void gradient(int64_t row) const {
    for (int64_t at = row * args_.ld; at < (row + 1) * args_.ld; at += V::kLanes) {
      const V s = V::load(student_.squared + at), t = V::load(teacher_.squared + at);
      const V d = distance_of(s), e = distance_of(t);
      const V slope = smooth_.slope(d / student_.mean - e / teacher_.mean);
      if (kStudent) with_respect_to(student_, s, d, slope).store(student_.grad + at);
      if (kTeacher) (-with_respect_to(teacher_, t, e, slope)).store(teacher_.grad + at);
    }
  }

  KD_INLINE V with_respect_to(const Points& points, V s, V d, V slope) const {
    return select(s <= eps_, V(0.0), (slope - points.shift) * V(0.5) / (points.mean * d));
  }

  const Distance& args_;
  const unsigned phase_;
  const V eps_, root_eps_;
  const SmoothL1 smooth_;
  const Points student_, teacher_;
};

}  // namespace

void distance(const Distance& args, unsigned phases) {
  const double entries = static_cast<double>(args.n) * static_cast<double>(args.n);
  for (unsigned phase = kStatistics; phase <= kGradient; phase *= 2) {
    if (phases & phase) run_strips<DistanceRunner>((args.n + kRows - 1) / kRows, entries, args.threads, args, phase);
  }
}

}  // namespace KD_ISA
}  // namespace kd
