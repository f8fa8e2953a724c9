// The CUDA row kernels' own code, run by threads of the host, against the formulas written plainly in double.
// Small blocks and clusters; buffers are exactly as large as the contract says, for the sanitizers.
#include "../cuda/choice.h"
#include "cuda_emulation.h"
#include "row_divergence_case.h"

namespace {

using namespace row_test;

struct Shape {
  int threads = 64, ranks = 1;
  bool held = false;
} shape;

constexpr unsigned kAll = kd::kStatistics | kd::kTerms | kd::kGradient;

}  // namespace

namespace kd {

void row_divergence(const RowDivergence& args, unsigned phases) {
  const cuda::Geometry cut = cuda::cut(args, shape.ranks);
  host::Launch launch{};
  launch.work = {args, phases, 0, cut.width, cut.student_bytes};
  launch.threads = shape.threads;
  launch.ranks = shape.ranks;
  launch.held = shape.held;
  launch.shared_bytes = shape.held ? cut.shared_bytes : cuda::kScratchBytes;
  const bool teacher = cuda::teacher_parts(args, phases);
  switch (cuda::storage_of(args)) {
    case cuda::Storage::float32:
      return host::emulate_Float32(launch, teacher);
    case cuda::Storage::bfloat16:
      return host::emulate_Bfloat16(launch, teacher);
    case cuda::Storage::float16:
      return host::emulate_Float16(launch, teacher);
    case cuda::Storage::mixed:
      return host::emulate_Mixed(launch, teacher);
    case cuda::Storage::wide:
      return host::emulate_Wide(launch, teacher);
  }
}

const char* objective_name(Objective objective) {
  static const char* const names[] = {"forward_kl",      "reverse_kl",      "jensen_shannon", "skew_kl",
                                      "skew_reverse_kl", "total_variation", "weighted_kl"};
  return names[static_cast<int>(objective)];
}

}  // namespace kd

namespace {

Objective objective(int i) { return static_cast<Objective>(i); }

// Every way in which a row may be laid over a GPU.
const Shape kShapes[] = {{64, 1, false}, {64, 1, true}, {32, 2, true}, {64, 2, false}, {32, 4, true}};

bool gaps_untouched(const Case& c, const Model& m) {
  const int size = size_of(m.grad_dtype);
  for (int64_t i = 0; i < m.start * size; ++i)
    if (m.grad[i] != 0x55) return false;
  for (int64_t row = 0; row + 1 < c.n; ++row)
    for (int64_t i = c.index(m, row, c.vocab) * size; i < c.index(m, row + 1, 0) * size; ++i)
      if (m.grad[i] != 0x55) return false;
  return true;
}

// Everything at once: temperatures, softcap, scale, labels and weights, odd offsets and gaps.
Case everything(Random& random, int o, int64_t vocab, int64_t n = 3) {
  Case c(n, vocab);
  c.objective = objective(o);
  for (int64_t row = 0; row < n; ++row) {
    c.student.temperature[row] = row % 3 ? 0.5 + 2 * random.uniform() : 1.0;
    c.teacher.temperature[row] = 0.5 + 2 * random.uniform();
    c.labels.push_back(static_cast<int64_t>(random.uniform() * static_cast<double>(vocab)));
    c.soft_weight[row] = random.uniform();
    c.hard_weight[row] = row % 4 == 3 ? 0.0 : random.uniform();
  }
  c.student.scale = 0.7, c.student.softcap = 5.0;
  c.teacher.scale = 1.3, c.teacher.softcap = o % 2 ? 8.0 : 0.0;
  c.student.start = 3, c.student.gap = 5;
  c.teacher.start = o % 2 ? 0 : 1, c.teacher.gap = o % 3;
  return c;
}

void test_objectives_and_shapes() {
  Random random{1};
  for (const Shape& s : kShapes)
    for (int o = 0; o < kd::kObjectives; ++o)
      for (int64_t vocab : {1, 31, 1000}) {
        shape = s;
        Case plain(2, vocab);
        plain.objective = objective(o);
        plain.student.gap = plain.teacher.gap = (8 - vocab % 8) % 8;  // whole groups
        plain.teacher.want_grad = o % 2;
        plain.randomize(random, 2.0, -1.0);
        plain.run();
        compare(plain, plain, "aligned");
        Case c = everything(random, o, vocab);
        c.teacher.want_grad = o % 2 == 0;
        c.randomize(random, 2.0, -1.0);
        c.run();
        compare(c, c, "everything");
        CHECK(gaps_untouched(c, c.student), "writes beside the rows");
      }
}

void test_dtypes() {
  Random random{2};
  int count = 0;
  for (int d = 0; d < kd::kDtypes; ++d)
    for (int t = 0; t < kd::kDtypes; ++t)
      for (int g = 0; g < kd::kDtypes; ++g)
        for (int odd = 0; odd < 2; ++odd) {
          const int o = count++ % kd::kObjectives;
          shape = kShapes[count % 5];
          if (d == 3 || t == 3) shape.held = false;
          Case c = odd ? everything(random, o, 277, 2) : Case(2, 520);
          c.objective = objective(o);
          c.student.dtype = static_cast<Dtype>(d), c.teacher.dtype = static_cast<Dtype>(t);
          c.student.grad_dtype = static_cast<Dtype>(g), c.teacher.grad_dtype = static_cast<Dtype>((g + 1) % 4);
          c.randomize(random, 2.0, -1.0);
          c.run();
          compare(c, c, "dtypes");
        }
}

void test_every_16_bit_number() {
  shape = {32, 1, false};
  for (Dtype d : {Dtype::bfloat16, Dtype::float16}) {
    Case c(1, 65536);  // read: each pattern's own gradient under a total weight of 0 but for the label's ...
    c.student.dtype = c.teacher.dtype = d;
    c.student.grad_dtype = Dtype::float64;
    c.teacher.want_grad = false;
    c.allocate();
    for (int bits = 0; bits < 65536; ++bits) {
      const float got = kd::cuda::decode16(static_cast<uint32_t>(bits), d);
      const double want = decode16(bits, d);
      CHECK(std::isnan(want) ? std::isnan(got) : got == want, "%x reads as %g, not %g", bits, got, want);
      if (std::isnan(want)) continue;
      CHECK(kd::cuda::encode16(got, d) == static_cast<uint32_t>(bits), "%x does not come back", bits);
      const double next = decode16((bits & 0x7fff) + 1, d), here = decode16(bits & 0x7fff, d);
      if (!std::isfinite(next)) continue;
      const float middle = static_cast<float>(here + (next - here) / 2);
      const uint32_t even = (bits & 0x7fff) + (bits & 1);
      CHECK(kd::cuda::encode16(middle, d) == even, "a tie above %x is not rounded to even", bits & 0x7fff);
    }
  }
}

void test_phases_and_in_place() {
  Random random{3};
  constexpr unsigned s = kd::kStatistics, t = kd::kTerms, g = kd::kGradient;
  for (int o = 0; o < kd::kObjectives; ++o)
    for (bool teacher_gradient : {true, false})
      for (int ranks : {1, 2}) {
        shape = {32, ranks, true};
        Case c = everything(random, o, 333, 2);
        c.teacher.want_grad = teacher_gradient;
        c.student.grad_dtype = c.student.dtype = o % 2 ? Dtype::bfloat16 : Dtype::float32;
        c.teacher.grad_dtype = c.teacher.dtype = o % 3 ? Dtype::bfloat16 : Dtype::float32;
        c.randomize(random, 3.0, -1.0);
        c.run();
        const auto same = [&](const Case& other, const char* what) {
          CHECK(c.terms == other.terms, "%s terms: %s", what, kd::objective_name(c.objective));
          CHECK(c.student.grad == other.student.grad, "%s student: %s", what, kd::objective_name(c.objective));
          CHECK(c.teacher.grad == other.teacher.grad, "%s teacher: %s", what, kd::objective_name(c.objective));
        };
        shape.held = false;
        for (const auto& calls : {std::vector<unsigned>{s | t | g}, {s, t, g}, {s | t, g}, {s, t | g}}) {
          Case other = c;
          other.run(calls);
          same(other, "phases");
        }
        for (bool held : {false, true})
          for (const auto& calls : {std::vector<unsigned>{s | t | g}, {s | t, g}}) {
            shape.held = held;
            Case over = c;
            over.student.in_place = over.teacher.in_place = true;
            over.run(calls);
            bool equal = true;
            for (int64_t row = 0; row < c.n; ++row)
              for (int64_t v = 0; v < c.vocab; ++v)
                equal = equal && over.gradient(over.student, row, v) == c.gradient(c.student, row, v) &&
                        (!teacher_gradient || over.gradient(over.teacher, row, v) == c.gradient(c.teacher, row, v));
            CHECK(equal && over.terms == c.terms, "in place: %s", kd::objective_name(c.objective));
          }
      }
}

void test_absent_entries() {  // -inf
  Random random{4};
  for (int o = 0; o < kd::kObjectives; ++o)
    for (int which = 1; which < 4; ++which) {  // 1: teacher, 2: student, 3: both
      shape = kShapes[(o + which) % 5];
      Case c(2, 700);  // the first block of a cluster holds nothing else
      c.objective = objective(o);
      c.student.dtype = c.teacher.dtype = o % 2 ? Dtype::float32 : Dtype::bfloat16;
      check_absent(c, random, which, 400, 650);
    }
}

void test_poisoned_rows_stay_alone() {
  Random random{5};
  for (int o = 0; o < kd::kObjectives; ++o)
    for (int poison = 0; poison < 8; ++poison) {
      shape = kShapes[(o + poison) % 5];
      Case clean(4, 300);
      clean.objective = objective(o);
      check_poison(clean, random, poison, 1, 2);
    }
}

void test_part_of_a_vocabulary() {
  Random random{7};
  for (int o = 0; o < kd::kObjectives; ++o) {
    shape = kShapes[o % 5];
    Case c(4, 300);
    c.objective = objective(o);
    check_part_of_a_vocabulary(c, random);
  }
}

void test_far_and_near() {
  Random random{6};
  for (int o = 0; o < kd::kObjectives; ++o) {
    shape = kShapes[o % 5];
    Case near(2, 3000);  // a divergence of about 5e-7
    near.objective = objective(o);
    near.randomize(random, 3.0, 1e-3);
    near.run();
    for (int64_t row = 0; row < near.n; ++row) {
      const double want = expect(near, row).soft;
      CHECK(std::fabs(near.soft(row) - want) <= 1e-4 * want, "near: %s %g, not %g", kd::objective_name(near.objective),
            near.soft(row), want);
    }
    Case same = near;
    same.student.temperature.assign(2, 1.7);
    same.teacher.temperature.assign(2, 1.7);
    same.student.logits = same.teacher.logits;
    same.run();
    for (int64_t row = 0; row < same.n; ++row)
      CHECK(same.soft(row) == 0.0, "%s of equal models is %g", kd::objective_name(same.objective), same.soft(row));

    Case far(2, 40);  // 1000 nats apart
    far.objective = objective(o);
    far.randomize(random, 2.0, -1.0);
    far.set(far.student, 0, 3, 1000.0);
    far.set(far.teacher, 0, 5, 1000.0);
    far.set(far.teacher, 1, 7, -1000.0);
    far.run();
    for (int64_t row = 0; row < far.n; ++row) {
      const double want = expect(far, row).soft;
      CHECK(std::fabs(far.soft(row) - want) <= 4e-6 * want, "far: %s %.9g, not %.9g", kd::objective_name(far.objective),
            far.soft(row), want);
      for (int64_t v = 0; v < far.vocab; ++v)
        CHECK(std::isfinite(far.gradient(far.student, row, v)), "far: %s", kd::objective_name(far.objective));
    }
  }
}

}  // namespace

int main() {
  test_objectives_and_shapes();
  test_dtypes();
  test_every_16_bit_number();
  test_phases_and_in_place();
  test_absent_entries();
  test_poisoned_rows_stay_alone();
  test_part_of_a_vocabulary();
  test_far_and_near();
  return check::finish();
}
