// The topk kernel for one instruction set. A row is walked once, in blocks that lie in the L1 cache. What beats the
// k-th largest so far goes to a heap, and what a heap gives up joins the other entries in the sums: so the mass
// outside the k largest is a sum of its own terms and never the small difference of two large numbers.
#include <cstdlib>

#include "../topk.h"
#include "isa.h"
#include "lanes.h"
#include "strip.h"

namespace kd {
namespace KD_ISA {
namespace {

template <class T>
constexpr int kBlockEntries = kSteps * kLanes<T>;

template <class T>
KD_INLINE double total(Vec<T> x) {
  T lanes[Vec<T>::kLanes];
  x.store(lanes);
  double sum = 0.0;
  for (int i = 0; i < Vec<T>::kLanes; ++i) sum += static_cast<double>(lanes[i]);
  return sum;
}

template <class T>
KD_INLINE T largest(const T* z, int entries) {
  using V = Vec<T>;
  V max(-kInfinity<double>);
  for (int at = 0; at < entries; at += V::kLanes) max = max_or_second(V::load(z + at), max);
  return largest_lane(max);
}

// Sums of e^x and e^x x over entries, x = (z - reference) / temperature, brought along as the reference rises.
struct Moments {
  double mass = 0.0, first = 0.0;

  // The same relative to a reference that is `step` (<= 0, over the temperature) away.
  Moments moved(double step) const {
    if (step == 0.0 || mass == 0.0) return *this;
    const double factor = __builtin_exp(step);
    return {mass * factor, factor == 0.0 ? 0.0 : (first + mass * step) * factor};
  }
  void add(double x) {
    const double e = __builtin_exp(x);
    mass += e;
    if (e != 0.0) first += e * x;
  }
  Moments operator+(const Moments& other) const { return {mass + other.mass, first + other.first}; }
};

template <class T>
struct Entry {
  T z;
  int32_t id;
  // Whether this one comes after the other in the order.
  bool after(const Entry& other) const { return z < other.z || (z == other.z && id > other.id); }
};

// The best k entries, the worst of them on top.
template <class T>
class Heap {
 public:
  explicit Heap(int64_t k) : k_(k), entries_(static_cast<Entry<T>*>(std::malloc((k + 1) * sizeof(Entry<T>)))) {}
  ~Heap() { std::free(entries_); }
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;

  void clear() { size_ = 0; }
  int64_t size() const { return size_; }
  bool full() const { return size_ == k_; }
  const Entry<T>& operator[](int64_t i) const { return entries_[i]; }

  // What an entry must exceed to get in: ids come in ascending order, so that a tie stays out.
  T threshold() const { return full() ? entries_[0].z : -kInfinity<T>; }

  void push(Entry<T> entry) {
    int64_t at = size_++;
    for (; at > 0 && entry.after(entries_[(at - 1) / 2]); at = (at - 1) / 2) entries_[at] = entries_[(at - 1) / 2];
    entries_[at] = entry;
  }
  T replace_worst(Entry<T> entry) {
    const T evicted = entries_[0].z;
    sink(entry, size_);
    return evicted;
  }
  // Into the order; no heap any more.
  void sort() {
    for (int64_t last = size_ - 1; last > 0; --last) {
      const Entry<T> entry = entries_[last];
      entries_[last] = entries_[0];
      sink(entry, last);
    }
  }

 private:
  // Puts the entry into a heap of `size` whose top is free.
  void sink(Entry<T> entry, int64_t size) {
    int64_t at = 0;
    for (int64_t child = 1; child < size; child = 2 * at + 1) {
      if (child + 1 < size && entries_[child + 1].after(entries_[child])) ++child;
      if (!entries_[child].after(entry)) break;
      entries_[at] = entries_[child];
      at = child;
    }
    entries_[at] = entry;
  }

  const int64_t k_;
  int64_t size_ = 0;
  Entry<T>* entries_;
};

template <class T>
class TopkRunner : Strip<T> {
  using Base = Strip<T>;
  using Base::block_width, Base::load;
  using V = Vec<T>;

 public:
  explicit TopkRunner(const Topk& args)
      : Base(args.side, args.n, args.vocab),
        args_(args),
        blocks_((args.vocab + block_width() - 1) / block_width()),
        heap_(args.k),
        tail_(static_cast<Moments*>(std::malloc(args.temperature_count * sizeof(Moments)))),
        block_mass_(static_cast<double*>(std::malloc((blocks_ + 1) * 2 * sizeof(double)))) {}
  ~TopkRunner() {
    std::free(tail_);
    std::free(block_mass_);
  }
  TopkRunner(const TopkRunner&) = delete;
  TopkRunner& operator=(const TopkRunner&) = delete;

  void run(int64_t row) {
    this->move_to(row);
    row_ = row;
    heap_.clear();
    evicted_count_ = 0;
    top_ = tail_top_ = -kInfinity<T>;
    nan_ = false;
    for (int64_t i = 0; i < args_.temperature_count; ++i) tail_[i] = Moments();
    read_targets();
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t v = block * block_width();
      const int entries = load(args_.side, v, z_) * kLanes<T>;
      const T block_top = largest(z_.at, entries);
      top_ = block_top > top_ ? block_top : top_;
      count_before_targets(v, entries);
      if (args_.sample_count > 0) keep_mass(block, block_top, entries);
      if (args_.k > 0 && block_top > heap_.threshold()) take_best(v, entries);
      add_to_tail(z_.at, entries);
    }
    flush_evicted();
    heap_.sort();
    write_best();
    write_statistics();
    if (args_.sample_count > 0) draw();
  }

 private:
  double* statistics(int64_t temperature) const {
    return args_.statistics + row_ * (1 + kTopkColumns * args_.temperature_count) + 1 + kTopkColumns * temperature;
  }

  void read_targets() {
    for (int64_t r = row_ * args_.target_count; r < (row_ + 1) * args_.target_count; ++r) {
      const int64_t target = args_.targets[r];
      args_.target_ranks[r] = 0;
      args_.target_values[r] = kNaN<double>;
      if (target < 0 || target >= args_.vocab) continue;
      const int64_t v = target / block_width() * block_width();
      load(args_.side, v, z_);
      args_.target_values[r] = static_cast<double>(z_.at[target - v]);
      args_.target_ranks[r] = 1;
    }
  }

  void count_before_targets(int64_t v, int entries) {
    for (int64_t r = row_ * args_.target_count; r < (row_ + 1) * args_.target_count; ++r) {
      if (args_.target_ranks[r] == 0) continue;
      const int64_t target = args_.targets[r];
      const V z(args_.target_values[r]), one(1.0), zero(0.0);
      V count(0.0);
      if (target >= v + block_width()) {  // a tie comes before it
        for (int at = 0; at < entries; at += V::kLanes) count = count + select(z <= V::load(z_.at + at), one, zero);
      } else {
        for (int at = 0; at < entries; at += V::kLanes) count = count + select(V::load(z_.at + at) > z, one, zero);
        const T value = static_cast<T>(args_.target_values[r]);
        for (int64_t at = v; at < target; ++at) args_.target_ranks[r] += z_.at[at - v] == value;
      }
      args_.target_ranks[r] += static_cast<int32_t>(total(count));
    }
  }

  // The block's mass at the first temperature relative to its own largest logit, and that logit.
  void keep_mass(int64_t block, T block_top, int entries) {
    block_mass_[2 * block] = total_exp(block_top, entries);
    block_mass_[2 * block + 1] = static_cast<double>(block_top);
  }

  double total_exp(T reference, int entries) const {
    if (reference == -kInfinity<T>) return 0.0;
    const V top(reference), inverse(1.0 / args_.temperatures[0]);
    V sum(0.0);
    for (int at = 0; at < entries; at += V::kLanes) sum = sum + exp((V::load(z_.at + at) - top) * inverse);
    return total(sum);
  }

  // Moves what beats the heap's worst out of the block.
  void take_best(int64_t v, int entries) {
    for (int at = 0; at < entries; at += V::kLanes) {
      if (!(V::load(z_.at + at) > V(static_cast<double>(heap_.threshold()))).any()) continue;
      for (int i = at; i < at + V::kLanes; ++i) {
        if (!(z_.at[i] > heap_.threshold())) continue;
        const Entry<T> entry{z_.at[i], static_cast<int32_t>(v + i)};
        z_.at[i] = -kInfinity<T>;
        if (!heap_.full()) {
          heap_.push(entry);
        } else {
          evicted_.at[evicted_count_++] = heap_.replace_worst(entry);
          if (evicted_count_ == kBlockEntries<T>) flush_evicted();
        }
      }
    }
  }

  void flush_evicted() {
    while (evicted_count_ % V::kLanes != 0) evicted_.at[evicted_count_++] = -kInfinity<T>;
    add_to_tail(evicted_.at, evicted_count_);
    evicted_count_ = 0;
  }

  void add_to_tail(const T* z, int entries) {
    const T top = largest(z, entries);
    const T old = tail_top_;
    if (top > old) tail_top_ = top;
    // Nothing but -inf so far: any finite reference makes the exponentials 0; but NaN must get through.
    const V reference(tail_top_ == -kInfinity<T> ? 0.0 : static_cast<double>(tail_top_)), zero(0.0);
    for (int64_t i = 0; i < args_.temperature_count; ++i) {
      const double inverse = 1.0 / args_.temperatures[i];
      if (tail_top_ > old && old != -kInfinity<T>)
        tail_[i] = tail_[i].moved((static_cast<double>(old) - static_cast<double>(tail_top_)) * inverse);
      const V factor(inverse);
      V mass(0.0), first(0.0);
      for (int at = 0; at < entries; at += V::kLanes) {
        const V x = (V::load(z + at) - reference) * factor, e = exp(x);
        mass = mass + e;
        first = first + select(e == zero, zero, e * x);
      }
      tail_[i] = tail_[i] + Moments{total(mass), total(first)};
    }
  }

  void write_best() const {
    int32_t* ids = args_.ids + row_ * args_.k;
    double* values = args_.values + row_ * args_.k;
    for (int64_t j = 0; j < args_.k; ++j) {
      const bool there = j < heap_.size();
      ids[j] = there ? heap_[j].id : -1;
      values[j] = there ? static_cast<double>(heap_[j].z) : -kInfinity<double>;
    }
  }

  void write_statistics() {
    const double top = static_cast<double>(top_), tail_top = static_cast<double>(tail_top_);
    // A sum with NaN in it is NaN; +inf may sit in the heap, where no sum sees it.
    nan_ = !(tail_[0].mass == tail_[0].mass) || top == kInfinity<double> || top == -kInfinity<double>;
    statistics(0)[kTopkMax - 1] = nan_ ? kNaN<double> : top;
    for (int64_t i = 0; i < args_.temperature_count; ++i) {
      double* row = statistics(i);
      const double inverse = 1.0 / args_.temperatures[i];
      const Moments tail = tail_top_ == -kInfinity<T> ? Moments() : tail_[i].moved((tail_top - top) * inverse);
      Moments best;
      for (int64_t j = 0; j < heap_.size(); ++j) best.add((static_cast<double>(heap_[j].z) - top) * inverse);
      const Moments all = tail + best;
      const double log_mass = __builtin_log(all.mass);
      row[kTopkLse] = nan_ ? kNaN<double> : top * inverse + log_mass;
      row[kTopkEntropy] = nan_ ? kNaN<double> : log_mass - all.first / all.mass;
      // Relative to its own largest: far below the row's, its exponentials would vanish.
      const double log_tail = tail_[i].mass == 0.0
                                  ? -kInfinity<double>
                                  : __builtin_log(tail_[i].mass) + (tail_top - top) * inverse - log_mass;
      row[kTopkLogTail] = nan_ ? kNaN<double> : log_tail;
    }
  }

  void draw() {
    const double inverse = 1.0 / args_.temperatures[0], top = static_cast<double>(top_);
    double sum = 0.0;
    for (int64_t block = 0; block < blocks_; ++block) {  // masses to cumulated masses
      const double mass = block_mass_[2 * block];
      if (mass != 0.0) sum += mass * __builtin_exp((block_mass_[2 * block + 1] - top) * inverse);
      block_mass_[2 * block] = sum;
    }
    int64_t loaded = -1;
    int entries = 0;
    for (int64_t j = row_ * args_.sample_count; j < (row_ + 1) * args_.sample_count; ++j) {
      args_.samples[j] = -1;
      if (nan_) continue;
      const double mass = args_.uniforms[j] * sum;
      const int64_t block = first_above(mass);
      const double before = block == 0 ? 0.0 : block_mass_[2 * (block - 1)];
      if (block != loaded) {
        entries = load(args_.side, block * block_width(), z_) * kLanes<T>;
        cumulate(static_cast<T>(block_mass_[2 * block + 1]), entries);
        loaded = block;
      }
      const double scale = __builtin_exp((block_mass_[2 * block + 1] - top) * inverse);
      args_.samples[j] = static_cast<int32_t>(block * block_width() + entry_above((mass - before) / scale, entries));
    }
  }

  // The first block whose cumulated mass exceeds it; by rounding there may be none: the last with any mass.
  int64_t first_above(double mass) const {
    int64_t low = 0, high = blocks_ - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (block_mass_[2 * middle] > mass) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    while (low > 0 && block_mass_[2 * low] == block_mass_[2 * (low - 1)]) --low;
    return low;
  }

  void cumulate(T reference, int entries) {
    const V top(static_cast<double>(reference)), inverse(1.0 / args_.temperatures[0]);
    double sum = 0.0;
    for (int at = 0; at < entries; at += V::kLanes) {
      T e[V::kLanes];
      exp((V::load(z_.at + at) - top) * inverse).store(e);
      for (int i = 0; i < V::kLanes; ++i) cumulated_[at + i] = sum += static_cast<double>(e[i]);
    }
  }

  // The first entry of the block whose cumulated mass exceeds it, or the last that has any.
  int entry_above(double mass, int entries) const {
    int low = 0, high = entries - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (cumulated_[middle] > mass) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    while (low > 0 && cumulated_[low] == cumulated_[low - 1]) --low;
    return low;
  }

  const Topk& args_;
  const int64_t blocks_;
  int64_t row_ = 0;
  Heap<T> heap_;
  Moments* tail_;       // [M]
  double* block_mass_;  // [blocks, 2]
  T top_, tail_top_;
  bool nan_ = false;
  int evicted_count_ = 0;
  Block<T> z_, evicted_;
  double cumulated_[kBlockEntries<T>];
};

template <class T>
void run(const Topk& args) {
  const double entries = static_cast<double>(args.n) * static_cast<double>(args.vocab);
  run_strips<TopkRunner<T>>(args.n, entries, args.threads, args);
}

}  // namespace

void topk(const Topk& args) {
  if (args.side.dtype == Dtype::float64) {
    run<double>(args);
  } else {
    run<float>(args);
  }
}

}  // namespace KD_ISA
}  // namespace kd
