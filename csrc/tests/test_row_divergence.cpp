// The row kernel against the formulas written plainly in double, for every objective, layout and type.
// Buffers are exactly as large as the contract says, so that AddressSanitizer sees a step too far.
#include "row_divergence_case.h"

namespace {

using namespace row_test;

Objective objective(int i) { return static_cast<Objective>(i); }
Dtype dtype(int i) { return static_cast<Dtype>(i); }

// --- the tests -----------------------------------------------------------------------------------------
void test_objectives_and_shapes() {
  Random random{1};
  const int64_t vocabs[] = {1, 2, 31, 32, 33, 2047};
  for (int o = 0; o < kd::kObjectives; ++o)
    for (int64_t vocab : vocabs)
      for (int64_t n : {1, 5, 33})
        for (bool row_major : {true, false}) {
          if (n == 33 && vocab == 2047 && o % 3) continue;  // time
          Case c(n, vocab);
          c.row_major = row_major;
          c.objective = objective(o);
          c.randomize(random, 2.0, -1.0);
          c.run();
          compare(c, c, "shapes");
        }
}

void test_dtypes() {
  Random random{2};
  for (int o = 0; o < kd::kObjectives; ++o)
    for (int d = 0; d < kd::kDtypes; ++d)
      for (int g = 0; g < kd::kDtypes; ++g)
        for (bool row_major : {true, false}) {
          Case c(3, 77);
          c.row_major = row_major;
          c.objective = objective(o);
          c.student.dtype = dtype(d);
          c.teacher.dtype = dtype((d + o) % kd::kDtypes);
          c.student.grad_dtype = dtype(g);
          c.teacher.grad_dtype = dtype((g + 1) % kd::kDtypes);
          c.randomize(random, 2.0, -1.0);
          c.run();
          compare(c, c, "dtypes");
        }
}

void test_every_16_bit_number() {
  // Reverse KL of a row of two: the teacher's gradient is soft_weight (p - q), so a chosen weight gives a
  // chosen value; reading is covered by using all patterns as logits and comparing kMaxStudent.
  for (Dtype d : {Dtype::bfloat16, Dtype::float16}) {
    Case c(65536, 1);
    c.row_major = false;
    c.student.dtype = d;
    c.allocate();
    for (int64_t row = 0; row < c.n; ++row) {
      const uint16_t bits = static_cast<uint16_t>(row);
      std::memcpy(c.student.logits.data() + 2 * row, &bits, 2);
    }
    c.run({kd::kStatistics});
    for (int64_t row = 0; row < c.n; ++row) {
      const double want = c.logit(c.student, row, 0);
      if (std::isnan(want)) continue;
      const double got = c.statistics[row * kd::kStatisticColumns + kd::kMaxStudent];
      CHECK(got == want, "16-bit pattern %x reads as %g, not %g", int(row), got, want);
    }
  }
  for (Dtype d : {Dtype::bfloat16, Dtype::float16}) {
    // Two entries of logits 0 and -inf: the cross-entropy's gradient at label 1 is hard_weight * (1, -1).
    Case c(65536, 2);
    c.row_major = false;
    c.student.grad_dtype = d;
    c.teacher.want_grad = false;
    c.allocate();
    c.labels.assign(c.n, 1);
    c.soft_weight.assign(c.n, 0.0);
    Random random{3};
    for (int64_t row = 0; row < c.n; ++row) {
      c.set(c.student, row, 1, -kInf);
      const int bits = static_cast<int>(row & 0x7fff);
      const double number = decode16(bits, d), next = decode16(bits + 1, d);
      // Half of them between two numbers; exact ties among them.
      const double between = row & 0x8000 ? (row & 1 ? 0.5 : random.uniform()) : 0.0;
      const double value = between > 0.0 && std::isfinite(next) ? number + between * (next - number) : number;
      c.hard_weight[row] = std::isfinite(value) ? static_cast<double>(static_cast<float>(value)) : 0.0;
    }
    c.run();
    for (int64_t row = 0; row < c.n; ++row) {
      const double value = c.hard_weight[row], got = c.gradient(c.student, row, 0);
      char low_bytes[8] = {};
      encode(value, low_bytes, d);
      uint16_t low_bits;
      std::memcpy(&low_bits, low_bytes, 2);
      const double low = decode16(low_bits, d), high = decode16(low_bits + 1, d);
      const double middle = low + (high - low) / 2;
      const double want = value < middle ? low : value > middle ? high : low_bits & 1 ? high : low;
      CHECK(got == want, "%.9g is stored as %.9g, not %.9g", value, got, want);
      CHECK(c.gradient(c.student, row, 1) == -want, "the same, negative");
    }
  }
}

void test_temperature_head_labels() {
  Random random{4};
  for (int o = 0; o < kd::kObjectives; ++o)
    for (bool row_major : {true, false})
      for (int variant = 0; variant < 8; ++variant) {
        Case c(37, 101);
        c.row_major = row_major;
        c.objective = objective(o);
        if (variant & 1) {
          for (int64_t row = 0; row < c.n; ++row) {
            c.student.temperature[row] = row % 3 ? 0.5 + 2 * random.uniform() : 1.0;
            c.teacher.temperature[row] = 0.5 + 2 * random.uniform();
          }
        }
        if (variant & 2) {
          c.student.scale = 0.7;
          c.student.softcap = 5.0;
          c.teacher.scale = 1.3;
          c.teacher.softcap = row_major ? 0.0 : 8.0;
        }
        if (variant & 4) {
          for (int64_t row = 0; row < c.n; ++row) {
            c.labels.push_back(static_cast<int64_t>(random.uniform() * 101));
            c.soft_weight[row] = random.uniform();
            c.hard_weight[row] = row % 4 ? random.uniform() : 0.0;
          }
        }
        c.randomize(random, 2.0, -1.0);
        c.run();
        compare(c, c, "temperature, head, labels");
      }
}

void test_phases_threads_batch_in_place() {
  Random random{5};
  constexpr unsigned s = kd::kStatistics, t = kd::kTerms, g = kd::kGradient;
  for (int o = 0; o < kd::kObjectives; ++o)
    for (bool row_major : {true, false})
      for (bool teacher_gradient : {true, false}) {
        Case c(70, 333);
        c.row_major = row_major;
        c.objective = objective(o);
        c.teacher.want_grad = teacher_gradient;
        for (int64_t row = 0; row < c.n; ++row) {
          c.labels.push_back(row);
          c.hard_weight[row] = 0.25;
          c.student.temperature[row] = row % 2 ? 1.0 : 1.5;
        }
        c.randomize(random, 3.0, -1.0);
        c.run();
        const auto same = [&](const Case& other, const char* what) {
          CHECK(c.terms == other.terms, "%s terms: %s", what, kd::objective_name(c.objective));
          CHECK(c.student.grad == other.student.grad, "%s student: %s", what, kd::objective_name(c.objective));
          CHECK(c.teacher.grad == other.teacher.grad, "%s teacher: %s", what, kd::objective_name(c.objective));
        };
        for (int threads : {1, 3, 7}) {
          Case other = c;
          other.threads = threads;
          other.run();
          same(other, "threads");
        }
        for (const auto& calls : {std::vector<unsigned>{s, t, g}, {s | t, g}, {s, t | g}}) {
          Case other = c;
          other.run(calls);
          same(other, "phases");
        }
        Case over = c;
        over.student.in_place = over.teacher.in_place = true;
        over.run();
        CHECK(over.student.logits == c.student.grad, "in place: %s", kd::objective_name(c.objective));
        if (teacher_gradient) CHECK(over.teacher.logits == c.teacher.grad, "in place, teacher");

        for (int64_t row : {int64_t{0}, int64_t{31}, int64_t{32}, int64_t{69}}) {  // alone
          Case alone(1, c.vocab);
          alone.row_major = row_major;
          alone.objective = c.objective;
          alone.teacher.want_grad = teacher_gradient;
          alone.labels = {c.labels[row]};
          alone.hard_weight = {0.25};
          alone.student.temperature = {c.student.temperature[row]};
          alone.allocate();
          bool equal = true;
          for (int64_t v = 0; v < c.vocab; ++v) {
            alone.set(alone.student, 0, v, c.logit(c.student, row, v));
            alone.set(alone.teacher, 0, v, c.logit(c.teacher, row, v));
          }
          alone.run();
          for (int64_t v = 0; v < c.vocab; ++v)
            equal = equal && alone.gradient(alone.student, 0, v) == c.gradient(c.student, row, v);
          CHECK(equal && alone.soft(0) == c.soft(row), "alone: %s row %d", kd::objective_name(c.objective), int(row));
        }
      }
}

void test_absent_entries() {  // -inf
  Random random{6};
  for (int o = 0; o < kd::kObjectives; ++o)
    for (bool row_major : {true, false})
      for (Dtype d : {Dtype::float32, Dtype::bfloat16, Dtype::float64})
        for (int which = 1; which < 4; ++which) {  // 1: teacher, 2: student, 3: both
          Case c(4, 4200);                         // the first blocks hold nothing else
          c.row_major = row_major;
          c.objective = objective(o);
          c.student.dtype = c.teacher.dtype = d;
          c.student.grad_dtype = d == Dtype::float64 ? d : Dtype::float32;
          check_absent(c, random, which, 4100, 4150);
        }
}

void test_poisoned_rows_stay_alone() {
  Random random{7};
  for (int o = 0; o < kd::kObjectives; ++o)
    for (bool row_major : {true, false})
      for (int poison = 0; poison < 8; ++poison) {
        Case clean(40, 300);
        clean.row_major = row_major;
        clean.objective = objective(o);
        check_poison(clean, random, poison, 17, 18);
      }
}

void test_part_of_a_vocabulary() {
  Random random{9};
  for (int o = 0; o < kd::kObjectives; ++o)
    for (bool row_major : {true, false}) {
      Case c(20, 300);
      c.row_major = row_major;
      c.objective = objective(o);
      check_part_of_a_vocabulary(c, random);
    }
}

void test_far_and_near() {
  Random random{8};
  for (int o = 0; o < kd::kObjectives; ++o)
    for (bool row_major : {true, false}) {
      Case near(3, 5000);  // a divergence of about 5e-7
      near.row_major = row_major;
      near.objective = objective(o);
      near.randomize(random, 3.0, 1e-3);
      near.run();
      for (int64_t row = 0; row < near.n; ++row) {
        const double want = expect(near, row).soft;
        CHECK(std::fabs(near.soft(row) - want) <= 1e-4 * want, "near: %s %g, not %g",
              kd::objective_name(near.objective), near.soft(row), want);
      }
      Case same = near;
      same.student.temperature.assign(3, 1.7);
      same.teacher.temperature.assign(3, 1.7);
      same.student.logits = same.teacher.logits;
      same.run();
      for (int64_t row = 0; row < same.n; ++row)
        CHECK(same.soft(row) == 0.0, "%s of equal models is %g", kd::objective_name(same.objective), same.soft(row));

      Case far(2, 40);  // 1000 nats apart
      far.row_major = row_major;
      far.objective = objective(o);
      far.randomize(random, 2.0, -1.0);
      far.set(far.student, 0, 3, 1000.0);
      far.set(far.teacher, 0, 5, 1000.0);
      far.set(far.teacher, 1, 7, -1000.0);
      far.run();
      for (int64_t row = 0; row < far.n; ++row) {
        const double want = expect(far, row).soft;
        CHECK(std::fabs(far.soft(row) - want) <= 4e-6 * want, "far: %s %.9g, not %.9g",
              kd::objective_name(far.objective), far.soft(row), want);
        for (int64_t v = 0; v < far.vocab; ++v)
          CHECK(std::isfinite(far.gradient(far.student, row, v)), "far: %s", kd::objective_name(far.objective));
      }
    }
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", kd::instruction_set());
  test_objectives_and_shapes();
  test_dtypes();
  test_every_16_bit_number();
  test_temperature_head_labels();
  test_phases_threads_batch_in_place();
  test_absent_entries();
  test_poisoned_rows_stay_alone();
  test_part_of_a_vocabulary();
  test_far_and_near();
  return check::finish();
}
