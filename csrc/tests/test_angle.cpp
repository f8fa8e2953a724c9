// The angle kernel against plain double code: every size of a row's end, gradients of either model or both.
#include <vector>

#include "../angle.h"
#include "check.h"
#include "numbers.h"

namespace {

using namespace row_test;
using Matrix = std::vector<double>;

struct Case {
  int64_t n, ld;
  double beta = 0.3;
  Matrix squared[2], inverse[2], grad[2], sums;

  Case(Random& random, int64_t n_) : n(n_), ld((n_ + kd::kAnglePadding - 1) / kd::kAnglePadding * kd::kAnglePadding) {
    for (int model = 0; model < 2; ++model) {
      Matrix points(n * 3);
      for (double& x : points) x = random.normal();
      if (n > 4) {  // two points that coincide, in one model only
        for (int d = 0; d < 3; ++d) points[(2 + model) * 3 + d] = points[d];
      }
      squared[model].assign(n * ld, 0.0);
      inverse[model].assign(n * ld, 0.0);
      grad[model].assign(n * ld, kNaN);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) {
          double s = 0.0;
          for (int d = 0; d < 3; ++d) s += std::pow(points[i * 3 + d] - points[j * 3 + d], 2);
          squared[model][i * ld + j] = s;
          inverse[model][i * ld + j] = s > 0.0 ? 1.0 / std::sqrt(s) : 0.0;
        }
    }
    sums.assign(n, kNaN);
  }

  kd::Angle arguments(int threads, bool student, bool teacher) {
    kd::Angle args;
    args.n = n;
    args.ld = ld;
    args.beta = beta;
    args.student = squared[0].data();
    args.student_inverse = inverse[0].data();
    args.teacher = squared[1].data();
    args.teacher_inverse = inverse[1].data();
    args.sums = sums.data();
    args.student_grad = student ? grad[0].data() : nullptr;
    args.teacher_grad = teacher ? grad[1].data() : nullptr;
    args.threads = threads;
    return args;
  }

  double cosine(int model, int64_t i, int64_t j, int64_t k) const {
    const Matrix& s = squared[model];
    return 0.5 * (s[i * ld + j] + s[i * ld + k] - s[j * ld + k]) * inverse[model][i * ld + j] *
           inverse[model][i * ld + k];
  }

  double total() const {
    double all = 0.0;
    for (double sum : sums) all += sum;
    return all;
  }
};

void verify(const Case& c, bool student, bool teacher) {
  double loss = 0.0;
  Matrix want[2] = {Matrix(c.n * c.ld, 0.0), Matrix(c.n * c.ld, 0.0)};
  for (int64_t i = 0; i < c.n; ++i)
    for (int64_t j = 0; j < c.n; ++j)
      for (int64_t k = 0; k < c.n; ++k) {
        const double d = c.cosine(0, i, j, k) - c.cosine(1, i, j, k), size = std::fabs(d);
        loss += size < c.beta ? 0.5 * d * d / c.beta : size - 0.5 * c.beta;
        const double slope = size < c.beta ? d / c.beta : d > 0.0 ? 1.0 : -1.0;
        for (int model = 0; model < 2; ++model) {
          const double g = model == 0 ? slope : -slope, cos = c.cosine(model, i, j, k);
          const double r_ij = c.inverse[model][i * c.ld + j], r_ik = c.inverse[model][i * c.ld + k];
          want[model][i * c.ld + j] += 0.5 * g * (r_ij * r_ik - cos * r_ij * r_ij);
          want[model][i * c.ld + k] += 0.5 * g * (r_ij * r_ik - cos * r_ik * r_ik);
          want[model][j * c.ld + k] -= 0.5 * g * r_ij * r_ik;
        }
      }
  CHECK(std::fabs(c.total() - loss) <= 1e-11 * (1.0 + loss), "loss %.12g, not %.12g (n %ld)", c.total(), loss,
        long(c.n));
  for (int model = 0; model < 2; ++model) {
    if (!(model == 0 ? student : teacher)) continue;
    for (int64_t i = 0; i < c.n; ++i)
      for (int64_t j = 0; j < i; ++j) {
        const double got = c.grad[model][i * c.ld + j] + c.grad[model][j * c.ld + i];
        const double g = want[model][i * c.ld + j] + want[model][j * c.ld + i];
        CHECK(std::fabs(got - g) <= 1e-10 * (1.0 + std::fabs(g)), "gradient %d %.12g, not %.12g (n %ld)", model, got, g,
              long(c.n));
      }
  }
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", kd::instruction_set());
  Random random{3};
  for (int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 17, 40})
    for (bool student : {false, true})
      for (bool teacher : {false, true}) {
        Case c(random, n);
        kd::angle(c.arguments(2, student, teacher));
        verify(c, student, teacher);
        const Matrix sums = c.sums, student_grad = c.grad[0], teacher_grad = c.grad[1];
        kd::angle(c.arguments(1, student, teacher));
        bool same = sums == c.sums;
        for (int64_t i = 0; i < n * c.ld; ++i) {
          if (student) same = same && student_grad[i] == c.grad[0][i];
          if (teacher) same = same && teacher_grad[i] == c.grad[1][i];
        }
        CHECK(same, "one thread: other bits (n %ld)", long(n));
      }
  Case broken(random, 9);
  broken.squared[0][3 * broken.ld + 4] = kNaN;
  kd::angle(broken.arguments(1, true, false));
  CHECK(std::isnan(broken.total()), "NaN: %g", broken.total());
  kd::angle(Case(random, 0).arguments(1, true, true));
  return check::finish();
}
