// The row kernel for one instruction set: compiled once per KD_ISA, called through dispatch.cpp.
// The arithmetic is templated on the objective and the number type only, storage is converted at a block's
// edges (strip.h): storage and objectives never multiply.
#include <cstdlib>

#include "isa.h"
#include "strip.h"

namespace kd {
namespace KD_ISA {
namespace {

// Student parts and probabilities of a whole strip, kept between the terms and the gradient pass while
// they fit a core's share of cache; recomputing them gives the same bits, later.
constexpr int64_t kKeepBytes = int64_t{10} << 20;

template <class T>
struct SoftBlocks {
  SoftBlock<T> variant[2][2];  // [sums][teacher]
  bool student_sums_to_zero, teacher_sums_to_zero;
};

template <class T, class Functor>
SoftBlocks<T> soft_blocks_of() {
  return {{{soft_block<Functor, T, false, false>, soft_block<Functor, T, false, true>},
           {soft_block<Functor, T, true, false>, soft_block<Functor, T, true, true>}},
          Functor::kStudentSumsToZero,
          Functor::kTeacherSumsToZero};
}

template <class T>
SoftBlocks<T> soft_blocks(Objective objective) {
  switch (objective) {
    case Objective::forward_kl:
      return soft_blocks_of<T, ForwardKL>();
    case Objective::reverse_kl:
      return soft_blocks_of<T, ReverseKL>();
    case Objective::jensen_shannon:
      return soft_blocks_of<T, JensenShannon>();
    case Objective::skew_kl:
      return soft_blocks_of<T, SkewKL>();
    case Objective::skew_reverse_kl:
      return soft_blocks_of<T, SkewReverseKL>();
    case Objective::total_variation:
      return soft_blocks_of<T, TotalVariation>();
    case Objective::weighted_kl:
      break;
  }
  return soft_blocks_of<T, WeightedKL>();
}

template <class T>
class StripRunner : Strip<T> {
  using Base = Strip<T>;
  using Base::ahead, Base::ahead_gradient, Base::block_width, Base::entry, Base::first_, Base::load, Base::reduce;
  using Base::row_major_, Base::shape, Base::step_width, Base::store, Base::token, Base::tokens_;

 public:
  StripRunner(const RowDivergence& args, unsigned phases)
      : Base(args.student, args.n, args.vocab),
        args_(args),
        phases_(phases),
        soft_(soft_blocks<T>(args.objective)),
        want_terms_(phases & kTerms),
        want_student_(phases & kGradient && args.student.grad),
        want_teacher_(phases & kGradient && args.teacher.grad) {
    // Without a gradient phase in this call, a later one may want either side's sum.
    teacher_parts_ = want_teacher_ || !(phases & kGradient);
    fused_ =
        want_terms_ && (!want_student_ || soft_.student_sums_to_zero) && (!want_teacher_ || soft_.teacher_sums_to_zero);
    const int64_t steps = (args.vocab + step_width() - 1) / step_width();
    const int64_t bytes = 2 * steps * kLanes<T> * static_cast<int64_t>(sizeof(T));
    if (want_terms_ && want_student_ && !want_teacher_ && !fused_ && bytes <= kKeepBytes) {
      kept_ = static_cast<T*>(std::malloc(static_cast<size_t>(bytes)));
      kept_q_ = kept_ + steps * kLanes<T>;
    }
  }
  ~StripRunner() { std::free(kept_); }
  StripRunner(const StripRunner&) = delete;
  StripRunner& operator=(const StripRunner&) = delete;

  void run(int64_t strip) {
    this->move_to(strip);
    set_up_lanes();
    if (phases_ & kStatistics) statistics_pass();
    if (!want_terms_ && !want_student_ && !want_teacher_) return;
    read_statistics();
    if (want_terms_) {
      sums_ = Sums<T>();
      if (fused_ && (want_student_ || want_teacher_)) {
        gradient_pass();
      } else {
        terms_pass();
      }
      write_terms();
      if (fused_) return;
      read_sums();
    } else {
      read_sums();
    }
    if (want_student_ || want_teacher_) gradient_pass();
  }

 private:
  double* statistics(int64_t row) const { return args_.statistics + row * kStatisticColumns; }

  void set_up_lanes() {
    any_label_ = any_hard_ = false;
    all_temperatures_one_ = true;
    for (int i = 0; i < kLanes<T>; ++i) {
      const int64_t row = token(i);
      set_up_side(args_.student, row, i, student_);
      set_up_side(args_.teacher, row, i, teacher_);
      const double first = args_.parameter0 ? args_.parameter0[row] : 0.0;
      pair_.first.at[i] = static_cast<T>(first);
      pair_.first_complement.at[i] = static_cast<T>(1.0 - first);
      pair_.second.at[i] = static_cast<T>(args_.parameter1 ? args_.parameter1[row] : 0.0);

      const bool tempered = args_.student.temperature[row] != 1.0;
      all_temperatures_one_ = all_temperatures_one_ && !tempered;
      hard_.temperature_is_one.at[i] = tempered ? T(0) : T(1);
      hard_.coefficient.at[i] = hard_.poison.at[i] = T(0);
      label_[i] = -1;
      counts_[i] = false;
      if (!args_.labels) continue;
      any_label_ = true;
      const bool in_range = args_.labels[row] >= 0 && args_.labels[row] < args_.vocab;
      if (in_range) label_[i] = args_.labels[row];
      const double weight = weight_of(args_.hard_weight, row);
      hard_.coefficient.at[i] = static_cast<T>(weight * args_.student.scale);
      counts_[i] = weight != 0.0 || weight_of(args_.soft_weight, row) != 0.0;
      any_hard_ = any_hard_ || weight != 0.0;
    }
  }

  static double weight_of(const double* weights, int64_t row) { return weights ? weights[row] : 0.0; }

  void set_up_side(const Side& side, int64_t row, int lane, SideLanes<T>& lanes) const {
    const double temperature = side.temperature[row];
    lanes.inverse_temperature.at[lane] = static_cast<T>(1.0 / temperature);
    lanes.coefficient.at[lane] = static_cast<T>(weight_of(args_.soft_weight, row) * side.scale / temperature);
  }

  void statistics_pass() {
    const bool hard = any_label_ && !all_temperatures_one_;
    for (int i = 0; i < tokens_; ++i) statistics(token(i))[kLabelLogit] = kNaN<double>;
    online_student_.reset();
    online_teacher_.reset();
    for (int64_t v = 0; v < args_.vocab; v += block_width()) {
      const int steps = load(args_.student, v, z_student_);
      if (hard) {
        accumulate_exp<T, true>(z_student_.at, steps, student_, ahead(args_.student, v), online_student_);
      } else {
        accumulate_exp<T, false>(z_student_.at, steps, student_, ahead(args_.student, v), online_student_);
      }
      if (any_label_) {
        for (int i = 0; i < tokens_; ++i)
          if (const T* z = label_entry(z_student_.at, v, i))
            statistics(token(i))[kLabelLogit] = static_cast<double>(*z);
      }
      load(args_.teacher, v, z_teacher_);
      accumulate_exp<T, false>(z_teacher_.at, steps, teacher_, ahead(args_.teacher, v), online_teacher_);
    }
    for (int i = 0; i < tokens_; ++i) {
      double* row = statistics(token(i));
      double unused;
      // A row without a finite logit has no distribution.
      constexpr double kNone = kNaN<double>;
      reduce(online_student_, student_, i, hard, kNone, row[kMaxStudent], row[kLogzStudent], row[kLogzHard]);
      reduce(online_teacher_, teacher_, i, false, kNone, row[kMaxTeacher], row[kLogzTeacher], unused);
    }
  }

  // Where the label of the i-th token stands in a block that begins at v; null: elsewhere.
  T* label_entry(T* block, int64_t v, int i) const {
    const int64_t at = label_[i] - v;
    if (label_[i] < v || at >= block_width()) return nullptr;
    return block + entry(label_[i], v, i);
  }

  void read_statistics() {
    for (int i = 0; i < kLanes<T>; ++i) {
      const double* row = statistics(token(i));
      student_.max.at[i] = static_cast<T>(row[kMaxStudent]);
      student_.logz.at[i] = static_cast<T>(row[kLogzStudent]);
      teacher_.max.at[i] = static_cast<T>(row[kMaxTeacher]);
      teacher_.logz.at[i] = static_cast<T>(row[kLogzTeacher]);
      pair_.logz_difference.at[i] = static_cast<T>(row[kLogzStudent] - row[kLogzTeacher]);
      hard_.logz.at[i] = static_cast<T>(row[kLogzHard]);
      if (counts_[i] && row[kLabelLogit] != row[kLabelLogit]) {
        hard_.poison.at[i] = kNaN<T>;
        any_hard_ = true;
      }
    }
  }

  // Parts that are known to sum to zero carry no mass.
  static T over_mass(double sum, double mass) { return static_cast<T>(sum == 0.0 ? 0.0 : sum / mass); }

  void read_sums() {
    for (int i = 0; i < kLanes<T>; ++i) {
      const double* row = statistics(token(i));
      student_.sum.at[i] = over_mass(row[kSumStudent], row[kMassStudent]);
      teacher_.sum.at[i] = over_mass(row[kSumTeacher], row[kMassTeacher]);
    }
  }

  void terms_pass() {
    const bool keep = kept_ && want_student_;
    for (int64_t v = 0; v < args_.vocab; v += block_width()) {
      const int steps = load(args_.student, v, z_student_);
      load(args_.teacher, v, z_teacher_);
      Planes<T> planes;
      if (keep) {
        planes.student = kept_ + v / step_width() * kLanes<T>;
        planes.q = kept_q_ + v / step_width() * kLanes<T>;
      }
      soft_.variant[1][teacher_parts_](z_student_.at, z_teacher_.at, steps, student_, teacher_, pair_,
                                       ahead(args_.student, v), ahead(args_.teacher, v), planes, &sums_);
      add_entropies(steps);
    }
  }

  void add_entropies(int steps) {
    if (!args_.entropies) return;
    entropy_block(z_student_.at, steps, student_, sums_.student_entropy);
    entropy_block(z_teacher_.at, steps, teacher_, sums_.teacher_entropy);
  }

  void gradient_pass() {
    const bool kept = kept_ && !fused_;
    const bool q_needed = !soft_.student_sums_to_zero || any_hard_;
    const bool p_needed = !soft_.teacher_sums_to_zero;
    const bool z_needed = !kept || args_.student.softcap != 0.0 || (any_hard_ && !all_temperatures_one_);
    for (int64_t v = 0; v < args_.vocab; v += block_width()) {
      const int steps = shape(args_.student.offsets, args_.student.ld, v).steps;
      if (z_needed) load(args_.student, v, z_student_);
      Planes<T> planes;
      if (kept) {
        planes.student = kept_ + v / step_width() * kLanes<T>;
        planes.q = kept_q_ + v / step_width() * kLanes<T>;
      } else {
        load(args_.teacher, v, z_teacher_);
        if (want_student_) {
          planes.student = student_part_.at;
          planes.q = q_needed ? q_.at : nullptr;
        }
        if (want_teacher_) {
          planes.teacher = teacher_part_.at;
          planes.p = p_needed ? p_.at : nullptr;
        }
        soft_.variant[fused_][fused_ ? teacher_parts_ : want_teacher_](z_student_.at, z_teacher_.at, steps, student_,
                                                                       teacher_, pair_, ahead(args_.student, v),
                                                                       ahead(args_.teacher, v), planes, &sums_);
        if (fused_) add_entropies(steps);
      }
      if (want_student_) {
        finish_block(planes.student, soft_.student_sums_to_zero ? nullptr : planes.q, steps, student_,
                     ahead_gradient(args_.student, v));
        if (any_hard_) add_hard(planes.student, planes.q, v, steps);
        store(args_.student, v, z_student_, planes.student);
      }
      if (want_teacher_) {
        finish_block(planes.teacher, planes.p, steps, teacher_, ahead_gradient(args_.teacher, v));
        store(args_.teacher, v, z_teacher_, planes.teacher);
      }
    }
  }

  void add_hard(T* gradient, const T* q, int64_t v, int steps) const {
    add_hard_block(gradient, q, z_student_.at, steps, student_, hard_);
    for (int i = 0; i < tokens_; ++i)
      if (T* entry = label_entry(gradient, v, i)) *entry -= hard_.coefficient.at[i];
  }

  void write_terms() {
    for (int i = 0; i < tokens_; ++i) {
      double* row = statistics(token(i));
      double* terms = args_.terms + token(i) * kTermColumns;
      row[kSumStudent] = reduce(sums_.student, i);
      row[kSumTeacher] = reduce(sums_.teacher, i);
      row[kMassStudent] = reduce(sums_.student_mass, i);
      row[kMassTeacher] = reduce(sums_.teacher_mass, i);
      terms[kSoft] = reduce(sums_.term, i);
      terms[kHard] = args_.labels ? row[kLogzHard] - (row[kLabelLogit] - row[kMaxStudent]) : 0.0;
      terms[kStudentEntropy] = reduce(sums_.student_entropy, i);
      terms[kTeacherEntropy] = reduce(sums_.teacher_entropy, i);
    }
  }

  const RowDivergence& args_;
  const unsigned phases_;
  const SoftBlocks<T> soft_;
  const bool want_terms_, want_student_, want_teacher_;
  bool teacher_parts_, fused_;
  T *kept_ = nullptr, *kept_q_ = nullptr;

  bool any_label_ = false, any_hard_ = false, all_temperatures_one_ = true;
  int64_t label_[kLanes<T>];  // -1: none in range
  bool counts_[kLanes<T>];    // has a label and a weight
  SideLanes<T> student_, teacher_;
  PairLanes<T> pair_;
  HardLanes<T> hard_;
  OnlineSum<T> online_student_, online_teacher_;
  Sums<T> sums_;
  Block<T> z_student_, z_teacher_, student_part_, q_, teacher_part_, p_;
};

template <class T>
void run(const RowDivergence& args, unsigned phases) {
  const double entries = static_cast<double>(args.n) * static_cast<double>(args.vocab);
  run_strips<StripRunner<T>>(Strip<T>::strips(args.student, args.n), entries, args.threads, args, phases);
}

}  // namespace

void row_divergence(const RowDivergence& args, unsigned phases) {
  const bool wide = args.student.dtype == Dtype::float64 || args.teacher.dtype == Dtype::float64;
  if (wide) {
    run<double>(args, phases);
  } else {
    run<float>(args, phases);
  }
}

}  // namespace KD_ISA
}  // namespace kd
