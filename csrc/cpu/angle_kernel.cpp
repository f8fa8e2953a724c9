// The angle kernel for one instruction set. A row j of both gradients is made by one thread from all vertices i in
// their order, so that nothing depends on which thread it was; columns k run along the lanes.
#include "../angle.h"
#include "isa.h"
#include "smooth_l1.h"
#include "strip.h"

namespace kd {
namespace KD_ISA {
namespace {

using V = Vec<double>;
constexpr int kRows = 2;  // rows j at a time: what is read of row i serves them all

// One model's two matrices and its gradient.
struct Points {
  const double* squared;
  const double* inverse;
  double* grad;
};

// What one vertex gives to s_ij, summed over k.
struct VertexSums {
  V inverse, along;  // slope r_ik, slope cos
};

class AngleRunner {
 public:
  explicit AngleRunner(const Angle& args)
      : args_(args),
        student_{args.student, args.student_inverse, args.student_grad},
        teacher_{args.teacher, args.teacher_inverse, args.teacher_grad} {}

  void run(int64_t strip) {
    const int64_t first = strip * kRows, left = args_.n - first;
    if (left < kRows) {
      for (int64_t j = first; j < args_.n; ++j) choose<1>(j);
    } else {
      choose<kRows>(first);
    }
  }

 private:
  template <int rows>
  void choose(int64_t first) {
    if (student_.grad && teacher_.grad) {
      walk<rows, true, true>(first);
    } else if (student_.grad) {
      walk<rows, true, false>(first);
    } else if (teacher_.grad) {
      walk<rows, false, true>(first);
    } else {
      walk<rows, false, false>(first);
    }
  }

  template <int rows, bool kStudent, bool kTeacher>
  void walk(int64_t first) {
    const int64_t ld = args_.ld;
    const SmoothL1 smooth(args_.beta);
    V total[rows];
    for (int j = 0; j < rows; ++j) total[j] = V(0.0);
    if (kStudent) clear(student_, first, rows);
    if (kTeacher) clear(teacher_, first, rows);
    for (int64_t i = 0; i < args_.n; ++i) {
      V s_ij[rows], t_ij[rows], s_half[rows], t_half[rows];
      VertexSums student[rows], teacher[rows];
      for (int j = 0; j < rows; ++j) {
        const int64_t at = i * ld + first + j;
        s_ij[j] = V(student_.squared[at]);
        t_ij[j] = V(teacher_.squared[at]);
        s_half[j] = V(0.5 * student_.inverse[at]);
        t_half[j] = V(0.5 * teacher_.inverse[at]);
        student[j] = teacher[j] = {V(0.0), V(0.0)};
      }
      for (int64_t k = 0; k < ld; k += V::kLanes) {
        const V s_ik = V::load(student_.squared + i * ld + k), s_r = V::load(student_.inverse + i * ld + k);
        const V t_ik = V::load(teacher_.squared + i * ld + k), t_r = V::load(teacher_.inverse + i * ld + k);
#pragma GCC unroll 4
        for (int j = 0; j < rows; ++j) {
          const int64_t at = (first + j) * ld + k;
          const V s_cos = (s_ij[j] + s_ik - V::load(student_.squared + at)) * s_half[j] * s_r;
          const V t_cos = (t_ij[j] + t_ik - V::load(teacher_.squared + at)) * t_half[j] * t_r;
          const V slope = smooth.slope(s_cos - t_cos);
          total[j] = smooth.add_term(slope, s_cos - t_cos, total[j]);
          if (kStudent) add(student_, student[j], slope, s_cos, s_half[j], s_r, at);
          if (kTeacher) add(teacher_, teacher[j], slope, t_cos, t_half[j], t_r, at);
        }
      }
      if (kStudent) add_vertex(student_, student, first, rows, i);
      if (kTeacher) add_vertex(teacher_, teacher, first, rows, i);
    }
    for (int j = 0; j < rows; ++j) args_.sums[first + j] = sum_lanes(total[j]);
    if (kTeacher) negate(teacher_, first, rows);
  }

  void clear(const Points& points, int64_t first, int rows) const {
    for (int64_t at = first * args_.ld; at < (first + rows) * args_.ld; ++at) points.grad[at] = 0.0;
  }

  KD_INLINE static void add(const Points& points, VertexSums& sums, V slope, V cosine, V half, V r, int64_t at) {
    const V weighted = slope * r;
    sums.inverse = sums.inverse + weighted;
    sums.along = fma(slope, cosine, sums.along);
    fma(-half, weighted, V::load(points.grad + at)).store(points.grad + at);
  }

  // To s_ji: r_ij (sum of slope r_ik) - r_ij^2 (sum of slope cos).
  void add_vertex(const Points& points, const VertexSums* sums, int64_t first, int rows, int64_t i) const {
    for (int j = 0; j < rows; ++j) {
      const double r = points.inverse[i * args_.ld + first + j];
      points.grad[(first + j) * args_.ld + i] += r * (sum_lanes(sums[j].inverse) - r * sum_lanes(sums[j].along));
    }
  }

  void negate(const Points& points, int64_t first, int rows) const {
    for (int64_t at = first * args_.ld; at < (first + rows) * args_.ld; ++at) points.grad[at] = -points.grad[at];
  }

  const Angle& args_;
  const Points student_, teacher_;
};

}  // namespace

void angle(const Angle& args) {
  const double entries = static_cast<double>(args.n) * static_cast<double>(args.n) * static_cast<double>(args.n);
  run_strips<AngleRunner>((args.n + kRows - 1) / kRows, entries, args.threads, args);
}

}  // namespace KD_ISA
}  // namespace kd
