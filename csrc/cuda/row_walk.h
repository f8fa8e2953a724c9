// The row kernel's body: rows of student and teacher logits in, divergence, statistics and gradients out;
// row_divergence.h states the contract. Written against a `Thread` (device_thread.cuh; in the tests, a thread of
// the host), so that the very code of the kernels runs where there is no GPU.
//
// A row belongs to a cluster of blocks, each with a slice of the vocabulary; a cluster of one is a block. A thread
// walks its slice a group of entries at a time, always the same ones, so that a gradient stored over the logits
// meets nobody. Where rows are held, the slices are copied to shared memory first, and every walk reads them there;
// else each walk reads global memory, the second one backwards, beginning with what the cache still holds. Sums are
// made in the same order either way, so both, and phases run apart, give the same bits.
#pragma once
#include <initializer_list>

#include "../row_divergence.h"
#include "storage.h"

namespace kd {
namespace cuda {

// A call as the kernel gets it.
struct Work {
  RowDivergence job;
  unsigned phases;
  int64_t first_row;      // of this launch
  int64_t width;          // entries of a slice, a multiple of every group
  int64_t student_bytes;  // shared memory of the student's slice, where rows are held
};

constexpr int kWarp = 32, kMostWarps = 8;

// Where warps, and then the blocks of a cluster, leave their part of a row's sums. Each place is written once a
// row: no barrier is needed before writing.
struct Scratch {
  double statistics[kMostWarps][5], terms[kMostWarps][7];
  double block_statistics[5], block_terms[7];
};
constexpr int kScratchBytes = (sizeof(Scratch) + 15) / 16 * 16;
constexpr int kSlack = 16;  // a slice stands in shared memory as far past a multiple of 16 bytes as in global memory

struct Largest {
  template <class T>
  KD_BOTH T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Sum {
  template <class T>
  KD_BOTH T operator()(T a, T b) const {
    return a + b;
  }
};

// Largest logits and sums of exponentials relative to them, of a thread, a warp, a block or a cluster.
template <class F>
struct Online {
  F top_student = lowest<F>(), top_teacher = lowest<F>();
  double student = 0, teacher = 0, hard = 0;

  KD_BOTH void write(double* at) const {
    at[0] = static_cast<double>(top_student), at[1] = static_cast<double>(top_teacher);
    at[2] = student, at[3] = teacher, at[4] = hard;
  }
  KD_BOTH void read(const double* at) {
    top_student = static_cast<F>(at[0]), top_teacher = static_cast<F>(at[1]);
    student = at[2], teacher = at[3], hard = at[4];
  }
  // Every lane gets the sums over its warp.
  template <class Thread>
  KD_BOTH void combine(const Thread& thread, F inverse_student, F inverse_teacher) {
    F tops[2] = {top_student, top_teacher};
    thread.warp_reduce(tops, Largest());
    double sums[3] = {moved(student, (top_student - tops[0]) * inverse_student),
                      moved(teacher, (top_teacher - tops[1]) * inverse_teacher), moved(hard, top_student - tops[0])};
    thread.warp_reduce(sums, Sum());
    top_student = tops[0], top_teacher = tops[1];
    student = sums[0], teacher = sums[1], hard = sums[2];
  }

 private:
  // Nothing but -inf has the sum 0, and stays so wherever it is moved to.
  KD_BOTH static double moved(double sum, F by) { return sum == 0.0 ? 0.0 : sum * static_cast<double>(exp(by)); }
};

// One model's end of a row.
template <class S>
struct RowSide {
  using F = typename S::Number;
  const Side& side;
  const char* data;  // the slice; in shared memory where rows are held
  char* grad;        // the slice's; null: not wanted
  bool whole, whole_grad, capped;
  F scale, cap, inverse_temperature, top, logz, mean, coefficient;

  KD_BOTH RowSide(const Side& of, int64_t row, int64_t begin, bool gradient)
      : side(of), grad(nullptr), capped(of.softcap != 0.0), top(0), logz(0), mean(0), coefficient(0) {
    data = static_cast<const char*>(of.logits) + (of.offsets[row] + begin) * bytes_of(dtype());
    whole = whole_loads(data, S::kGroup * bytes_of(dtype()));
    whole_grad = false;
    if (gradient && of.grad) {
      grad = static_cast<char*>(of.grad) + (of.grad_offsets[row] + begin) * bytes_of(of.grad_dtype);
      whole_grad = whole_stores(grad, S::kGroup * bytes_of(of.grad_dtype));
    }
    scale = static_cast<F>(capped ? of.scale / of.softcap : of.scale);
    cap = static_cast<F>(of.softcap);
    inverse_temperature = static_cast<F>(1.0 / of.temperature[row]);
  }

  KD_BOTH Dtype dtype() const { return S::kFixed ? S::kDtype : side.dtype; }

  // `scale` has the softcap divided out of it.
  KD_BOTH F shaped(F x) const { return capped ? cap * tanh_of(x * scale) : x * scale; }

  KD_BOTH void load(Raw<S>& raw, int64_t at, int inside) const {
    raw.load(data + at * bytes_of(dtype()), dtype(), inside, whole);
  }
  // -inf past the end of the row.
  KD_BOTH void logits(const Raw<S>& raw, int inside, F (&z)[S::kGroup]) const {
    KD_UNROLL
    for (int i = 0; i < S::kGroup; ++i) z[i] = raw.template number<F>(i, dtype());
    if (scale != F(1)) {
      KD_UNROLL
      for (int i = 0; i < S::kGroup; ++i) z[i] = z[i] * scale;
    }
    if (capped) {
      KD_ROLL  // one copy of the code for all: the numbers pass before it one after the other
          for (int turn = 0; turn < S::kGroup; ++turn) {
        const F shaped = cap * tanh_of(z[0]);
        KD_UNROLL
        for (int i = 0; i + 1 < S::kGroup; ++i) z[i] = z[i + 1];
        z[S::kGroup - 1] = shaped;
      }
    }
    if (inside < S::kGroup) {
      KD_UNROLL
      for (int i = 0; i < S::kGroup; ++i) z[i] = i < inside ? z[i] : -infinity<F>();
    }
  }
  KD_BOTH F surprise(F z) const {  // -p log p, with p this logit's probability
    const F log_p = (z - top) * inverse_temperature - logz, p = exp(log_p);
    return p == F(0) ? F(0) : -p * log_p;
  }
  KD_BOTH F part(F value, F probability) const {  // a weight of 0 silences the row, whatever it holds
    return coefficient == F(0) ? F(0) : coefficient * fma(-probability, mean, value);
  }
  KD_BOTH void store(F (&gradient)[S::kGroup], const F (&z)[S::kGroup], int64_t at, int inside) const {
    if (capped) {  // the softcap's derivative; a gradient of 0 stays 0 whatever z is
      const F inverse = F(1) / cap;
      KD_UNROLL
      for (int i = 0; i < S::kGroup; ++i) {
        const F y = z[i] * inverse;
        gradient[i] = gradient[i] == F(0) ? F(0) : gradient[i] * (F(1) - y) * (F(1) + y);
      }
    }
    store_group(gradient, grad + at * bytes_of(side.grad_dtype), side.grad_dtype, inside, whole_grad);
  }
};

// A thread's groups in its slice. Walked backwards they are the same groups.
template <class S, class Thread>
struct Groups {
  int64_t count, tiles, stride, first;
  KD_BOTH Groups(const Thread& thread, int64_t entries) : count(entries) {
    stride = int64_t{thread.count()} * S::kGroup;
    first = int64_t{thread.index()} * S::kGroup;
    tiles = (count + stride - 1) / stride;
  }
  KD_BOTH int64_t at(int64_t tile, bool backwards) const {
    return (backwards ? tiles - 1 - tile : tile) * stride + first;
  }
  KD_BOTH int inside(int64_t at) const {
    const int64_t left = count - at;
    return left <= 0 ? 0 : left < S::kGroup ? static_cast<int>(left) : S::kGroup;
  }
};

template <class S, class Functor, bool kTeacher, class Thread>
class Row {
  using F = typename S::Number;
  // The gradient is written in the walk that adds up the terms.
  static constexpr bool kFused = Functor::kStudentSumsToZero && !kTeacher;

 public:
  KD_BOTH Row(const Thread& thread, const Work& work, bool held)
      : held_(held),
        thread_(thread),
        work_(work),
        job_(work.job),
        row_(work.first_row + thread.cluster()),
        begin_(thread.rank() * work.width),
        groups_(thread, slice_entries(work, begin_)),
        scratch_(*static_cast<Scratch*>(thread.shared())),
        student_(job_.student, row_, begin_, work.phases & kGradient),
        teacher_(job_.teacher, row_, begin_, kTeacher && work.phases & kGradient),
        statistics_(job_.statistics + row_ * kStatisticColumns) {}

  KD_BOTH void run() {
    set_up_labels();
    if (held_) hold();
    if (work_.phases & kStatistics) statistics();
    if (!(work_.phases & (kTerms | kGradient))) return leave();
    read_statistics();
    if (work_.phases & kTerms) {
      walk<true, kFused>(true);
      terms();
    } else {
      set_means(statistics_[kSumStudent], statistics_[kMassStudent], statistics_[kSumTeacher],
                statistics_[kMassTeacher]);
    }
    const bool written = kFused && work_.phases & kTerms;
    if (!written && (student_.grad || teacher_.grad)) walk<false, true>(false);
    leave();
  }

 private:
  KD_BOTH static int64_t slice_entries(const Work& work, int64_t begin) {
    const int64_t left = work.job.vocab - begin;
    return left < 0 ? 0 : left < work.width ? left : work.width;
  }

  KD_BOTH bool speaks() const { return thread_.rank() == 0 && thread_.index() == 0; }  // for the row

  // The others may still be reading this block's sums.
  KD_BOTH void leave() const {
    if (thread_.ranks() > 1) thread_.cluster_barrier();
  }

  KD_BOTH void set_up_labels() {
    const double temperature = job_.student.temperature[row_];
    tempered_ = false;
    known_ = false;
    label_ = -1;
    hard_coefficient_ = poison_ = F(0);
    if (!job_.labels) return;
    tempered_ = temperature != 1.0;
    const int64_t label = job_.labels[row_];
    known_ = label >= 0 && label < job_.vocab;
    if (known_) label_ = label - begin_;  // in this slice, or anywhere else
    hard_coefficient_ = static_cast<F>(job_.hard_weight[row_] * job_.student.scale);
  }

  // --- shared memory ---------------------------------------------------------------------------------
  KD_BOTH void hold() {
    char* area = static_cast<char*>(thread_.shared()) + kScratchBytes;
    student_.data = copy(student_, area);
    thread_.commit();
    teacher_.data = copy(teacher_, area + work_.student_bytes);
    thread_.commit();
    student_held_ = teacher_held_ = false;
  }

  // Begins to copy a slice; returns where it will stand.
  KD_BOTH const char* copy(const RowSide<S>& side, char* area) const {
    const int size = bytes_of(side.dtype());
    const uint32_t past = low_bits(side.data);
    char* to = area + past;
    const int64_t bytes = groups_.count * size;
    const int64_t lead = bytes < (16 - past) % 16 ? bytes : (16 - past) % 16;
    const int64_t words = (bytes - lead) / 16;
    for (int64_t i = thread_.index(); i < words; i += thread_.count())
      thread_.copy_async(to + lead + 16 * i, side.data + lead + 16 * i);
    copy_numbers(to, side.data, lead / size, size);
    const int64_t done = lead + 16 * words;
    copy_numbers(to + done, side.data + done, (bytes - done) / size, size);
    return to;
  }

  // Fewer than 16 bytes: a number a thread.
  KD_BOTH void copy_numbers(char* to, const char* from, int64_t numbers, int size) const {
    if (thread_.index() >= numbers) return;
    const int64_t at = thread_.index() * size;
    if (size == 2) {
      write(to + at, read<uint16_t>(from + at));
    } else {
      write(to + at, read<uint32_t>(from + at));
    }
  }

  KD_BOTH void wait_for_student() {
    if (!held_ || student_held_) return;
    thread_.template wait<1>();
    thread_.barrier();
    student_held_ = true;
  }
  KD_BOTH void wait_for_teacher() {
    if (!held_ || teacher_held_) return;
    thread_.template wait<0>();
    thread_.barrier();
    student_held_ = teacher_held_ = true;
  }

  // --- statistics ------------------------------------------------------------------------------------
  KD_BOTH void statistics() {
    // Before any gradient may overwrite it: the barriers below stand between.
    F label_logit = not_a_number<F>();
    if (speaks() && known_) {
      const char* logits = static_cast<const char*>(job_.student.logits);
      const int64_t at = job_.student.offsets[row_] + job_.labels[row_];
      label_logit = student_.shaped(read_number<F>(logits + at * bytes_of(student_.dtype()), student_.dtype()));
    }
    Online<F> online;
    wait_for_student();
    F soft = F(0), hard = F(0);
    accumulate(student_, online.top_student, soft, hard, tempered_);
    online.student = static_cast<double>(soft), online.hard = static_cast<double>(hard);
    wait_for_teacher();
    soft = F(0);
    accumulate(teacher_, online.top_teacher, soft, hard, false);
    online.teacher = static_cast<double>(soft);
    reduce(online);
    // A sum of 0 is a row without a finite logit, which has no distribution; the lowest finite number is a logit.
    const double nan = not_a_number<double>();
    const double logz_student = online.student == 0.0 ? nan : ::log(online.student);
    const double logz_teacher = online.teacher == 0.0 ? nan : ::log(online.teacher);
    const double logz_hard = !tempered_ ? logz_student : online.hard == 0.0 ? nan : ::log(online.hard);
    values_[kMaxStudent] = online.student == 0.0 ? -infinity<double>() : static_cast<double>(online.top_student);
    values_[kMaxTeacher] = online.teacher == 0.0 ? -infinity<double>() : static_cast<double>(online.top_teacher);
    values_[kLogzStudent] = logz_student;
    values_[kLogzTeacher] = logz_teacher;
    values_[kLogzHard] = logz_hard;
    values_[kLabelLogit] = static_cast<double>(label_logit);  // known to the speaker only
    if (!speaks()) return;
    for (int i : {kMaxStudent, kLogzStudent, kMaxTeacher, kLogzTeacher, kLogzHard, kLabelLogit})
      statistics_[i] = values_[i];
  }

  // Sums exp((z - top) / temperature) over the slice's groups, and at temperature 1 where `tempered`. A group is
  // brought to its largest logit before it is added: -inf adds 0, NaN and inf leave a NaN.
  KD_BOTH void accumulate(const RowSide<S>& side, F& top, F& soft, F& hard, bool tempered) const {
    constexpr F unit = NumberTraits<F>::kExponentUnit;
    Raw<S> next;
    if (groups_.tiles > 0) side.load(next, groups_.at(0, false), groups_.inside(groups_.at(0, false)));
    KD_ROLL
    for (int64_t tile = 0; tile < groups_.tiles; ++tile) {
      const int inside = groups_.inside(groups_.at(tile, false));
      const Raw<S> raw = next;
      if (tile + 1 < groups_.tiles) {  // in flight while this group is worked on
        const int64_t ahead = groups_.at(tile + 1, false);
        side.load(next, ahead, groups_.inside(ahead));
      }
      F z[S::kGroup], largest = top;
      side.logits(raw, inside, z);
      KD_UNROLL
      for (int i = 0; i < S::kGroup; ++i) largest = z[i] > largest ? z[i] : largest;
      soft = joined(soft, top, z, largest, side.inverse_temperature * unit);
      if (tempered) hard = joined(hard, top, z, largest, unit);
      top = largest;
    }
  }
  KD_BOTH static F joined(F sum, F top, const F (&z)[S::kGroup], F largest, F exponent) {
    F added = F(0);
    KD_UNROLL
    for (int i = 0; i < S::kGroup; ++i) added = added + exp_of_units((z[i] - largest) * exponent);
    return fma(sum, exp_of_units((top - largest) * exponent), added);
  }

  KD_BOTH void reduce(Online<F>& online) {
    const F inverse_student = student_.inverse_temperature, inverse_teacher = teacher_.inverse_temperature;
    const int lane = thread_.index() % kWarp, warp = thread_.index() / kWarp;
    online.combine(thread_, inverse_student, inverse_teacher);
    if (lane == 0) online.write(scratch_.statistics[warp]);
    thread_.barrier();
    online = Online<F>();
    if (lane < thread_.count() / kWarp) online.read(scratch_.statistics[lane]);
    online.combine(thread_, inverse_student, inverse_teacher);
    if (thread_.ranks() == 1) return;
    if (thread_.index() == 0) online.write(scratch_.block_statistics);
    thread_.cluster_barrier();
    online = Online<F>();
    if (lane < thread_.ranks()) online.read(thread_.remote(&scratch_, lane)->block_statistics);
    online.combine(thread_, inverse_student, inverse_teacher);
  }

  KD_BOTH void read_statistics() {
    if (!(work_.phases & kStatistics)) {
      KD_UNROLL
      for (int i = 0; i < kStatisticColumns; ++i) values_[i] = statistics_[i];
    }
    student_.top = static_cast<F>(values_[kMaxStudent]);
    student_.logz = static_cast<F>(values_[kLogzStudent]);
    teacher_.top = static_cast<F>(values_[kMaxTeacher]);
    teacher_.logz = static_cast<F>(values_[kLogzTeacher]);
    log_ratio_ = static_cast<F>(values_[kLogzStudent] - values_[kLogzTeacher]);
    hard_logz_ = static_cast<F>(values_[kLogzHard]);
    const double first = job_.parameter0 ? job_.parameter0[row_] : 0.0;
    parameters_ = {static_cast<F>(first), static_cast<F>(1.0 - first),
                   static_cast<F>(job_.parameter1 ? job_.parameter1[row_] : 0.0)};
    if (!(work_.phases & kGradient)) return;
    const double soft = job_.soft_weight[row_];
    // Where the statistics were made just now, the label's logit is known to the speaker only.
    const bool lost = work_.phases & kStatistics ? !known_ : values_[kLabelLogit] != values_[kLabelLogit];
    if (job_.labels && lost && (soft != 0.0 || job_.hard_weight[row_] != 0.0)) poison_ = not_a_number<F>();
    student_.coefficient = static_cast<F>(soft * job_.student.scale / job_.student.temperature[row_]);
    teacher_.coefficient = static_cast<F>(soft * job_.teacher.scale / job_.teacher.temperature[row_]);
  }

  // --- terms and gradient ------------------------------------------------------------------------------
  enum { kTermSum, kStudentSum, kStudentMass, kTeacherSum, kTeacherMass, kStudentH, kTeacherH, kSums };

  template <bool kAdd, bool kStore>
  KD_BOTH void walk(bool backwards) {
    wait_for_teacher();
    F sums[kSums];
    KD_UNROLL
    for (int k = 0; k < kSums; ++k) sums[k] = F(0);
    Raw<S> next_student, next_teacher;
    if (groups_.tiles > 0) load_pair(next_student, next_teacher, groups_.at(0, backwards));
    KD_ROLL
    for (int64_t tile = 0; tile < groups_.tiles; ++tile) {
      const int64_t at = groups_.at(tile, backwards);
      const Raw<S> student = next_student, teacher = next_teacher;
      if (tile + 1 < groups_.tiles) load_pair(next_student, next_teacher, groups_.at(tile + 1, backwards));
      group<kAdd, kStore>(student, teacher, at, groups_.inside(at), sums);
    }
    if constexpr (kAdd) {
      KD_UNROLL
      for (int k = 0; k < kSums; ++k) totals_[k] = static_cast<double>(sums[k]);
    }
  }

  KD_BOTH void load_pair(Raw<S>& student, Raw<S>& teacher, int64_t at) const {
    const int inside = groups_.inside(at);
    student_.load(student, at, inside);
    teacher_.load(teacher, at, inside);
  }

  template <bool kAdd, bool kStore>
  KD_BOTH void group(const Raw<S>& raw_student, const Raw<S>& raw_teacher, int64_t at, int inside, F* sums) const {
    if (inside == 0) return;
    F z_student[S::kGroup], z_teacher[S::kGroup], gradient[S::kGroup], teacher_gradient[S::kGroup];
    student_.logits(raw_student, inside, z_student);
    teacher_.logits(raw_teacher, inside, z_teacher);
    F added[kSums];
    KD_UNROLL
    for (int k = 0; k < kSums; ++k) added[k] = F(0);
    KD_UNROLL
    for (int i = 0; i < S::kGroup; ++i) {
      const F u_student = (z_student[i] - student_.top) * student_.inverse_temperature;
      const F u_teacher = (z_teacher[i] - teacher_.top) * teacher_.inverse_temperature;
      const F log_q = u_student - student_.logz, log_p = u_teacher - teacher_.logz;
      const bool absent = log_p == -infinity<F>() && log_q == -infinity<F>();
      const Pair<F> pair(log_p, log_q, absent ? F(0) : (u_student - u_teacher) - log_ratio_);
      const Parts<F> parts = Functor::evaluate(pair, parameters_);
      if (kAdd) add(added, pair, parts);
      if (kStore) {
        gradient[i] = student_.part(parts.student, pair.q());
        if (kTeacher) teacher_gradient[i] = teacher_.part(parts.teacher, pair.p());
      }
    }
    // What most calls do without, apart: a branch for a group, not one for each entry.
    if (kStore && job_.labels) {
      KD_UNROLL
      for (int i = 0; i < S::kGroup; ++i) gradient[i] = gradient[i] + poison_ + hard_gradient(z_student[i], at + i);
    }
    if (kAdd && job_.entropies) {
      KD_UNROLL
      for (int i = 0; i < S::kGroup; ++i) {
        added[kStudentH] = added[kStudentH] + student_.surprise(z_student[i]);
        added[kTeacherH] = added[kTeacherH] + teacher_.surprise(z_teacher[i]);
      }
    }
    if constexpr (kAdd) {
      KD_UNROLL
      for (int k = 0; k < kSums; ++k) sums[k] = sums[k] + added[k];
    }
    if constexpr (kStore) {
      if (student_.grad) student_.store(gradient, z_student, at, inside);
      if (kTeacher && teacher_.grad) teacher_.store(teacher_gradient, z_teacher, at, inside);
    }
  }

  KD_BOTH void add(F* sums, const Pair<F>& pair, const Parts<F>& parts) const {
    sums[kTermSum] = sums[kTermSum] + parts.term;
    if (!Functor::kStudentSumsToZero) {
      sums[kStudentSum] = sums[kStudentSum] + parts.student;
      sums[kStudentMass] = sums[kStudentMass] + pair.q();
    }
    if (kTeacher && !Functor::kTeacherSumsToZero) {
      sums[kTeacherSum] = sums[kTeacherSum] + parts.teacher;
      sums[kTeacherMass] = sums[kTeacherMass] + pair.p();
    }
  }

  KD_BOTH F hard_gradient(F z, int64_t at) const {
    const F probability = exp((z - student_.top) - hard_logz_);
    const F rest = at == label_ ? probability - F(1) : probability;
    return hard_coefficient_ == F(0) ? F(0) : hard_coefficient_ * rest;
  }

  KD_BOTH void terms() {
    const int lane = thread_.index() % kWarp, warp = thread_.index() / kWarp;
    thread_.warp_reduce(totals_, Sum());
    if (lane == 0) copy_sums(totals_, scratch_.terms[warp]);
    thread_.barrier();
    gather(lane < thread_.count() / kWarp ? scratch_.terms[lane] : nullptr);
    if (thread_.ranks() > 1) {
      if (thread_.index() == 0) copy_sums(totals_, scratch_.block_terms);
      thread_.cluster_barrier();
      gather(lane < thread_.ranks() ? thread_.remote(&scratch_, lane)->block_terms : nullptr);
    }
    set_means(totals_[kStudentSum], totals_[kStudentMass], totals_[kTeacherSum], totals_[kTeacherMass]);
    if (!speaks()) return;
    statistics_[kSumStudent] = totals_[kStudentSum], statistics_[kMassStudent] = totals_[kStudentMass];
    statistics_[kSumTeacher] = totals_[kTeacherSum], statistics_[kMassTeacher] = totals_[kTeacherMass];
    double* row = job_.terms + row_ * kTermColumns;
    row[kSoft] = totals_[kTermSum];
    row[kHard] = job_.labels ? values_[kLogzHard] - (values_[kLabelLogit] - values_[kMaxStudent]) : 0.0;
    row[kStudentEntropy] = totals_[kStudentH], row[kTeacherEntropy] = totals_[kTeacherH];
  }

  KD_BOTH static void copy_sums(const double* from, double* to) {
    KD_UNROLL
    for (int k = 0; k < kSums; ++k) to[k] = from[k];
  }
  KD_BOTH void gather(const double* from) {
    KD_UNROLL
    for (int k = 0; k < kSums; ++k) totals_[k] = from ? from[k] : 0.0;
    thread_.warp_reduce(totals_, Sum());
  }

  // Parts that are known to sum to zero carry no mass.
  KD_BOTH void set_means(double student_sum, double student_mass, double teacher_sum, double teacher_mass) {
    student_.mean = static_cast<F>(student_sum == 0.0 ? 0.0 : student_sum / student_mass);
    teacher_.mean = static_cast<F>(teacher_sum == 0.0 ? 0.0 : teacher_sum / teacher_mass);
  }

  const bool held_;
  const Thread& thread_;
  const Work& work_;
  const RowDivergence& job_;
  const int64_t row_, begin_;
  const Groups<S, Thread> groups_;
  Scratch& scratch_;
  RowSide<S> student_, teacher_;
  double* statistics_;
  bool student_held_ = true, teacher_held_ = true;
  bool tempered_, known_;
  int64_t label_;
  F hard_coefficient_, poison_, hard_logz_, log_ratio_;
  Parameters<F> parameters_;
  double values_[kStatisticColumns], totals_[kSums];
};

// `kTeacher`: the teacher's parts too. A kernel knows `held` when it is compiled.
template <class S, class Functor, bool kTeacher, class Thread>
KD_BOTH void row_divergence(const Thread& thread, const Work& work, bool held) {
  Row<S, Functor, kTeacher, Thread>(thread, work, held).run();
}

}  // namespace cuda
}  // namespace kd
