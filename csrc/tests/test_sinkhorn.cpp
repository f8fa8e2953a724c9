// The Sinkhorn kernel against plain loops in double, its two adjoints against finite differences of those loops.
#include <vector>

#include "../sinkhorn.h"
#include "check.h"
#include "numbers.h"

namespace {

using namespace row_test;

constexpr double kEpsilon = 0.3;
constexpr double kValueWeight = 0.7;

struct Problem {
  int64_t n, m;
  std::vector<double> cost, a, b;
  std::vector<double> phi, psi, plan;

  // In logarithms, rows first; an absent entry has -inf.
  void solve(int64_t iterations) {
    phi.assign(n, -kInf);
    psi.assign(m, 0.0);
    for (int64_t j = 0; j < m; ++j) psi[j] = b[j] > 0 ? 0.0 : -kInf;
    for (int64_t step = 0; step < iterations; ++step) {
      for (int64_t i = 0; i < n; ++i) {
        double sum = 0.0;
        for (int64_t j = 0; j < m; ++j) sum += b[j] > 0 ? std::exp(psi[j] - cost[i * m + j] / kEpsilon) : 0.0;
        if (a[i] > 0) phi[i] = std::log(a[i] / sum);
      }
      for (int64_t j = 0; j < m; ++j) {
        double sum = 0.0;
        for (int64_t i = 0; i < n; ++i) sum += a[i] > 0 ? std::exp(phi[i] - cost[i * m + j] / kEpsilon) : 0.0;
        if (b[j] > 0) psi[j] = std::log(b[j] / sum);
      }
    }
    plan.assign(n * m, 0.0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j)
        if (a[i] > 0 && b[j] > 0) plan[i * m + j] = std::exp(phi[i] + psi[j] - cost[i * m + j] / kEpsilon);
  }

  double transport() const {
    double sum = 0.0;
    for (int64_t e = 0; e < n * m; ++e) sum += plan[e] == 0.0 ? 0.0 : plan[e] * cost[e];
    return sum;
  }

  double row_error() const {
    double error = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0.0;
      for (int64_t j = 0; j < m; ++j) sum += plan[i * m + j];
      error += std::fabs(sum - a[i]);
    }
    return error;
  }

  // weight <P, C> + <W, P> after so many iterations.
  double objective(int64_t iterations, double weight, const double* w) {
    solve(iterations);
    double sum = weight * transport();
    for (int64_t e = 0; e < n * m; ++e) sum += w[e] * plan[e];
    return sum;
  }
};

// The same problems in the kernel's form: T is the state's type.
template <class T>
struct Batch {
  std::vector<Problem> problems;
  int64_t n, m, iterations;
  Dtype dtype;
  int64_t row_stride = m + 3;
  std::vector<char> cost;
  std::vector<T> a, b, phi, psi, phi_history, psi_history, d_transport, d_value, d_plan, zeros_n, zeros_m;
  std::vector<T> d_cost, d_a, d_b;
  std::vector<double> epsilons, numbers;

  Batch(Random& random, int64_t count, int64_t n_, int64_t m_, int64_t iterations_, Dtype dtype_, bool holes)
      : n(n_), m(m_), iterations(iterations_), dtype(dtype_), epsilons(iterations_, kEpsilon) {
    cost.resize(count * n * row_stride * size_of(dtype));
    for (int64_t e = 0; e < count * n * row_stride; ++e) encode(kNaN, cost.data() + e * size_of(dtype), dtype);
    for (int64_t p = 0; p < count; ++p) {
      Problem one{n, m, std::vector<double>(n * m), marginal(random, n, holes), marginal(random, m, holes), {}, {}, {}};
      for (int64_t e = 0; e < n * m; ++e) {
        char* at = cost.data() + ((p * n + e / m) * row_stride + e % m) * size_of(dtype);
        const bool absent = one.a[e / m] == 0 || one.b[e % m] == 0;  // whatever it holds: NaN
        if (!absent) encode(holes && e == 0 ? kInf : 2.0 * random.uniform() - 0.5, at, dtype);
        one.cost[e] = absent ? 0.0 : decode(at, dtype);
      }
      a.insert(a.end(), one.a.begin(), one.a.end());
      b.insert(b.end(), one.b.begin(), one.b.end());
      d_transport.push_back(static_cast<T>(random.normal()));
      d_value.push_back(static_cast<T>(kValueWeight));
      problems.push_back(one);
    }
    for (int64_t e = 0; e < count * n * m; ++e) d_plan.push_back(static_cast<T>(random.normal()));
    phi.assign(count * n, T(-7)), psi.assign(count * m, T(-7));
    phi_history.assign(count * iterations * n, T(-7)), psi_history.assign(count * iterations * m, T(-7));
    zeros_n.assign(count * n, T(0)), zeros_m.assign(count * m, T(0));
    d_cost.assign(count * n * m, T(-7)), d_a.assign(count * n, T(-7)), d_b.assign(count * m, T(-7));
    numbers.assign(count * kd::kSinkhornNumbers, -7.0);
  }

  // Of mass 1, each entry exact in float; with holes the entry 1 is absent.
  static std::vector<double> marginal(Random& random, int64_t size, bool holes) {
    std::vector<double> x(size);
    double sum = 0.0;
    for (int64_t i = 0; i < size; ++i) sum += x[i] = holes && i == 1 ? 0.0 : 0.2 + random.uniform();
    for (double& entry : x) entry = static_cast<double>(static_cast<float>(entry / sum));
    return x;
  }

  void run(unsigned phases, int domain, int threads) {
    kd::Sinkhorn args;
    args.count = static_cast<int64_t>(problems.size());
    args.n = n, args.m = m;
    args.cost = cost.data();
    args.cost_dtype = dtype;
    args.cost_batch = n * row_stride, args.cost_row = row_stride;
    args.wide = sizeof(T) == 8;
    args.a = a.data(), args.b = b.data();
    args.epsilons = epsilons.data();
    args.iterations = iterations;
    args.domain = domain;
    args.phi = phi.data(), args.psi = psi.data();
    args.numbers = numbers.data();
    args.phi_history = phi_history.data(), args.psi_history = psi_history.data();
    args.d_transport = d_transport.data(), args.d_value = d_value.data();
    args.d_plan = d_plan.data();
    args.d_phi = zeros_n.data(), args.d_psi = zeros_m.data();
    args.d_cost = d_cost.data(), args.d_a = d_a.data(), args.d_b = d_b.data();
    args.threads = threads;
    kd::sinkhorn(args, phases);
  }
};

bool close(double got, double want, double tolerance) {
  return got == want || std::fabs(got - want) <= tolerance * (1.0 + std::fabs(want));
}

template <class T>
void verify_solution(Batch<T>& batch, const char* what) {
  const double tolerance = sizeof(T) == 8 ? 1e-11 : 2e-5;
  // A constant that one potential gains and the other loses collects the rounding of every iteration; the plan does not
  // see it.
  const double drifting = tolerance * (1.0 + 0.02 * static_cast<double>(batch.iterations));
  for (size_t p = 0; p < batch.problems.size(); ++p) {
    Problem& want = batch.problems[p];
    want.solve(batch.iterations);
    const double* numbers = batch.numbers.data() + p * kd::kSinkhornNumbers;
    CHECK(close(numbers[kd::kTransport], want.transport(), tolerance), "%s: <P, C> %.12g, not %.12g", what,
          numbers[kd::kTransport], want.transport());
    CHECK(std::fabs(numbers[kd::kError] - want.row_error()) <= tolerance, "%s: error %.9g, not %.9g", what,
          numbers[kd::kError], want.row_error());
    CHECK(numbers[kd::kIterations] == double(batch.iterations) && numbers[kd::kStatus] == kd::kSolved, "%s", what);
    for (int64_t i = 0; i < batch.n; ++i)
      CHECK(close(batch.phi[p * batch.n + i], want.phi[i], drifting), "%s: phi %ld", what, long(i));
    for (int64_t j = 0; j < batch.m; ++j)
      CHECK(close(batch.psi[p * batch.m + j], want.psi[j], drifting), "%s: psi %ld", what, long(j));
  }
}

// Central differences of the plain loops at a few entries.
template <class T>
void verify_adjoint(Batch<T>& batch, unsigned phase, Random& random, const char* what) {
  constexpr double kStep = 1e-5;
  const double tolerance = sizeof(T) == 8 ? 2e-8 : 2e-4;
  const bool implicit = phase == kd::kImplicit;
  const int64_t steps = batch.iterations, n = batch.n, m = batch.m;
  for (size_t p = 0; p < batch.problems.size(); ++p) {
    Problem& at = batch.problems[p];
    std::vector<double> w(batch.d_plan.begin() + p * n * m, batch.d_plan.begin() + (p + 1) * n * m);
    const double weight = batch.d_transport[p];
    at.solve(steps);
    const std::vector<double> plan = at.plan;
    const auto slope = [&](std::vector<double>& x, int64_t up, int64_t down, double step) {
      const std::vector<double> kept = x;
      double ends[2];
      for (int side = 0; side < 2; ++side) {
        const double h = side ? -step : step;
        x[up] = kept[up] + h;
        if (down >= 0) x[down] = kept[down] - h;
        ends[side] = at.objective(steps, weight, w.data());
        x = kept;
      }
      return (ends[0] - ends[1]) / (2.0 * step);
    };
    for (int draw = 0; draw < 6; ++draw) {
      const int64_t e = draw == 0 ? 0 : static_cast<int64_t>(random.uniform() * double(n * m));
      const bool absent = plan[e] == 0.0;
      const double want = absent ? 0.0 : slope(at.cost, e, -1, kStep) + (implicit ? kValueWeight * plan[e] : 0.0);
      CHECK(close(batch.d_cost[p * n * m + e], want, tolerance), "%s: d_cost[%ld] %.9g, not %.9g", what, long(e),
            double(batch.d_cost[p * n * m + e]), want);
    }
    const auto marginal = [&](std::vector<double>& x, const T* got, const char* name) {
      const int64_t up = 0, down = static_cast<int64_t>(x.size()) - 1;
      if (up == down || x[down] == 0.0) return;
      // One gains what another loses, so that the constant drops out. UNROLLED: of the logarithms.
      const double own = implicit ? got[up] - got[down] : got[up] / x[up] - got[down] / x[down];
      const double want = slope(x, up, down, kStep * 1e-1);
      CHECK(close(own, want, 20.0 * tolerance), "%s: d_%s %.9g, not %.9g", what, name, own, want);
    };
    marginal(at.a, batch.d_a.data() + p * n, "a");
    marginal(at.b, batch.d_b.data() + p * m, "b");
    if (n > 1) CHECK(at.a[1] > 0 || batch.d_a[p * n + 1] == T(0), "%s: an absent row has a gradient", what);
  }
}

template <class T>
void verify_all(Random& random, Dtype dtype) {
  for (int64_t n : {1, 5, 70})
    for (int64_t m : {1, 7, 33})
      for (int holes = 0; holes < 2; ++holes) {
        if (holes && (n < 5 || m < 7)) continue;
        for (int domain : {kd::kScalingDomain, kd::kLogDomain}) {
          char what[80];
          std::snprintf(what, sizeof what, "%ld x %ld, dtype %d, holes %d, domain %d", long(n), long(m), int(dtype),
                        holes, domain);
          Batch<T> few(random, 2, n, m, 4, dtype, holes);
          few.run(kd::kSolve, domain, 1);
          verify_solution(few, what);
          few.run(kd::kUnrolled, domain, 1);
          verify_adjoint(few, kd::kUnrolled, random, what);
          Batch<T> many(random, 1, n, m, 200, dtype, holes);
          many.run(kd::kSolve, domain, 1);
          verify_solution(many, what);
          many.run(kd::kImplicit, domain, 1);
          verify_adjoint(many, kd::kImplicit, random, what);
        }
      }
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", kd::instruction_set());
  Random random{7};
  for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) verify_all<float>(random, dtype);
  verify_all<double>(random, Dtype::float64);
  // So many that every thread gets some, and unlike, so that what one leaves behind shows in others.
  Batch<float> one(random, 300, 40, 50, 20, Dtype::float32, true);
  Batch<float> other = one;
  for (unsigned phases : {kd::kSolve, kd::kUnrolled, kd::kImplicit}) {
    one.run(phases, kd::kAutoDomain, 1);
    for (int threads : {2, 3}) {
      other.run(phases, kd::kAutoDomain, threads);
      CHECK(other.phi == one.phi && other.psi == one.psi && other.numbers == one.numbers &&
                other.phi_history == one.phi_history && other.d_cost == one.d_cost && other.d_a == one.d_a &&
                other.d_b == one.d_b,
            "%d threads, phase %u: other bits", threads, phases);
    }
  }
  // A row whose pairs are all forbidden cannot be met.
  Batch<float> infeasible(random, 2, 4, 6, 5, Dtype::float32, false);
  for (int64_t j = 0; j < 6; ++j) encode(kInf, infeasible.cost.data() + (9 * 2 + j) * 4, Dtype::float32);
  for (int domain : {kd::kAutoDomain, kd::kScalingDomain, kd::kLogDomain}) {
    infeasible.run(kd::kSolve, domain, 1);
    CHECK(infeasible.numbers[kd::kStatus] == kd::kInfeasible, "domain %d", domain);
    CHECK(infeasible.numbers[kd::kSinkhornNumbers + kd::kStatus] == kd::kSolved, "the problem beside it");
  }
  return check::finish();
}
