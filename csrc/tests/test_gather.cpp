// The gather kernel against plain double code: both layouts, all storage types, every coefficient.
#include <algorithm>
#include <vector>

#include "../gather.h"
#include "check.h"
#include "numbers.h"

namespace {

using namespace row_test;

struct Case {
  int64_t n, vocab, k;
  bool row_major;
  Dtype dtype;
  double scale = 0.8, softcap = 6.0;
  std::vector<char> logits, grad;
  std::vector<int64_t> offsets;
  std::vector<int32_t> ids;
  std::vector<double> temperature, gathered, statistics, soft, slope, hard, at_ids;

  int64_t index(int64_t row, int64_t v) const { return row_major ? row * vocab + v : v * n + row; }
  double raw(int64_t row, int64_t v) const { return decode(logits.data() + index(row, v) * size_of(dtype), dtype); }
  double z(int64_t row, int64_t v) const {
    const double x = scale * raw(row, v);
    return softcap == 0.0 ? x : softcap * std::tanh(x / softcap);
  }
  double gradient(int64_t row, int64_t v) const { return decode(grad.data() + index(row, v) * size_of(dtype), dtype); }
  int64_t place(int64_t row, int64_t v) const {  // among the row's ids, or -1
    for (int64_t j = 0; j < k; ++j)
      if (ids[row * k + j] == v) return j;
    return -1;
  }

  Case(Random& random, int64_t n_, int64_t vocab_, int64_t k_, bool row_major_, Dtype dtype_, bool tempered)
      : n(n_), vocab(vocab_), k(k_), row_major(row_major_), dtype(dtype_) {
    logits.resize(n * vocab * size_of(dtype));
    for (int64_t i = 0; i < n * vocab; ++i) {
      const double value = random.uniform() < 0.03 ? -kInf : 3.0 * random.normal();
      encode(softcap == 0.0 || std::isfinite(value) ? value : -1e4, logits.data() + i * size_of(dtype), dtype);
    }
    grad.assign(logits.size(), 0x7f);
    for (int64_t row = 0; row < n; ++row) {
      offsets.push_back(row * vocab);
      temperature.push_back(tempered ? 0.6 + random.uniform() : 1.0);
      std::vector<int32_t> chosen(k, -1);
      for (int64_t j = row % 2; j < k; ++j) {  // every other row has one id less
        int32_t id;
        do {
          id = static_cast<int32_t>(random.uniform() * static_cast<double>(vocab));
        } while (std::count(chosen.begin(), chosen.end(), id));
        chosen[j] = id;
      }
      std::sort(chosen.begin(), chosen.end());
      ids.insert(ids.end(), chosen.begin(), chosen.end());
      for (auto* numbers : {&soft, &slope, &hard}) numbers->push_back(random.normal());
    }
    for (int64_t i = 0; i < n * k; ++i) at_ids.push_back(random.normal());
    gathered.assign(n * k, kNaN);
    statistics.assign(n * kd::kGatherColumns, kNaN);
  }

  kd::Gather arguments(int threads) {
    kd::Gather args;
    args.n = n;
    args.vocab = vocab;
    args.side.logits = logits.data();
    args.side.grad = grad.data();
    args.side.dtype = args.side.grad_dtype = dtype;
    args.side.offsets = args.side.grad_offsets = row_major ? offsets.data() : nullptr;
    args.side.ld = args.side.grad_ld = row_major ? 0 : n;
    args.side.scale = scale;
    args.side.softcap = softcap;
    args.side.temperature = temperature.data();
    args.k = k;
    args.ids = ids.data();
    args.gathered = gathered.data();
    args.statistics = statistics.data();
    args.hard = args.means = true;
    args.soft = soft.data();
    args.slope = slope.data();
    args.hard_weight = hard.data();
    args.at_ids = at_ids.data();
    args.threads = threads;
    return args;
  }
};

void verify(const Case& c) {
  const double tolerance = c.dtype == Dtype::float64 ? 1e-11 : 6e-6;
  for (int64_t row = 0; row < c.n; ++row) {
    double max = -kInf, sum = 0.0, sum_hard = 0.0, mean = 0.0;
    for (int64_t v = 0; v < c.vocab; ++v)
      if (c.place(row, v) < 0) max = std::max(max, c.z(row, v));
    for (int64_t v = 0; v < c.vocab; ++v) {
      if (c.place(row, v) >= 0) continue;
      const double x = (c.z(row, v) - max) / c.temperature[row];
      sum += std::exp(x);
      mean += std::isfinite(x) ? std::exp(x) * x : 0.0;
      sum_hard += std::exp(c.z(row, v) - max);
    }
    mean = sum == 0.0 ? 0.0 : mean / sum;
    const double want[] = {max, std::log(sum), std::log(sum_hard), mean};
    for (int i = 0; i < kd::kGatherColumns; ++i) {
      const double got = c.statistics[row * kd::kGatherColumns + i];
      CHECK(got == want[i] || std::fabs(got - want[i]) <= tolerance * (1 + std::fabs(want[i])),
            "statistic %d: %.9g, not %.9g (V %ld, K %ld)", i, got, want[i], long(c.vocab), long(c.k));
    }
    for (int64_t j = 0; j < c.k; ++j) {
      const int32_t id = c.ids[row * c.k + j];
      const double got = c.gathered[row * c.k + j], z = id < 0 ? -kInf : c.z(row, id);
      CHECK(got == z || std::fabs(got - z) <= tolerance * (1 + std::fabs(z)), "gathered %.9g, not %.9g", got, z);
    }
    for (int64_t v = 0; v < c.vocab; ++v) {
      const int64_t j = c.place(row, v);
      const double z = c.z(row, v), log_share = (z - max) / c.temperature[row] - std::log(sum);
      double g;
      if (j >= 0) {
        g = c.at_ids[row * c.k + j];
      } else {
        g = std::exp(log_share) * (c.soft[row] + c.slope[row] * log_share) + c.hard[row] * std::exp(z - max) / sum_hard;
      }
      const double y = c.softcap == 0.0 ? 0.0 : z / c.softcap;
      g *= c.scale * (1 - y * y);
      const double got = c.gradient(row, v), bar = tolerance + relative_rounding(c.dtype) * std::fabs(g);
      CHECK(std::fabs(got - g) <= bar, "gradient %.9g, not %.9g (V %ld, K %ld)", got, g, long(c.vocab), long(c.k));
    }
  }
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", kd::instruction_set());
  Random random{7};
  for (bool row_major : {true, false})
    for (Dtype dtype : {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16})
      for (int64_t vocab : {1, 2, 31, 33, 200, 1100, 2049})
        for (int64_t k : {0, 1, 8})
          for (int64_t n : {1, 3, 37}) {
            if (k >= vocab) continue;
            Case c(random, n, vocab, k, row_major, dtype, n != 3);
            kd::gather(c.arguments(2), kd::kStatistics | kd::kGradient);
            verify(c);
            const std::vector<char> gradient = c.grad;
            kd::gather(c.arguments(1), kd::kGradient);
            CHECK(gradient == c.grad, "one thread, one phase: other bits");
          }
  Case whole(random, 2, 5, 5, true, Dtype::float32, false);  // no others
  for (int64_t row = 0; row < 2; ++row)
    for (int32_t v = 0; v < 5; ++v) whole.ids[row * 5 + v] = v;
  kd::gather(whole.arguments(1), kd::kStatistics | kd::kGradient);
  CHECK(whole.statistics[1] == -kInf && whole.statistics[3] == 0.0, "no others: %g", whole.statistics[1]);
  for (int64_t v = 0; v < 5; ++v) CHECK(std::isfinite(whole.gradient(0, v)), "no others");
  return check::finish();
}
