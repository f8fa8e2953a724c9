// One call of the row kernel with everything it points to, and the formulas written plainly in double.
#pragma once
#include <vector>

#include "../row_divergence.h"
#include "check.h"
#include "numbers.h"

namespace row_test {

using kd::Objective;

// --- one call, with everything it points to ---------------------------------------------------------
struct Model {
  Dtype dtype = Dtype::float32, grad_dtype = Dtype::float32;
  double scale = 1.0, softcap = 0.0;
  std::vector<double> temperature;
  std::vector<char> logits, grad;
  std::vector<int64_t> offsets, grad_offsets;
  bool want_grad = true, in_place = false;
  int64_t start = 0, gap = 0;  // row-major: entries before the first row, and between two
};

struct Case {
  int64_t n, vocab;
  bool row_major = true;
  Objective objective = Objective::forward_kl;
  double parameter0 = 0.3, parameter1 = 0.6;
  Model student, teacher;
  std::vector<int64_t> labels;
  std::vector<double> soft_weight, hard_weight;
  int threads = 2;
  // results
  std::vector<double> statistics, terms;

  Case(int64_t n_, int64_t vocab_) : n(n_), vocab(vocab_), soft_weight(n_, 1.0), hard_weight(n_, 0.0) {
    student.temperature.assign(n, 1.0);
    teacher.temperature.assign(n, 1.0);
  }

  int64_t index(const Model& m, int64_t row, int64_t v) const {
    return row_major ? m.start + row * (vocab + m.gap) + v : v * n + row;
  }
  int64_t entries(const Model& m) const { return index(m, n - 1, vocab - 1) + 1; }
  double logit(const Model& m, int64_t row, int64_t v) const {
    return decode(m.logits.data() + index(m, row, v) * size_of(m.dtype), m.dtype);
  }
  void set(Model& m, int64_t row, int64_t v, double value) {
    encode(value, m.logits.data() + index(m, row, v) * size_of(m.dtype), m.dtype);
  }
  double gradient(const Model& m, int64_t row, int64_t v) const {
    const auto& bytes = m.in_place ? m.logits : m.grad;
    return decode(bytes.data() + index(m, row, v) * size_of(m.grad_dtype), m.grad_dtype);
  }

  void allocate() {
    for (Model* m : {&student, &teacher}) m->logits.assign(entries(*m) * size_of(m->dtype), 0);
  }
  void randomize(Random& random, double spread, double difference) {
    allocate();
    for (int64_t row = 0; row < n; ++row)
      for (int64_t v = 0; v < vocab; ++v) {
        const double z = spread * random.normal();
        set(teacher, row, v, z);
        set(student, row, v, difference < 0 ? spread * random.normal() : z + difference * random.normal());
      }
  }

  kd::Side side(Model& m) {
    m.offsets.clear();
    for (int64_t row = 0; row_major && row < n; ++row) m.offsets.push_back(index(m, row, 0));
    if (m.want_grad && !m.in_place) m.grad.assign(entries(m) * size_of(m.grad_dtype), 0x55);
    kd::Side side;
    side.logits = m.logits.data();
    side.dtype = m.dtype;
    side.offsets = row_major ? m.offsets.data() : nullptr;
    side.ld = n;
    side.scale = m.scale;
    side.softcap = m.softcap;
    side.temperature = m.temperature.data();
    side.grad = !m.want_grad ? nullptr : m.in_place ? m.logits.data() : m.grad.data();
    side.grad_dtype = m.grad_dtype;
    side.grad_offsets = side.offsets;
    side.grad_ld = n;
    return side;
  }

  void run(const std::vector<unsigned>& calls = {kd::kStatistics | kd::kTerms | kd::kGradient}) {
    if (calls.front() & kd::kStatistics) {  // else it goes on from those of an earlier run
      statistics.assign(n * kd::kStatisticColumns, 0.0);
      terms.assign(n * kd::kTermColumns, 0.0);
    }
    const std::vector<double> p0(n, parameter0), p1(n, parameter1);
    kd::RowDivergence args;
    args.n = n;
    args.vocab = vocab;
    args.objective = objective;
    args.student = side(student);
    args.teacher = side(teacher);
    args.parameter0 = p0.data();
    args.parameter1 = p1.data();
    args.labels = labels.empty() ? nullptr : labels.data();
    args.soft_weight = soft_weight.data();
    args.hard_weight = hard_weight.data();
    args.statistics = statistics.data();
    args.terms = terms.data();
    args.entropies = true;
    args.threads = threads;
    for (unsigned phases : calls) kd::row_divergence(args, phases);
  }
  double soft(int64_t row) const { return terms[row * kd::kTermColumns + kd::kSoft]; }
  double term(int64_t row, kd::Term which) const { return terms[row * kd::kTermColumns + which]; }
};

// --- the formulas ------------------------------------------------------------------------------------
struct Expected {
  double soft = 0, hard = 0, student_entropy = 0, teacher_entropy = 0;
  std::vector<double> student, teacher;
};

inline double capped(const Model& m, double logit) {
  const double z = m.scale * logit;
  return m.softcap != 0.0 ? m.softcap * std::tanh(z / m.softcap) : z;
}

inline std::vector<double> log_softmax(const std::vector<double>& z, double temperature) {
  double max = -kInf, sum = 0.0;
  for (double x : z) max = std::fmax(max, x);
  for (double x : z) sum += std::exp((x - max) / temperature);
  std::vector<double> result;
  for (double x : z) result.push_back((x - max) / temperature - std::log(sum));
  return result;
}

inline double phi(double x) {
  return std::fabs(x) < 1e-2 ? x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x / 120))) : std::expm1(x) - x;
}

inline double times(double p, double x) { return p == 0.0 ? 0.0 : p * x; }

// The summand made non-negative (where p = 0, p phi(log(m / p)) is m) and the textbook's dL/dq and dL/dp.
inline void entry(const Case& c, double lp, double lq, double& term, double& dq, double& dp) {
  const double p = std::exp(lp), q = std::exp(lq), d = lq - lp, w = c.parameter0;
  const auto log_mixture = [&](double a, double b) {  // log(a p + b q)
    const double top = std::fmax(lp, lq);
    return top + std::log(a * std::exp(lp - top) + b * std::exp(lq - top));
  };
  switch (c.objective) {
    case Objective::forward_kl:
      term = p == 0 ? q : p * phi(d);
      dq = -p / q, dp = -d;
      return;
    case Objective::reverse_kl:
      term = q == 0 ? p : q * phi(-d);
      dq = d, dp = -q / p;
      return;
    case Objective::weighted_kl:
      term = w * (p == 0 ? q : p * phi(d)) + c.parameter1 * (q == 0 ? p : q * phi(-d));
      dq = -w * p / q + c.parameter1 * d, dp = -w * d - c.parameter1 * q / p;
      return;
    case Objective::total_variation:
      term = std::fabs(p - q) / 2;
      dq = d > 0 ? 0.5 : d < 0 ? -0.5 : 0.0, dp = -dq;
      return;
    case Objective::jensen_shannon: {
      const double a = log_mixture(w, 1 - w) - lp, b = log_mixture(w, 1 - w) - lq;
      term = w * (p == 0 ? (1 - w) * q : p * phi(a)) + (1 - w) * (q == 0 ? w * p : q * phi(b));
      dq = -(1 - w) * b, dp = -w * a;
      return;
    }
    case Objective::skew_kl: {
      const double a = log_mixture(w, 1 - w) - lp;
      term = p == 0 ? (1 - w) * q : p * phi(a);
      dq = -(1 - w) * std::exp(-a), dp = -a - w * std::exp(-a);
      return;
    }
    case Objective::skew_reverse_kl: {
      const double b = log_mixture(1 - w, w) - lq;
      term = q == 0 ? (1 - w) * p : q * phi(b);
      dq = -b - w * std::exp(-b), dp = -(1 - w) * std::exp(lq - log_mixture(1 - w, w));
      return;
    }
  }
}

inline Expected expect(const Case& c, int64_t row) {
  std::vector<double> zs, zt;
  for (int64_t v = 0; v < c.vocab; ++v) {
    zs.push_back(capped(c.student, c.logit(c.student, row, v)));
    zt.push_back(capped(c.teacher, c.logit(c.teacher, row, v)));
  }
  const auto lq = log_softmax(zs, c.student.temperature[row]), lp = log_softmax(zt, c.teacher.temperature[row]);
  const auto lq1 = log_softmax(zs, 1.0);
  Expected e;
  std::vector<double> dq(c.vocab), dp(c.vocab);
  double mean_q = 0, mean_p = 0;
  for (int64_t v = 0; v < c.vocab; ++v) {
    double term = 0;
    if (std::isinf(lp[v]) && std::isinf(lq[v])) continue;
    entry(c, lp[v], lq[v], term, dq[v], dp[v]);
    e.soft += term;
    mean_q += times(std::exp(lq[v]), dq[v]);
    mean_p += times(std::exp(lp[v]), dp[v]);
    e.student_entropy -= times(std::exp(lq[v]), lq[v]);
    e.teacher_entropy -= times(std::exp(lp[v]), lp[v]);
  }
  const bool labelled = !c.labels.empty();
  if (labelled) e.hard = -lq1[c.labels[row]];
  for (int64_t v = 0; v < c.vocab; ++v) {
    const auto chain = [](const Model& m, double z) {
      return m.scale * (m.softcap != 0.0 ? 1 - (z / m.softcap) * (z / m.softcap) : 1.0);
    };
    const double q = std::exp(lq[v]), p = std::exp(lp[v]);
    double gs = c.soft_weight[row] * times(q, dq[v] - mean_q) / c.student.temperature[row];
    if (c.objective == Objective::forward_kl && q == 0) gs = -c.soft_weight[row] * p / c.student.temperature[row];
    if (labelled) gs += c.hard_weight[row] * (std::exp(lq1[v]) - (c.labels[row] == v ? 1 : 0));
    e.student.push_back(gs * chain(c.student, zs[v]));
    e.teacher.push_back(c.soft_weight[row] * times(p, dp[v] - mean_p) / c.teacher.temperature[row] *
                        chain(c.teacher, zt[v]));
  }
  return e;
}

inline bool close(double got, double want, double tolerance) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::fabs(got - want) <= tolerance;
}

// Compares all rows of a call that has run. `before` holds the logits where the gradient overwrote them.
inline void compare(const Case& c, const Case& before, const char* what) {
  const bool wide = c.student.dtype == Dtype::float64 || c.teacher.dtype == Dtype::float64;
  const double loss_tolerance = wide ? 1e-12 : 4e-6, gradient_tolerance = wide ? 1e-12 : 4e-6;
  for (int64_t row = 0; row < c.n; ++row) {
    const Expected e = expect(before, row);
    const auto name = kd::objective_name(c.objective);
    CHECK(close(c.soft(row), e.soft, loss_tolerance * (e.soft + 0.03)), "%s %s n=%d V=%d row %d: %.9g, not %.9g", what,
          name, int(c.n), int(c.vocab), int(row), c.soft(row), e.soft);
    CHECK(close(c.term(row, kd::kHard), e.hard, loss_tolerance * (1 + e.hard)), "%s %s hard", what, name);
    CHECK(close(c.term(row, kd::kStudentEntropy), e.student_entropy, loss_tolerance * (1 + e.student_entropy)),
          "%s %s H(q)", what, name);
    CHECK(close(c.term(row, kd::kTeacherEntropy), e.teacher_entropy, loss_tolerance * (1 + e.teacher_entropy)),
          "%s %s H(p)", what, name);
    const auto check_gradient = [&](const Model& m, const std::vector<double>& want, const char* side) {
      if (!m.want_grad) return;
      for (int64_t v = 0; v < c.vocab; ++v) {
        const double smallest_step = m.grad_dtype == Dtype::float16 ? 6e-8 : 0.0;
        const double tolerance =
            gradient_tolerance + smallest_step + relative_rounding(m.grad_dtype) * std::fabs(want[v]);
        CHECK(close(c.gradient(m, row, v), want[v], tolerance), "%s %s %s n=%d V=%d (%d, %d): %.9g, not %.9g", what,
              name, side, int(c.n), int(c.vocab), int(row), int(v), c.gradient(m, row, v), want[v]);
      }
    };
    check_gradient(c.student, e.student, "student");
    check_gradient(c.teacher, e.teacher, "teacher");
  }
}

// Entries that are -inf below `until` and at `also`, in the teacher (which & 1), the student (which & 2) or both.
inline void check_absent(Case& c, Random& random, int which, int64_t until, int64_t also) {
  c.randomize(random, 2.0, -1.0);
  for (int64_t row = 0; row < c.n; ++row)
    for (int64_t v = 0; v < c.vocab; ++v)
      if (v < until || v == also) {
        if (which & 1) c.set(c.teacher, row, v, -kInf);
        if (which & 2) c.set(c.student, row, v, -kInf);
      }
  c.run();
  const bool infinite =
      (which == 1 && (c.objective == Objective::reverse_kl || c.objective == Objective::weighted_kl)) ||
      (which == 2 && (c.objective == Objective::forward_kl || c.objective == Objective::weighted_kl));
  if (!infinite) {
    // The teacher's part may be infinite where p dL/dp is; only the student's is promised.
    c.teacher.want_grad = which == 3 || c.objective == Objective::jensen_shannon;
    compare(c, c, "-inf");
    return;
  }
  for (int64_t row = 0; row < c.n; ++row) {
    CHECK(c.soft(row) == kInf, "-inf: %s %d gives %g", kd::objective_name(c.objective), which, c.soft(row));
    if (c.objective == Objective::forward_kl)
      for (int64_t v = 0; v < c.vocab; ++v)
        CHECK(std::isfinite(c.gradient(c.student, row, v)), "-inf: forward KL's gradient at %d", int(v));
  }
}

// NaN, inf, nothing but -inf or a label out of range (poison / 2), in the student or the teacher (poison & 1), makes
// the row `bad` NaN, leaves no gradient in the row `silent`, whose weights are 0, and touches no other.
inline void check_poison(Case& clean, Random& random, int poison, int64_t bad, int64_t silent) {
  for (int64_t row = 0; row < clean.n; ++row) clean.labels.push_back(row), clean.hard_weight[row] = 0.5;
  clean.randomize(random, 2.0, -1.0);
  Case c = clean;
  const bool in_label = poison / 2 == 3;
  Model& m = poison & 1 ? c.teacher : c.student;
  for (int64_t row : {bad, silent}) {
    if (poison / 2 == 0) c.set(m, row, 123, kNaN);
    if (poison / 2 == 1) c.set(m, row, 123, kInf);
    if (poison / 2 == 2)
      for (int64_t v = 0; v < c.vocab; ++v) c.set(m, row, v, -kInf);
    if (in_label) c.labels[row] = poison & 1 ? c.vocab : -100;
  }
  c.soft_weight[silent] = c.hard_weight[silent] = 0.0;
  clean.run();
  c.run();
  const auto name = kd::objective_name(c.objective);
  for (int64_t row = 0; row < c.n; ++row) {
    bool same = true, nan = true, zero = true;
    for (int64_t v = 0; v < c.vocab; ++v) {
      const double gs = c.gradient(c.student, row, v), gt = c.gradient(c.teacher, row, v);
      same = same && gs == clean.gradient(clean.student, row, v) && gt == clean.gradient(clean.teacher, row, v);
      nan = nan && std::isnan(gs) && (std::isnan(gt) || in_label);
      zero = zero && gs == 0.0 && gt == 0.0;
    }
    if (row == bad) {
      CHECK(nan, "poison %d: %s: gradient is not NaN", poison, name);
      CHECK(std::isnan(in_label ? c.term(row, kd::kHard) : c.soft(row)), "poison %d: %s: loss", poison, name);
    } else if (row == silent) {
      CHECK(zero, "poison %d: %s: weight 0 leaves a gradient", poison, name);
    } else {
      CHECK(same && c.soft(row) == clean.soft(row), "poison %d: %s: row %d touched", poison, name, int(row));
    }
  }
}

// A vocabulary of which this is a part: a label of another part has a logit, which the statistics were given, and is
// not subtracted here. And only a row of nothing but -inf has that for its largest logit.
inline void check_part_of_a_vocabulary(Case c, Random& random) {
  for (int64_t row = 0; row < c.n; ++row) c.labels.push_back(7 * row % c.vocab), c.hard_weight[row] = 0.5;
  c.randomize(random, 2.0, -1.0);
  c.run();
  Case other = c;
  for (int64_t row = 0; row < c.n; ++row) other.labels[row] = row % 2 ? c.vocab + row : -1 - row;
  other.run({kd::kGradient});
  const auto name = kd::objective_name(c.objective);
  for (int64_t row = 0; row < c.n; ++row)
    for (int64_t v = 0; v < c.vocab; ++v) {
      const double here = c.gradient(c.student, row, v), there = other.gradient(other.student, row, v);
      const bool right = v == c.labels[row] ? std::fabs(there - here - 0.5) < 1e-6 : there == here;
      CHECK(right, "label elsewhere: %s: %g, %g", name, here, there);
    }
  for (Model* m : {&c.student, &c.teacher}) {
    for (int64_t v = 0; v < c.vocab; ++v)
      for (int64_t row : {0, 1}) c.set(*m, row, v, -kInf);
    c.set(*m, 1, c.vocab / 2, kNaN);
  }
  c.run({kd::kStatistics});
  for (int which : {kd::kMaxStudent, kd::kMaxTeacher}) {
    CHECK(c.statistics[which] == -kInf, "nothing but -inf: %s: largest %g", name, c.statistics[which]);
    CHECK(c.statistics[kd::kStatisticColumns + which] != -kInf, "NaN among -inf: %s: none", name);
  }
}

}  // namespace row_test
