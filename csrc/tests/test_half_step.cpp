// The half_step kernel against plain double code: every size of a block's end, both directions, both precisions.
#include <vector>

#include "../half_step.h"
#include "check.h"
#include "numbers.h"

namespace {

using namespace row_test;

template <class T>
struct Case {
  int64_t count, n, m, ld, x_ld, weight_ld, out_ld;
  bool transposed, divide;
  std::vector<T> kernel, x, weight, extra, out;

  Case(Random& random, int64_t count_, int64_t n_, int64_t m_, bool transposed_, bool divide_)
      : count(count_), n(n_), m(m_), ld(m_ + 3), transposed(transposed_), divide(divide_) {
    const auto draw = [&](std::vector<T>& values, int64_t size) {
      values.resize(size);
      for (T& value : values) value = static_cast<T>(std::fabs(random.normal()) + 0.1);
    };
    draw(kernel, n * ld);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = m; j < ld; ++j) kernel[i * ld + j] = static_cast<T>(kNaN);  // not the kernel's
    x_ld = inner() + 1;
    weight_ld = outer() + 2;
    out_ld = outer() + 4;
    draw(x, count * x_ld);
    draw(weight, count * weight_ld);
    draw(extra, outer());
    weight[0] = 0;
    out.assign(count * out_ld, T(7));
  }

  int64_t inner() const { return transposed ? n : m; }
  int64_t outer() const { return transposed ? m : n; }

  void run(int threads, bool with_extra) {
    kd::HalfStep args;
    args.count = count;
    args.n = n;
    args.m = m;
    args.wide = sizeof(T) == 8;
    args.transposed = transposed;
    args.divide = divide;
    args.kernel = kernel.data();
    args.ld = ld;
    args.x = x.data();
    args.x_ld = x_ld;
    args.weight = weight.data();
    args.weight_ld = weight_ld;
    args.extra = with_extra ? extra.data() : nullptr;
    args.out = out.data();
    args.out_ld = out_ld;
    args.threads = threads;
    kd::half_step(args);
  }

  void verify(bool with_extra) const {
    const double bar = (sizeof(T) == 8 ? 1e-13 : 1e-5);
    for (int64_t b = 0; b < count; ++b)
      for (int64_t o = 0; o < outer(); ++o) {
        double sum = 0.0;
        for (int64_t i = 0; i < inner(); ++i)
          sum += static_cast<double>(x[b * x_ld + i]) * (transposed ? kernel[i * ld + o] : kernel[o * ld + i]);
        const double w = weight[b * weight_ld + o], got = out[b * out_ld + o];
        const double want = divide ? w / (sum + (with_extra ? extra[o] : T(0))) : w * sum;
        CHECK(std::fabs(got - want) <= bar * std::fabs(want), "%.9g, not %.9g (%ld x %ld x %ld, %d %d)", got, want,
              long(count), long(n), long(m), transposed, divide);
      }
    for (int64_t b = 0; b < count; ++b)
      for (int64_t o = outer(); o < out_ld; ++o) CHECK(out[b * out_ld + o] == 7, "written past a row's end");
  }
};

template <class T>
void sizes(Random& random) {
  for (int64_t count : {1, 2, 3, 4, 5, 8, 9, 17})
    for (int64_t n : {1, 2, 4, 7, 65})
      for (int64_t m : {1, 3, 8, 16, 50, 103})
        for (bool transposed : {false, true})
          for (bool divide : {false, true}) {
            const bool with_extra = (count + n + m) % 2 == 0;
            Case<T> c(random, count, n, m, transposed, divide);
            c.run(2, with_extra);
            c.verify(with_extra);
            const std::vector<T> two = c.out;
            c.run(1, with_extra);
            CHECK(two == c.out, "one thread: other bits (%ld x %ld x %ld)", long(count), long(n), long(m));
          }
}

// Nothing divided by nothing is nothing; something by nothing too; NaN stays.
template <class T>
void edges(Random& random) {
  for (bool transposed : {false, true}) {
    Case<T> c(random, 3, 5, 5, transposed, true);
    for (int64_t i = 0; i < 5; ++i) c.x[c.x_ld + i] = 0;
    c.x[2 * c.x_ld + 3] = static_cast<T>(kNaN);
    c.run(1, false);
    CHECK(c.out[0] == 0 && c.out[1] > 0, "no weight: %g", double(c.out[0]));
    for (int64_t i = 0; i < 5; ++i) {
      CHECK(c.out[c.out_ld + i] == 0, "no denominator: %g", double(c.out[c.out_ld + i]));
      CHECK(std::isnan(c.out[2 * c.out_ld + i]), "NaN: %g", double(c.out[2 * c.out_ld + i]));
    }
  }
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", kd::instruction_set());
  Random random{5};
  sizes<float>(random);
  sizes<double>(random);
  edges<float>(random);
  edges<double>(random);
  Case<float>(random, 1, 0, 4, false, true).run(1, false);
  return check::finish();
}
