// The sorted-L1 kernel for one instruction set. The bits of a probability sort like the number itself, and one below 2
// leaves the top two of them clear: three digits of ten bits are a whole float32. A radix sort by the lowest digit
// first is stable, which is the rule for ties. One row of records and signs lies in the L2 cache.
#include <omp.h>

#include "../sorted_l1.h"
#include "isa.h"
#include "strip.h"

namespace kd {
namespace KD_ISA {
namespace {

template <class T>
struct Digits;
template <>
struct Digits<float> {
  using Bits = uint32_t;
  static constexpr int kPasses = 3, kBits = 10;
};
template <>
struct Digits<double> {
  using Bits = uint64_t;
  static constexpr int kPasses = 6, kBits = 11;
};

// A probability's bits, the largest first. The id is carried along where a gradient wants it.
template <class T>
struct Key {
  using Bits = typename Digits<T>::Bits;
  static constexpr Bits kMask = (Bits{1} << (sizeof(T) * 8 - 2)) - 1;
  Bits key;

  KD_INLINE void set(T p, int64_t) {
    Bits bits;
    std::memcpy(&bits, &p, sizeof bits);
    key = kMask - (bits & kMask);
  }
  KD_INLINE T probability() const {
    const Bits bits = kMask - key;
    T p;
    std::memcpy(&p, &bits, sizeof p);
    return p;
  }
};
template <class T>
struct KeyAndId : Key<T> {
  uint32_t id;
  KD_INLINE void set(T p, int64_t v) {
    Key<T>::set(p, v);
    id = static_cast<uint32_t>(v);
  }
};

// From `from` through `to` and back, once per digit; the result is in `to` where the passes are odd.
template <class T, class Record>
void radix_sort(Record* from, Record* to, int64_t count) {
  using Bits = typename Digits<T>::Bits;
  constexpr int kBits = Digits<T>::kBits, kPasses = Digits<T>::kPasses, kBuckets = 1 << kBits;
  uint32_t places[kPasses][kBuckets] = {};
  for (int64_t i = 0; i < count; ++i) {
    const Bits key = from[i].key;
    for (int pass = 0; pass < kPasses; ++pass) ++places[pass][(key >> (pass * kBits)) & (kBuckets - 1)];
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t begin = 0;
    for (int bucket = 0; bucket < kBuckets; ++bucket) {
      const uint32_t size = places[pass][bucket];
      places[pass][bucket] = begin;
      begin += size;
    }
    for (int64_t i = 0; i < count; ++i) to[places[pass][(from[i].key >> (pass * kBits)) & (kBuckets - 1)]++] = from[i];
    Record* const swapped = from;
    from = to;
    to = swapped;
  }
}

inline int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// One row's scratch memory: the sorted records of both sides, a buffer that they share, and the signs by id.
template <class T>
struct Scratch {
  static constexpr int64_t kRecord = sizeof(KeyAndId<T>);
  char *student, *teacher, *other;
  int8_t *student_signs, *teacher_signs;

  static int64_t bytes(int64_t student_vocab, int64_t teacher_vocab) {
    const int64_t more = student_vocab > teacher_vocab ? student_vocab : teacher_vocab;
    return whole_lines(kRecord * student_vocab) + whole_lines(kRecord * teacher_vocab) + whole_lines(kRecord * more) +
           whole_lines(student_vocab) + whole_lines(teacher_vocab);
  }
  Scratch(char* at, int64_t student_vocab, int64_t teacher_vocab) {
    const auto take = [&at](int64_t bytes) {
      char* const part = at;
      at += whole_lines(bytes);
      return part;
    };
    student = take(kRecord * student_vocab);
    teacher = take(kRecord * teacher_vocab);
    other = take(kRecord * (student_vocab > teacher_vocab ? student_vocab : teacher_vocab));
    student_signs = reinterpret_cast<int8_t*>(take(student_vocab));
    teacher_signs = reinterpret_cast<int8_t*>(take(teacher_vocab));
  }
};

// sign - sum_j p_j sign_j, by sign: without the cancellation that it has where nearly all have the same sign.
struct Pull {
  double at[3] = {};
};

// Sums of probabilities by their sign; divided by what they sum to as they were computed.
struct SignSums {
  double of[3] = {};
  KD_INLINE void add(double probability, int sign) { of[sign + 1] += probability; }
  double signed_sum() const { return of[2] - of[0]; }
  Pull pull() const {
    const double total = of[0] + of[1] + of[2];
    return {{-(2.0 * of[2] + of[1]) / total, (of[0] - of[2]) / total, (2.0 * of[0] + of[1]) / total}};
  }
};

// One model's row on its way to probabilities, and its gradient on its way back.
template <class T>
class RowSide : Strip<T> {
  using Base = Strip<T>;
  using V = Vec<T>;

 public:
  RowSide(const SortedSide& side, int64_t n) : Base(side.logits, n, side.vocab), side_(side) {}

  const SortedSide& args() const { return side_; }

  void move_to(int64_t row) {
    Base::move_to(row);
    row_ = row;
    inverse_temperature_ = 1.0 / side_.logits.temperature[row];
  }
  bool finite() const { return __builtin_isfinite(side_.max[row_]) && __builtin_isfinite(side_.logz[row_]); }

  template <class Record>
  Record* sorted(char* records, char* other) {
    constexpr bool odd = Digits<T>::kPasses % 2 == 1;
    Record* const first = reinterpret_cast<Record*>(odd ? other : records);
    Record* const second = reinterpret_cast<Record*>(odd ? records : other);
    for (int64_t v = 0; v < side_.vocab; v += Base::block_width()) {
      const int steps = Base::load(side_.logits, v, z_);
      probabilities(steps);
      const int64_t left = side_.vocab - v, count = left < Base::block_width() ? left : Base::block_width();
      for (int64_t i = 0; i < count; ++i) first[v + i].set(p_.at[i], v + i);
    }
    radix_sort<T>(first, second, side_.vocab);
    return reinterpret_cast<Record*>(records);
  }

  // soft pull p + hard p_hard, less hard at the label.
  void write_gradient(const int8_t* signs, const Pull& pull, double soft, double hard, double hard_logz,
                      int64_t label) {
    const Side& side = side_.logits;
    const V zero(0.0), max(side_.max[row_]), logz(hard_logz);
    const V soft_factor(soft * side_.mass[row_] * inverse_temperature_ * side.scale), hard_factor(hard * side.scale);
    const T by_sign[] = {static_cast<T>(pull.at[0]), static_cast<T>(pull.at[1]), static_cast<T>(pull.at[2])};
    for (int64_t v = 0; v < side_.vocab; v += Base::block_width()) {
      const int steps = Base::load(side, v, z_);
      if (soft != 0.0) probabilities(steps);
      const int64_t left = side_.vocab - v, count = left < Base::block_width() ? left : Base::block_width();
      if (soft != 0.0 && signs) {
        for (int64_t i = 0; i < count; ++i) pull_.at[i] = by_sign[signs[v + i] + 1];
      }
      for (int at = 0; at < steps * kLanes<T>; at += V::kLanes) {
        V gradient = zero;
        if (soft != 0.0) gradient = soft_factor * V::load(p_.at + at) * V::load(pull_.at + at);
        if (hard != 0.0) gradient = gradient + hard_factor * exp(V::load(z_.at + at) - max - logz);
        gradient.store(gradient_.at + at);
      }
      if (hard != 0.0 && label >= v && label < v + count) gradient_.at[label - v] -= static_cast<T>(hard * side.scale);
      Base::store(side, v, z_, gradient_.at);
    }
  }

 private:
  void probabilities(int steps) {
    const V max(side_.max[row_]), logz(side_.logz[row_]), inverse(inverse_temperature_);
    for (int at = 0; at < steps * kLanes<T>; at += V::kLanes)
      exp((V::load(z_.at + at) - max) * inverse - logz).store(p_.at + at);
  }

  const SortedSide& side_;
  int64_t row_ = 0;
  double inverse_temperature_ = 1.0;
  Block<T> z_, p_, gradient_;
  Block<T> pull_ = {};
};

template <class T>
class SortedRunner {
 public:
  explicit SortedRunner(const SortedL1& args)
      : args_(args),
        student_(args.student, args.n),
        teacher_(args.teacher, args.n),
        scratch_(static_cast<char*>(args.scratch) + omp_get_thread_num() * KD_ISA::sorted_l1_scratch(args),
                 args.student.vocab, args.teacher.vocab) {}

  void run(int64_t row) {
    student_.move_to(row);
    teacher_.move_to(row);
    const bool wants_student = args_.student.logits.grad, wants_teacher = args_.teacher.logits.grad;
    const double soft = args_.soft_weight[row];
    const double hard = args_.hard_weight ? args_.hard_weight[row] : 0.0;
    const double hard_logz = args_.hard_weight ? args_.hard_logz[row] : 0.0;
    const int64_t label = args_.hard_weight ? args_.labels[row] : -1;
    if (!student_.finite() || !teacher_.finite()) {
      args_.loss[row] = args_.student.sum[row] = args_.teacher.sum[row] = kNaN<double>;
      const double poison = soft == 0.0 ? 0.0 : kNaN<double>;
      if (wants_student) student_.write_gradient(nullptr, Pull(), poison, hard, hard_logz, label);
      if (wants_teacher) teacher_.write_gradient(nullptr, Pull(), poison, 0.0, 0.0, -1);
      return;
    }
    if (wants_student && wants_teacher) {
      compare<KeyAndId<T>, KeyAndId<T>>(row);
    } else if (wants_student) {
      compare<KeyAndId<T>, Key<T>>(row);
    } else if (wants_teacher) {
      compare<Key<T>, KeyAndId<T>>(row);
    } else {
      compare<Key<T>, Key<T>>(row);
    }
    if (wants_student) {
      student_.write_gradient(scratch_.student_signs, student_pull_, soft, hard, hard_logz, label);
    }
    if (wants_teacher) teacher_.write_gradient(scratch_.teacher_signs, teacher_pull_, soft, 0.0, 0.0, -1);
  }

 private:
  KD_INLINE static void mark(const Key<T>&, int8_t, int8_t*) {}
  KD_INLINE static void mark(const KeyAndId<T>& record, int8_t sign, int8_t* signs) { signs[record.id] = sign; }

  template <class StudentRecord, class TeacherRecord>
  void compare(int64_t row) {
    const StudentRecord* q = student_.template sorted<StudentRecord>(scratch_.student, scratch_.other);
    const TeacherRecord* p = teacher_.template sorted<TeacherRecord>(scratch_.teacher, scratch_.other);
    const double student_mass = args_.student.mass[row], teacher_mass = args_.teacher.mass[row];
    const int64_t student_vocab = args_.student.vocab, teacher_vocab = args_.teacher.vocab;
    const int64_t both = student_vocab < teacher_vocab ? student_vocab : teacher_vocab;
    double loss = 0.0;
    SignSums student, teacher;
    for (int64_t k = 0; k < both; ++k) {
      const double own = static_cast<double>(q[k].probability()), other = static_cast<double>(p[k].probability());
      const double difference = own * student_mass - other * teacher_mass;
      const int sign = (difference > 0.0) - (difference < 0.0);
      loss += difference < 0.0 ? -difference : difference;
      student.add(own, sign);
      teacher.add(other, -sign);
      mark(q[k], static_cast<int8_t>(sign), scratch_.student_signs);
      mark(p[k], static_cast<int8_t>(-sign), scratch_.teacher_signs);
    }
    // What the longer side has beyond the shorter one.
    for (int64_t k = both; k < student_vocab; ++k) loss += student_mass * beyond(q[k], student, scratch_.student_signs);
    for (int64_t k = both; k < teacher_vocab; ++k) loss += teacher_mass * beyond(p[k], teacher, scratch_.teacher_signs);
    args_.loss[row] = loss;
    args_.student.sum[row] = student.signed_sum() * student_mass;
    args_.teacher.sum[row] = teacher.signed_sum() * teacher_mass;
    student_pull_ = student.pull();
    teacher_pull_ = teacher.pull();
  }

  template <class Record>
  KD_INLINE static double beyond(const Record& record, SignSums& sums, int8_t* signs) {
    const double probability = static_cast<double>(record.probability());
    const int sign = probability > 0.0;
    sums.add(probability, sign);
    mark(record, static_cast<int8_t>(sign), signs);
    return probability;
  }

  const SortedL1& args_;
  RowSide<T> student_, teacher_;
  Scratch<T> scratch_;
  Pull student_pull_, teacher_pull_;
};

bool wide(const SortedL1& args) {
  return args.student.logits.dtype == Dtype::float64 || args.teacher.logits.dtype == Dtype::float64;
}

}  // namespace

int64_t sorted_l1_scratch(const SortedL1& args) {
  const int64_t student = args.student.vocab, teacher = args.teacher.vocab;
  return wide(args) ? Scratch<double>::bytes(student, teacher) : Scratch<float>::bytes(student, teacher);
}

void sorted_l1(const SortedL1& args) {
  // A sort takes ten times as long as the passes that run_strips counts by.
  const double entries = 10.0 * static_cast<double>(args.n) * static_cast<double>(args.student.vocab);
  if (wide(args)) {
    run_strips<SortedRunner<double>>(args.n, entries, args.threads, args);
  } else {
    run_strips<SortedRunner<float>>(args.n, entries, args.threads, args);
  }
}

}  // namespace KD_ISA
}  // namespace kd
