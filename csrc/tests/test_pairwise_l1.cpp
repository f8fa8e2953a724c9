// The pairwise_l1 kernel against sums in double: all storage types, groups, slabs, threads, gradients in place.
#include <algorithm>
#include <new>
#include <vector>

#include "../pairwise_l1.h"
#include "check.h"
#include "numbers.h"

namespace {

using namespace row_test;

struct Model {
  int64_t n, vocab;
  Dtype dtype;
  double scale, softcap;
  std::vector<char> logits, grad;
  std::vector<int64_t> offsets;
  std::vector<double> temperature, statistics, means;

  double z(int64_t row, int64_t v) const {
    const double x = scale * decode(logits.data() + (offsets[row] + v) * size_of(dtype), dtype);
    return softcap ? softcap * std::tanh(x / softcap) : x;
  }
  double probability(int64_t row, int64_t v) const {
    return std::exp((z(row, v) - statistics[2 * row]) / temperature[row] - statistics[2 * row + 1]);
  }

  Model(Random& random, int64_t n_, int64_t vocab_, Dtype dtype_, double softcap_)
      : n(n_), vocab(vocab_), dtype(dtype_), scale(0.75), softcap(softcap_), means(n_) {
    logits.resize(n * (vocab + 1) * size_of(dtype));
    grad.resize(logits.size());
    for (int64_t row = 0; row < n; ++row) {
      offsets.push_back((n - 1 - row) * (vocab + 1) + 1);
      for (int64_t v = -1; v < vocab; ++v)
        encode(v < 0 ? kNaN : 3.0 * random.normal(), logits.data() + (offsets[row] + v) * size_of(dtype), dtype);
      temperature.push_back(0.5 + random.uniform());
      double max = -kInf, sum = 0.0;
      for (int64_t v = 0; v < vocab; ++v) max = std::fmax(max, z(row, v));
      for (int64_t v = 0; v < vocab; ++v) sum += std::exp((z(row, v) - max) / temperature[row]);
      statistics.insert(statistics.end(), {max, std::log(sum)});
    }
  }

  kd::Side side(int64_t v) {
    kd::Side result;
    result.logits = logits.data() + v * size_of(dtype);
    result.dtype = result.grad_dtype = dtype;
    result.offsets = result.grad_offsets = offsets.data();
    result.scale = scale;
    result.softcap = softcap;
    result.temperature = temperature.data();
    result.grad = grad.data() + v * size_of(dtype);
    return result;
  }
};

double sign(double x) { return (x > 0.0) - (x < 0.0); }

struct Case {
  std::vector<int64_t> starts;
  int64_t longest;
  Model student, teacher;
  std::vector<double> cost, signs, d_cost;

  Case(Random& random, std::vector<int64_t> starts_, int64_t longest_, int64_t vocab, Dtype dtype, double softcap)
      : starts(starts_),
        longest(longest_),
        student(random, starts.back(), vocab, dtype, softcap),
        teacher(random, starts.back(), vocab, dtype, 0.0) {
    const size_t pairs = (starts.size() - 1) * longest * longest;
    for (size_t i = 0; i < pairs; ++i) d_cost.push_back(random.uniform() < 0.2 ? 0.0 : random.normal());
  }

  void run(unsigned phases, int threads, int64_t slab) {
    cost.assign(d_cost.size(), 0.0);
    signs.assign(d_cost.size(), 0.0);
    for (int64_t v = 0; v < student.vocab; v += slab) {
      kd::PairwiseL1 args;
      args.n = student.n;
      args.vocab = std::min(slab, student.vocab - v);
      args.student = student.side(v);
      args.teacher = teacher.side(v);
      args.groups = static_cast<int64_t>(starts.size()) - 1;
      args.longest = longest;
      args.starts = starts.data();
      args.student_statistics = student.statistics.data();
      args.teacher_statistics = teacher.statistics.data();
      args.cost = cost.data();
      args.signs = signs.data();
      args.d_cost = d_cost.data();
      args.student_means = student.means.data();
      args.teacher_means = teacher.means.data();
      args.threads = threads;
      kd::pairwise_l1(args, phases);
    }
  }

  template <class Visit>
  void pairs(const Visit& visit) const {
    for (size_t g = 0; g + 1 < starts.size(); ++g) {
      for (int64_t i = starts[g]; i < starts[g + 1]; ++i) {
        for (int64_t j = starts[g]; j < starts[g + 1]; ++j)
          visit(i, j, (g * longest + i - starts[g]) * longest + j - starts[g]);
      }
    }
  }
};

void verify_gradient(const Model& own, const std::vector<double>& sums, double tolerance, const char* name) {
  for (int64_t row = 0; row < own.n; ++row) {
    double mean = 0.0;
    for (int64_t v = 0; v < own.vocab; ++v) mean += own.probability(row, v) * sums[row * own.vocab + v];
    for (int64_t v = 0; v < own.vocab; ++v) {
      double want = own.probability(row, v) * (sums[row * own.vocab + v] - mean) * own.scale / own.temperature[row];
      if (own.softcap) want *= 1.0 - std::pow(own.z(row, v) / own.softcap, 2);
      const double got = decode(own.grad.data() + (own.offsets[row] + v) * size_of(own.dtype), own.dtype);
      CHECK(std::fabs(got - want) <= tolerance * (std::fabs(want) + 0.02), "%s row %d entry %d: %g, not %g", name,
            static_cast<int>(row), static_cast<int>(v), got, want);
    }
  }
}

void test(Random& random, std::vector<int64_t> starts, int64_t longest, int64_t vocab, Dtype dtype, double softcap) {
  Case c(random, starts, longest, vocab, dtype, softcap);
  c.run(kd::kTerms, 1, vocab);
  const double tolerance = dtype == Dtype::float64 ? 1e-12 : 2e-6;
  std::vector<double> of_student(c.student.n * vocab), of_teacher(c.teacher.n * vocab);
  c.pairs([&](int64_t i, int64_t j, int64_t at) {
    double cost = 0.0, signs = 0.0;
    for (int64_t v = 0; v < vocab; ++v) {
      const double p = c.student.probability(i, v), direction = sign(p - c.teacher.probability(j, v));
      cost += (p - c.teacher.probability(j, v)) * direction;
      signs += p * direction;
      of_student[i * vocab + v] += c.d_cost[at] * direction;
      of_teacher[j * vocab + v] -= c.d_cost[at] * direction;
    }
    CHECK(std::fabs(c.cost[at] - cost) <= tolerance, "cost %g, not %g", c.cost[at], cost);
    CHECK(std::fabs(c.signs[at] - signs) <= tolerance, "signs %g, not %g", c.signs[at], signs);
    c.student.means[i] += c.d_cost[at] * signs;
    c.teacher.means[j] += c.d_cost[at] * (cost - signs);
  });
  const std::vector<double> cost = c.cost, signs = c.signs;
  c.run(kd::kTerms | kd::kGradient, 3, vocab);
  CHECK(c.cost == cost && c.signs == signs, "three threads give other sums than one");
  const double of_gradient = dtype == Dtype::float64 ? 1e-11 : std::fmax(2e-4, 2.0 * relative_rounding(dtype));
  verify_gradient(c.student, of_student, of_gradient, "student");
  verify_gradient(c.teacher, of_teacher, of_gradient, "teacher");
  c.run(kd::kTerms, 2, 77);
  for (size_t at = 0; at < cost.size(); ++at)
    CHECK(std::fabs(c.cost[at] - cost[at]) <= tolerance, "slabs: %g, not %g", c.cost[at], cost[at]);
}

// What a silent pair or row holds reaches nothing.
void test_silence(Random& random) {
  Case c(random, {0, 3}, 3, 100, Dtype::float32, 0.0);
  for (int64_t i = 0; i < 3; ++i) c.d_cost[3 * i + 1] = c.d_cost[3 + i] = 0.0;
  c.student.statistics[2] = c.teacher.statistics[2] = kNaN;
  c.run(kd::kGradient, 1, 100);
  for (const Model* model : {&c.student, &c.teacher}) {
    for (int64_t row = 0; row < 3; ++row) {
      for (int64_t v = 0; v < 100; ++v) {
        const double got = decode(model->grad.data() + (model->offsets[row] + v) * 4, Dtype::float32);
        CHECK(row == 1 ? got == 0.0 : std::isfinite(got), "row %d: %g", static_cast<int>(row), got);
      }
    }
  }
}

// More groups than a tile has room for, whether each thread has a tile or all share one.
void test_tiles(Random& random) {
  std::vector<int64_t> starts{0};
  for (int64_t group = 0; group < 60; ++group) starts.push_back(starts.back() + group % 5);
  test(random, starts, 4, 1100, Dtype::float32, 0.0);
  test(random, {0, 1000, 1001, 2050, 2060}, 1060, 5, Dtype::float64, 0.0);
}

// Before any row is read. Without the sanitizer's allocator a system may grant any size.
void test_memory_that_is_not_there() {
#ifdef __SANITIZE_ADDRESS__
  kd::PairwiseL1 args;
  args.n = args.longest = int64_t{1} << 30;
  args.vocab = args.groups = 1;
  args.threads = 3;
  bool refused = false;
  try {
    kd::pairwise_l1(args, kd::kGradient);
  } catch (const std::bad_alloc&) {
    refused = true;
  }
  CHECK(refused, "8 TiB were there");
#endif
}

}  // namespace

// Memory that is not there is no error of the sanitizer's.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "allocator_may_return_null=1";
}

int main() {
  Random random{42};
  for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float64}) {
    test(random, {0, 5}, 5, 1300, dtype, 0.0);
    test(random, {0, 1, 1, 8, 10}, 7, 333, dtype, 4.0);
    test(random, {0, 2}, 3, 3, dtype, 0.0);
  }
  test_silence(random);
  test_tiles(random);
  test_memory_that_is_not_there();
  return check::finish();
}
