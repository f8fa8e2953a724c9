// The gibbs kernel against plain double code: every size of a line's end, along rows and columns, infinite costs.
#include <vector>

#include "../gibbs.h"
#include "check.h"
#include "numbers.h"

namespace {

using namespace row_test;

template <class T>
struct Case {
  int64_t n, m, ld, out_ld;
  bool by_column;
  double epsilon = 0.3;
  std::vector<T> cost, shift, reach, kernel, weighted;

  Case(Random& random, int64_t n_, int64_t m_, bool by_column_)
      : n(n_), m(m_), ld(m_ + 3), out_ld(m_ + 5), by_column(by_column_) {
    cost.resize(n * ld);
    for (T& x : cost) x = static_cast<T>(random.normal() + 2.0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = m; j < ld; ++j) cost[i * ld + j] = T(-1e9);  // not the cost's
    if (n > 2 && m > 2) {
      cost[ld + 1] = static_cast<T>(kInf);
      for (int64_t k = 0; k < (by_column ? n : m); ++k) at(2, k) = static_cast<T>(kInf);  // a line of nothing else
    }
    for (auto* line : {&shift, &reach}) line->assign(lines(), static_cast<T>(kNaN));
    for (auto* matrix : {&kernel, &weighted}) matrix->assign(n * out_ld, T(7));
  }

  int64_t lines() const { return by_column ? m : n; }
  T& at(int64_t line, int64_t k) { return by_column ? cost[k * ld + line] : cost[line * ld + k]; }

  void run(int threads) {
    kd::Gibbs args;
    args.n = n;
    args.m = m;
    args.wide = sizeof(T) == 8;
    args.by_column = by_column;
    args.epsilon = epsilon;
    args.cost = cost.data();
    args.ld = ld;
    args.shift = shift.data();
    args.reach = reach.data();
    args.kernel = kernel.data();
    args.weighted = weighted.data();
    args.out_ld = out_ld;
    args.threads = threads;
    kd::gibbs(args);
  }

  void verify() {
    const double bar = sizeof(T) == 8 ? 1e-14 : 3e-6;
    for (int64_t line = 0; line < lines(); ++line) {
      double least = kInf, most = -kInf;
      for (int64_t k = 0; k < (by_column ? n : m); ++k) {
        const double x = at(line, k);
        if (x < least) least = x;
        if (x < kInf && x > most) most = x;
      }
      if (least == kInf) least = most = 0.0;
      CHECK(shift[line] == T(least), "shift %g, not %g", double(shift[line]), least);
      CHECK(reach[line] == T(most) - T(least), "reach %g, not %g", double(reach[line]), most - least);
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < out_ld; ++j) {
        const double got = kernel[i * out_ld + j], times = weighted[i * out_ld + j];
        if (j >= m) {
          CHECK(got == 7 && times == 7, "written past a row's end");
          continue;
        }
        const double x = cost[i * ld + j];
        const double want = std::exp((static_cast<double>(shift[by_column ? j : i]) - x) / epsilon);
        CHECK(std::fabs(got - want) <= bar * want, "kernel %.9g, not %.9g", got, want);
        const double wanted = want == 0.0 ? 0.0 : want * x;
        CHECK(std::fabs(times - wanted) <= 2 * bar * std::fabs(wanted), "weighted %.9g, not %.9g", times, wanted);
      }
  }
};

template <class T>
void sizes(Random& random) {
  for (int64_t n : {1, 2, 5, 33})
    for (int64_t m : {1, 3, 8, 16, 50, 103})
      for (bool by_column : {false, true}) {
        Case<T> c(random, n, m, by_column);
        c.run(2);
        c.verify();
        const std::vector<T> kernel = c.kernel, weighted = c.weighted;
        c.run(1);
        CHECK(kernel == c.kernel && weighted == c.weighted, "one thread: other bits (%ld x %ld)", long(n), long(m));
      }
  Case<T> broken(random, 5, 7, false);
  broken.cost[0] = static_cast<T>(kNaN);
  broken.run(1);
  CHECK(std::isnan(broken.kernel[0]) && std::isnan(broken.weighted[0]), "NaN: %g", double(broken.kernel[0]));
  CHECK(!std::isnan(broken.kernel[1]), "NaN spread");
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", kd::instruction_set());
  Random random{6};
  sizes<float>(random);
  sizes<double>(random);
  return check::finish();
}
