// The topk kernel against a full sort and sums in double: all storage types, ties, absent entries, draws.
#include <algorithm>
#include <numeric>
#include <vector>

#include "../topk.h"
#include "check.h"
#include "numbers.h"

namespace {

using namespace row_test;

struct Case {
  int64_t n, vocab, k, targets_per_row, draws;
  Dtype dtype;
  std::vector<char> logits;
  std::vector<int64_t> offsets, targets;
  std::vector<double> temperatures = {1.0, 0.7}, values, statistics, target_values, uniforms;
  std::vector<int32_t> ids, ranks, samples;

  // The scale is a power of 2, so that float arithmetic is exact and the order is known.
  static constexpr double kScale = 0.5;
  char* raw(int64_t row, int64_t v) { return logits.data() + (offsets[row] + v) * size_of(dtype); }
  double z(int64_t row, int64_t v) const {
    return kScale * decode(logits.data() + (offsets[row] + v) * size_of(dtype), dtype);
  }

  template <class Make>
  Case(Random& random, int64_t n_, int64_t vocab_, int64_t k_, Dtype dtype_, const Make& make)
      : n(n_), vocab(vocab_), k(k_), targets_per_row(3), draws(9), dtype(dtype_) {
    // Rows backwards with a gap of one: nothing is aligned, and memory ends where the first row does.
    logits.resize(n * (vocab + 1) * size_of(dtype));
    for (int64_t row = 0; row < n; ++row) {
      offsets.push_back((n - 1 - row) * (vocab + 1) + 1);
      encode(kNaN, raw(row, -1), dtype);
      for (int64_t v = 0; v < vocab; ++v) encode(make(row, v) / kScale, raw(row, v), dtype);
      for (int64_t r = 0; r < targets_per_row; ++r)
        targets.push_back(static_cast<int64_t>(random.uniform() * static_cast<double>(vocab)));
      std::vector<double> u(draws);
      for (double& x : u) x = random.uniform();
      std::sort(u.begin(), u.end());
      uniforms.insert(uniforms.end(), u.begin(), u.end());
    }
    targets[0] = -1;
    ids.assign(n * k, -7);
    values.assign(n * k, kNaN);
    statistics.assign(n * 7, kNaN);
    ranks.assign(targets.size(), -7);
    target_values.assign(targets.size(), kNaN);
    samples.assign(uniforms.size(), -7);
  }

  void run(int threads) {
    kd::Topk args;
    args.n = n;
    args.vocab = vocab;
    args.side.logits = logits.data();
    args.side.dtype = dtype;
    args.side.offsets = offsets.data();
    args.side.scale = kScale;
    args.temperatures = temperatures.data();
    args.temperature_count = 2;
    args.k = k;
    args.ids = ids.data();
    args.values = values.data();
    args.statistics = statistics.data();
    args.target_count = targets_per_row;
    args.targets = targets.data();
    args.target_values = target_values.data();
    args.target_ranks = ranks.data();
    args.sample_count = draws;
    args.uniforms = uniforms.data();
    args.samples = samples.data();
    args.threads = threads;
    kd::topk(args);
  }
};

void verify(const Case& c) {
  const double tolerance = c.dtype == Dtype::float64 ? 1e-11 : 4e-6;
  for (int64_t row = 0; row < c.n; ++row) {
    std::vector<int32_t> order(c.vocab);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return c.z(row, a) > c.z(row, b); });
    for (int64_t j = 0; j < c.k; ++j) {
      const bool there = c.z(row, order[j]) > -kInf;
      const int32_t want = there ? order[j] : -1;
      CHECK(c.ids[row * c.k + j] == want, "place %ld: id %d, not %d", long(j), c.ids[row * c.k + j], want);
      CHECK(c.values[row * c.k + j] == (there ? c.z(row, want) : -kInf), "value at %ld", long(j));
    }
    const double top = c.z(row, order[0]);
    CHECK(c.statistics[row * 7] == top, "max");
    for (int m = 0; m < 2; ++m) {
      double all = 0.0, first = 0.0, tail = 0.0, tail_top = c.k < c.vocab ? c.z(row, order[c.k]) : -kInf;
      for (int64_t j = c.vocab - 1; j >= 0; --j) {
        const double x = (c.z(row, order[j]) - top) / c.temperatures[m];
        if (!std::isfinite(x)) continue;
        all += std::exp(x);
        first += std::exp(x) * x;
        if (j >= c.k) tail += std::exp((c.z(row, order[j]) - tail_top) / c.temperatures[m]);
      }
      const double log_tail =
          tail == 0.0 ? -kInf : std::log(tail) + (tail_top - top) / c.temperatures[m] - std::log(all);
      const double want[] = {top / c.temperatures[m] + std::log(all), std::log(all) - first / all, log_tail};
      for (int i = 0; i < 3; ++i) {
        const double got = c.statistics[row * 7 + 1 + 3 * m + i];
        CHECK(got == want[i] || std::fabs(got - want[i]) <= tolerance * (1 + std::fabs(want[i])),
              "statistic %d at temperature %d: %.9g, not %.9g", i, m, got, want[i]);
      }
    }
    for (int64_t r = row * 3; r < row * 3 + 3; ++r) {
      const int64_t target = c.targets[r];
      if (target < 0) {
        CHECK(c.ranks[r] == 0 && std::isnan(c.target_values[r]), "no target");
        continue;
      }
      const auto place = std::find(order.begin(), order.end(), target) - order.begin();
      CHECK(c.ranks[r] == place + 1, "rank %d, not %ld", c.ranks[r], long(place + 1));
      CHECK(c.target_values[r] == c.z(row, target), "target");
    }
    std::vector<double> cumulated(c.vocab);
    double sum = 0.0;
    for (int64_t v = 0; v < c.vocab; ++v) cumulated[v] = sum += std::exp(c.z(row, v) - top);
    for (int64_t j = row * c.draws; j < (row + 1) * c.draws; ++j) {
      const int32_t id = c.samples[j];
      CHECK(id >= 0 && id < c.vocab && c.z(row, id) > -kInf, "drew %d", id);
      if (id < 0 || id >= c.vocab) continue;
      const double u = c.uniforms[j] * sum, slack = tolerance * sum;
      CHECK((id == 0 ? 0.0 : cumulated[id - 1]) <= u + slack && u <= cumulated[id] + slack, "drew %d", id);
    }
  }
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", kd::instruction_set());
  Random random{11};
  for (Dtype dtype : {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16})
    for (int64_t vocab : {1, 2, 33, 1024, 1025, 3000})
      for (int64_t k : {0, 1, 7, 1024}) {
        if (k > vocab) continue;
        for (int kind = 0; kind < 5; ++kind) {
          Case c(random, 3, vocab, k, dtype, [&](int64_t, int64_t v) {
            const double x = 3.0 * random.normal();
            if (kind == 1) return std::round(x);                                 // ties
            if (kind == 2) return v == vocab / 2 ? 0.0 : x - 60.0;               // a sure row: its tail is 1e-24
            if (kind == 3) return static_cast<double>(v) * 4.0 / double(vocab);  // everything beats what was there
            if (kind == 4 && v > 0 && random.uniform() < 0.7) return -kInf;      // fewer than k
            return x;
          });
          c.run(1);
          verify(c);
        }
      }
  // So many that every thread gets some (a team wakes slowly: 100 rows are gone before), and rows so unlike that what
  // one leaves behind shows in others.
  Case c(random, 400, 3000, 9, Dtype::float32,
         [&](int64_t row, int64_t) { return random.normal() * static_cast<double>(row % 5 + 1) + 40.0 * (row % 3); });
  c.run(1);
  verify(c);
  for (int threads : {2, 3, 5}) {
    Case other = c;
    other.run(threads);
    CHECK(other.ids == c.ids && other.values == c.values && other.statistics == c.statistics &&
              other.ranks == c.ranks && other.samples == c.samples,
          "%d threads: other bits", threads);
  }
  for (double special : {kNaN, kInf, -kInf}) {  // no distribution
    Case c(random, 2, 1500, 9, Dtype::float32, [&](int64_t row, int64_t v) {
      return row == 0 && (v == 1100 || special == -kInf) ? special : random.normal();
    });
    c.run(1);
    for (int i = 1; i < 7; ++i) {
      CHECK(std::isnan(c.statistics[i]), "statistic %d of a row with %g: %g", i, special, c.statistics[i]);
      CHECK(std::isfinite(c.statistics[7 + i]), "the row beside it");
    }
    for (int32_t id : c.samples) CHECK(id >= -1 && id < 1500, "drew %d", id);
    for (int32_t id : c.ids) CHECK(id >= -1 && id < 1500, "id %d", id);
  }
  return check::finish();
}
