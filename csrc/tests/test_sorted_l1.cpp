// The sorted-L1 kernel against std::stable_sort in double: all storage types, ties, absent entries, unequal rows.
#include <algorithm>
#include <numeric>
#include <vector>

#include "../sorted_l1.h"
#include "check.h"
#include "numbers.h"

namespace {

using namespace row_test;

struct Model {
  int64_t n, vocab;
  Dtype dtype;
  double scale = 0.5, temperature;
  std::vector<char> logits;
  std::vector<double> grad, temperatures, max, logz, mass, sum, signs, p;
  std::vector<int64_t> offsets, grad_offsets;

  double z(int64_t row, int64_t v) const {
    return scale * decode(logits.data() + (offsets[row] + v) * size_of(dtype), dtype);
  }

  template <class Make>
  Model(int64_t n_, int64_t vocab_, Dtype dtype_, double temperature_, const Make& make)
      : n(n_), vocab(vocab_), dtype(dtype_), temperature(temperature_) {
    logits.resize(n * (vocab + 1) * size_of(dtype));
    grad.assign(n * vocab, kNaN);
    sum.assign(n, kNaN);
    for (int64_t row = 0; row < n; ++row) {
      offsets.push_back((n - 1 - row) * (vocab + 1) + 1);
      grad_offsets.push_back(row * vocab);
      encode(kNaN, logits.data() + (offsets[row] - 1) * size_of(dtype), dtype);
      double top = -kInf, total = 0.0;
      for (int64_t v = 0; v < vocab; ++v) {
        encode(make(row, v) / scale, logits.data() + (offsets[row] + v) * size_of(dtype), dtype);
        top = std::max(top, z(row, v));
      }
      for (int64_t v = 0; v < vocab; ++v) total += std::exp((z(row, v) - top) / temperature);
      temperatures.push_back(temperature);
      max.push_back(top);
      logz.push_back(std::log(total));
      mass.push_back(0.5 + 0.5 / static_cast<double>(row + 1));
    }
  }

  kd::SortedSide side(bool gradient) {
    kd::SortedSide args;
    args.logits.logits = logits.data();
    args.logits.dtype = dtype;
    args.logits.offsets = offsets.data();
    args.logits.scale = scale;
    args.logits.temperature = temperatures.data();
    if (gradient) {
      args.logits.grad = grad.data();
      args.logits.grad_dtype = Dtype::float64;
      args.logits.grad_offsets = grad_offsets.data();
    }
    args.vocab = vocab;
    args.max = max.data();
    args.logz = logz.data();
    args.mass = mass.data();
    args.sum = sum.data();
    return args;
  }

  // Probabilities of a row, and its ids in descending order of them.
  std::vector<int32_t> order(int64_t row) {
    p.resize(vocab);
    for (int64_t v = 0; v < vocab; ++v) p[v] = std::exp((z(row, v) - max[row]) / temperature - logz[row]);
    std::vector<int32_t> ids(vocab);
    std::iota(ids.begin(), ids.end(), 0);
    std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return p[a] > p[b]; });
    return ids;
  }
};

struct Call {
  std::vector<double> loss, weight;
  std::vector<char> scratch;

  Call(Model& student, Model& teacher, bool student_grad, bool teacher_grad, int threads)
      : loss(student.n, kNaN), weight(student.n) {
    kd::SortedL1 args;
    args.n = student.n;
    args.student = student.side(student_grad);
    args.teacher = teacher.side(teacher_grad);
    for (int64_t row = 0; row < student.n; ++row) weight[row] = 1.0 + static_cast<double>(row);
    args.soft_weight = weight.data();
    args.loss = loss.data();
    scratch.resize(threads * kd::sorted_l1_scratch(args) + 64);
    const uintptr_t address = reinterpret_cast<uintptr_t>(scratch.data());
    args.scratch = reinterpret_cast<void*>((address + 63) / 64 * 64);
    args.threads = threads;
    kd::sorted_l1(args);
  }
};

void verify_gradient(const Model& model, int64_t row, double weight, double sum, double tolerance) {
  CHECK(std::fabs(model.sum[row] - sum * model.mass[row]) <= tolerance, "sum %g", model.sum[row]);
  for (int64_t v = 0; v < model.vocab; ++v) {
    const double want =
        weight * model.mass[row] * model.p[v] * (model.signs[v] - sum) / model.temperature * model.scale;
    const double got = model.grad[row * model.vocab + v];
    CHECK(std::fabs(got - want) <= tolerance * weight, "gradient %ld: %g, not %g", long(v), got, want);
  }
}

void verify(Model& student, Model& teacher, const Call& call) {
  const bool wide = student.dtype == Dtype::float64 || teacher.dtype == Dtype::float64;
  const double tolerance = wide ? 1e-12 : 2e-6;
  for (int64_t row = 0; row < student.n; ++row) {
    const std::vector<int32_t> own = student.order(row), other = teacher.order(row);
    student.signs.assign(student.vocab, 0.0);
    teacher.signs.assign(teacher.vocab, 0.0);
    double loss = 0.0, student_sum = 0.0, teacher_sum = 0.0;
    for (int64_t k = 0; k < std::max(student.vocab, teacher.vocab); ++k) {
      const double q = k < student.vocab ? student.p[own[k]] * student.mass[row] : 0.0;
      const double p = k < teacher.vocab ? teacher.p[other[k]] * teacher.mass[row] : 0.0;
      const double sign = (q > p) - (q < p);
      loss += std::fabs(q - p);
      if (k < student.vocab) student.signs[own[k]] = sign, student_sum += sign * student.p[own[k]];
      if (k < teacher.vocab) teacher.signs[other[k]] = -sign, teacher_sum -= sign * teacher.p[other[k]];
    }
    CHECK(std::fabs(call.loss[row] - loss) <= tolerance, "loss %.9g, not %.9g", call.loss[row], loss);
    verify_gradient(student, row, call.weight[row], student_sum, tolerance);
    verify_gradient(teacher, row, call.weight[row], teacher_sum, tolerance);
  }
}

}  // namespace

int main() {
  Random random{11};
  const auto spread = [&](int64_t, int64_t v) { return v % 7 == 3 ? -kInf : 3.0 * random.normal(); };
  const auto tied = [&](int64_t, int64_t v) { return v % 3 == 0 ? 1.0 : v % 3 == 1 ? -2.0 : 0.0; };
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float64}) {
    for (const auto& [own, other] : {std::pair<int64_t, int64_t>{1, 1}, {70, 1000}, {2100, 33}, {257, 257}}) {
      Model student(3, own, dtype, 0.7, spread), teacher(3, other, dtype, 1.3, spread);
      verify(student, teacher, Call(student, teacher, true, true, 2));
      const std::vector<double> gradient = student.grad, sum = student.sum;
      const Call again(student, teacher, true, false, 1);
      CHECK(student.grad == gradient && student.sum == sum, "threads, or the teacher's gradient, change the student's");
    }
    Model student(2, 300, dtype, 1.0, tied), teacher(2, 500, dtype, 1.0, spread);
    verify(student, teacher, Call(student, teacher, true, true, 1));
    // The same row on both sides: nothing is different, and nothing pulls.
    Model same = teacher;
    const Call call(same, teacher, true, true, 1);
    for (const double x : call.loss) CHECK(x == 0.0, "loss %g of equal rows", x);
    for (const double x : same.grad) CHECK(x == 0.0, "gradient %g of equal rows", x);
  }
  return check::finish();
}
