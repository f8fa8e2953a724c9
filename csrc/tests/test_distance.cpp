// The distance kernel against plain double code: every size of a row's end, pairs that do not count, points that
// coincide, gradients of either model or both.
#include <vector>

#include "../distance.h"
#include "check.h"
#include "numbers.h"

namespace {

using namespace row_test;
using Matrix = std::vector<double>;

struct Case {
  int64_t n, ld;
  double eps, beta = 0.3, numbers[6];
  Matrix squared[2], grad[2], statistics, terms;

  Case(Random& random, int64_t n_, double eps_)
      : n(n_), ld((n_ + kd::kDistancePadding - 1) / kd::kDistancePadding * kd::kDistancePadding), eps(eps_) {
    for (int model = 0; model < 2; ++model) {
      Matrix points(n * 3);
      for (double& x : points) x = random.normal();
      if (n > 4) {  // two points that coincide, in one model only
        for (int d = 0; d < 3; ++d) points[(2 + model) * 3 + d] = points[d];
      }
      squared[model].assign(n * ld, -1.0);
      grad[model].assign(n * ld, kNaN);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) {
          if (i == j || (n > 7 && (i == 5 || j == 5))) continue;  // a row that does not count
          double s = 0.0;
          for (int d = 0; d < 3; ++d) s += std::pow(points[i * 3 + d] - points[j * 3 + d], 2);
          squared[model][i * ld + j] = s;
        }
    }
    statistics.assign(4 * n, kNaN);
    terms.assign(3 * n, kNaN);
    for (double& x : numbers) x = kNaN;
  }

  // Every phase, with the numbers in between as the driver makes them.
  void run(int threads, bool student, bool teacher) {
    kd::Distance args;
    args.n = n;
    args.ld = ld;
    args.numbers = numbers;
    args.student = squared[0].data();
    args.teacher = squared[1].data();
    args.statistics = statistics.data();
    args.terms = terms.data();
    args.student_grad = student ? grad[0].data() : nullptr;
    args.teacher_grad = teacher ? grad[1].data() : nullptr;
    args.threads = threads;
    numbers[kd::kBeta] = beta;
    numbers[kd::kEps] = eps;
    kd::distance(args, kd::kStatistics);
    double positive[2];
    for (int model = 0; model < 2; ++model) {
      positive[model] = std::fmax(sum(statistics, 2 * model + 1), 1.0);
      const double mean = sum(statistics, 2 * model) / positive[model];
      numbers[kd::kStudentMean + model] = mean == 0.0 ? 1.0 : mean;
    }
    kd::distance(args, kd::kTerms);
    for (int model = 0; model < 2; ++model)
      numbers[kd::kStudentShift + model] = sum(terms, 1 + model) / positive[model];
    kd::distance(args, kd::kGradient);
  }

  double sum(const Matrix& rows, int line) const {
    double all = 0.0;
    for (int64_t i = 0; i < n; ++i) all += rows[line * n + i];
    return all;
  }

  double distance(int model, int64_t at) const {
    const double s = squared[model][at];
    return s < 0.0 ? 0.0 : std::sqrt(s <= eps ? eps : s);
  }
};

void verify(const Case& c, bool student, bool teacher) {
  double mean[2], count[2], loss = 0.0, through_mean[2] = {0.0, 0.0};
  for (int model = 0; model < 2; ++model) {
    double sum = 0.0;
    count[model] = 0.0;
    for (int64_t at = 0; at < c.n * c.ld; ++at) {
      sum += c.distance(model, at);
      count[model] += c.distance(model, at) > 0.0;
    }
    mean[model] = count[model] > 0.0 ? sum / count[model] : 1.0;
    CHECK(c.sum(c.statistics, 2 * model + 1) == count[model], "count %g (n %ld)", count[model], long(c.n));
  }
  Matrix slopes(c.n * c.ld);
  for (int64_t at = 0; at < c.n * c.ld; ++at) {
    const double x[2] = {c.distance(0, at) / mean[0], c.distance(1, at) / mean[1]};
    const double difference = x[0] - x[1], size = std::fabs(difference);
    loss += size < c.beta ? 0.5 * difference * difference / c.beta : size - 0.5 * c.beta;
    slopes[at] = size < c.beta ? difference / c.beta : difference > 0.0 ? 1.0 : -1.0;
    for (int model = 0; model < 2; ++model) through_mean[model] += slopes[at] * x[model];
  }
  CHECK(std::fabs(c.sum(c.terms, 0) - loss) <= 1e-12 * (1.0 + loss), "loss %.12g, not %.12g (n %ld)", c.sum(c.terms, 0),
        loss, long(c.n));
  for (int model = 0; model < 2; ++model) {
    if (!(model == 0 ? student : teacher)) continue;
    for (int64_t at = 0; at < c.n * c.ld; ++at) {
      const double s = c.squared[model][at], got = c.grad[model][at];
      double want = 0.0;
      if (s > c.eps) {
        want = (slopes[at] - through_mean[model] / count[model]) / (2.0 * std::sqrt(s) * mean[model]);
      }
      if (model == 1) want = -want;
      CHECK(std::fabs(got - want) <= 1e-12 * (1.0 + std::fabs(want)), "gradient %d %.12g, not %.12g (n %ld)", model,
            got, want, long(c.n));
    }
  }
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", kd::instruction_set());
  Random random{3};
  for (int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 17, 40, 150})  // the last is work for two threads
    for (double eps : {1e-12, 0.0, 0.5})
      for (bool student : {false, true})
        for (bool teacher : {false, true}) {
          Case c(random, n, eps);
          c.run(2, student, teacher);
          verify(c, student, teacher);
          const Case other = c;
          c.run(1, student, teacher);
          bool same = c.statistics == other.statistics && c.terms == other.terms;
          if (student) same = same && c.grad[0] == other.grad[0];
          if (teacher) same = same && c.grad[1] == other.grad[1];
          CHECK(same, "one thread: other bits (n %ld)", long(n));
        }
  Case flat(random, 9, 0.0);  // no distance, no mean, no gradient
  for (double& s : flat.squared[0]) s = s < 0.0 ? s : 0.0;
  flat.run(1, true, true);
  verify(flat, true, true);
  Case broken(random, 9, 1e-12);
  broken.squared[0][3 * broken.ld + 4] = kNaN;
  broken.run(1, true, false);
  CHECK(std::isnan(broken.sum(broken.terms, 0)), "NaN: %g", broken.sum(broken.terms, 0));
  CHECK(std::isnan(broken.grad[0][4]) && broken.grad[0][0] == 0.0, "NaN: %g", broken.grad[0][4]);
  Case(random, 0, 0.0).run(1, true, true);
  return check::finish();
}
