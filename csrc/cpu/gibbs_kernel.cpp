// The gibbs kernel for one instruction set: a strip of rows or of columns is read for its shift and again, from the
// cache, for its exponentials.
#include "../gibbs.h"
#include "isa.h"
#include "lanes.h"
#include "strip.h"

namespace kd {
namespace KD_ISA {
namespace {

template <class T>
class GibbsRunner {
  using V = Vec<T>;
  static constexpr double kMost = sizeof(T) == 4 ? 3e38 : 1e308;  // infinity times no distance would be NaN
  // Of a strip of columns, whose rows are walked one after the other, as memory likes it.
  static constexpr int64_t kColumns = 16 * V::kLanes;

 public:
  static int64_t strips(const Gibbs& args) { return args.by_column ? (args.m + kColumns - 1) / kColumns : args.n; }

  explicit GibbsRunner(const Gibbs& args)
      : args_(args),
        cost_(static_cast<const T*>(args.cost)),
        shift_(static_cast<T*>(args.shift)),
        reach_(static_cast<T*>(args.reach)),
        kernel_(static_cast<T*>(args.kernel)),
        weighted_(static_cast<T*>(args.weighted)),
        inverse_(1.0 / args.epsilon < kMost ? 1.0 / args.epsilon : kMost) {}

  void run(int64_t strip) {
    if (args_.by_column) {
      const int64_t first = strip * kColumns, left = args_.m - first;
      columns(first, left < kColumns ? left : kColumns);
    } else {
      row(strip);
    }
  }

 private:
  void row(int64_t i) {
    V least(kInfinity<double>), most(-kInfinity<double>);
    for (int64_t j = 0; j < args_.m; j += V::kLanes) widen(cost_at(i, j, args_.m - j), least, most);
    shift_[i] = -largest_lane(-least);
    reach_[i] = largest_lane(most);
    finish(shift_ + i, reach_ + i, 1);
    const V shift(static_cast<double>(shift_[i]));
    for (int64_t j = 0; j < args_.m; j += V::kLanes) write(i, j, args_.m - j, shift);
  }

  void columns(int64_t first, int64_t width) {
    T least[kColumns], most[kColumns];
    for (int64_t j = 0; j < kColumns; ++j) {
      least[j] = kInfinity<T>;
      most[j] = -kInfinity<T>;
    }
    for (int64_t i = 0; i < args_.n; ++i)
      for (int64_t j = 0; j < width; j += V::kLanes) {
        V low = V::load(least + j), high = V::load(most + j);
        widen(cost_at(i, first + j, width - j), low, high);
        low.store(least + j);
        high.store(most + j);
      }
    finish(least, most, kColumns);
    std::memcpy(shift_ + first, least, static_cast<size_t>(width) * sizeof(T));
    std::memcpy(reach_ + first, most, static_cast<size_t>(width) * sizeof(T));
    for (int64_t i = 0; i < args_.n; ++i)
      for (int64_t j = 0; j < width; j += V::kLanes) write(i, first + j, width - j, V::load(least + j));
  }

  // Lanes beyond the end are infinite, which changes no end and makes no plan.
  KD_INLINE V cost_at(int64_t i, int64_t j, int64_t left) const {
    const T* at = cost_ + i * args_.ld + j;
    if (left >= V::kLanes) return V::load(at);
    T lanes[V::kLanes];
    for (int64_t lane = 0; lane < V::kLanes; ++lane) lanes[lane] = lane < left ? at[lane] : kInfinity<T>;
    return V::load(lanes);
  }

  KD_INLINE static void widen(V cost, V& least, V& most) {
    const V infinity(kInfinity<double>);
    least = select(cost < least, cost, least);
    most = max_or_second(select(cost < infinity, cost, -infinity), most);
  }

  // From the ends to the shift and the reach.
  static void finish(T* shift, T* reach, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      if (!(shift[i] < kInfinity<T>)) shift[i] = 0;
      reach[i] = reach[i] > shift[i] ? reach[i] - shift[i] : T(0);
    }
  }

  KD_INLINE void write(int64_t i, int64_t j, int64_t left, V shift) const {
    const V cost = cost_at(i, j, left), value = exp((shift - cost) * inverse_), none(0.0);
    const V weighted = select(value == none, none, value * cost);
    const int64_t at = i * args_.out_ld + j;
    if (left >= V::kLanes) {
      value.store(kernel_ + at);
      weighted.store(weighted_ + at);
    } else {
      store_some(value, kernel_ + at, left);
      store_some(weighted, weighted_ + at, left);
    }
  }

  const Gibbs& args_;
  const T* cost_;
  T *shift_, *reach_, *kernel_, *weighted_;
  const V inverse_;
};

template <class T>
void run(const Gibbs& args) {
  const double entries = static_cast<double>(args.n) * static_cast<double>(args.m);
  run_strips<GibbsRunner<T>>(GibbsRunner<T>::strips(args), entries, args.threads, args);
}

}  // namespace

void gibbs(const Gibbs& args) {
  if (args.wide) {
    run<double>(args);
  } else {
    run<float>(args);
  }
}

}  // namespace KD_ISA
}  // namespace kd
