// The gather kernel for one instruction set. Ids ascend, so a cursor per token meets them as the walk goes by.
#include "../gather.h"
#include "isa.h"
#include "strip.h"

namespace kd {
namespace KD_ISA {
namespace {

// What a block's dense gradient is made of, per lane; the logits' scale is in the coefficients.
template <class T>
struct GatherLanes {
  SideLanes<T> side;  // coefficient: `soft`
  Lanes<T> slope;
  HardLanes<T> hard;
};

// gradient = share (soft + slope log share) + hard share_hard
template <class T, bool kSlope, bool kHard>
void share_block(const T* z, int steps, const GatherLanes<T>& lanes, const Ahead& ahead, const Ahead& ahead_gradient,
                 T* gradient) {
  using V = Vec<T>;
  const V zero(0.0);
  for (int lane = 0; lane < kLanes<T>; lane += V::kLanes) {
    const V max = lanes.side.max.vec(lane), logz = lanes.side.logz.vec(lane);
    const V inverse_temperature = lanes.side.inverse_temperature.vec(lane);
    const V soft = lanes.side.coefficient.vec(lane), slope = lanes.slope.vec(lane);
    const V hard = lanes.hard.coefficient.vec(lane), logz_hard = lanes.hard.logz.vec(lane);
    const auto no_soft = soft == zero, no_slope = slope == zero, no_hard = hard == zero;
    for (int step = 0; step < steps; ++step) {
      const int at = step * kLanes<T> + lane;
      ahead.touch(step, lane);
      ahead_gradient.touch(step, lane);
      const V below = V::load(z + at) - max, log_share = fma(below, inverse_temperature, -logz);
      const V share = exp(log_share);
      V sum = select(no_soft, zero, soft * share);
      if (kSlope) {
        const V sloped = select(share == zero, zero, slope * share * log_share);
        sum = sum + select(no_slope, zero, sloped);
      }
      if (kHard) sum = sum + select(no_hard, zero, hard * exp(below - logz_hard));
      sum.store(gradient + at);
    }
  }
}

template <class T>
class GatherRunner : Strip<T> {
  using Base = Strip<T>;
  using Base::ahead, Base::ahead_gradient, Base::block_width, Base::entry, Base::load, Base::reduce, Base::row_major_,
      Base::shape;
  using Base::store, Base::token, Base::tokens_;

 public:
  GatherRunner(const Gather& args, unsigned phases)
      : Base(args.side, args.n, args.vocab), args_(args), phases_(phases) {}

  void run(int64_t strip) {
    this->move_to(strip);
    tempered_ = false;
    for (int i = 0; i < kLanes<T>; ++i) {
      const double temperature = args_.side.temperature[token(i)];
      lanes_.side.inverse_temperature.at[i] = static_cast<T>(1.0 / temperature);
      tempered_ = tempered_ || temperature != 1.0;
    }
    if (phases_ & kStatistics) statistics_pass();
    if (phases_ & kGradient) gradient_pass();
  }

 private:
  double* statistics(int64_t row) const { return args_.statistics + row * kGatherColumns; }

  void rewind() {
    for (int i = 0; i < tokens_; ++i) {
      const int32_t* ids = args_.ids + token(i) * args_.k;
      cursor_[i] = 0;
      while (cursor_[i] < args_.k && ids[cursor_[i]] < 0) ++cursor_[i];
    }
  }

  // Calls visit(index into [n, k], entry of the block) for every id in the block that begins at v.
  template <class Visit>
  void visit_ids(int64_t v, const Visit& visit) {
    const int64_t end = v + block_width();
    for (int i = 0; i < tokens_; ++i) {
      const int64_t first = token(i) * args_.k;
      for (; cursor_[i] < args_.k && args_.ids[first + cursor_[i]] < end; ++cursor_[i])
        visit(first + cursor_[i], entry(args_.ids[first + cursor_[i]], v, i));
    }
  }

  // The block without its ids' entries.
  int load_others(int64_t v) {
    const int steps = load(args_.side, v, z_);
    visit_ids(v, [&](int64_t index, int64_t at) {
      args_.gathered[index] = static_cast<double>(z_.at[at]);
      z_.at[at] = -kInfinity<T>;
    });
    return steps;
  }

  void statistics_pass() {
    const Side& side = args_.side;
    for (int i = 0; i < tokens_; ++i)
      for (int64_t j = 0; j < args_.k; ++j) args_.gathered[token(i) * args_.k + j] = -kInfinity<double>;
    online_.reset();
    rewind();
    for (int64_t v = 0; v < args_.vocab; v += block_width()) {
      const int steps = load_others(v);
      if (args_.hard && tempered_) {
        accumulate_exp<T, true>(z_.at, steps, lanes_.side, ahead(side, v), online_);
      } else {
        accumulate_exp<T, false>(z_.at, steps, lanes_.side, ahead(side, v), online_);
      }
    }
    for (int i = 0; i < tokens_; ++i) {
      double* row = statistics(token(i));
      reduce(online_, lanes_.side, i, tempered_, -kInfinity<double>, row[kOthersMax], row[kOthersLogz],
             row[kOthersLogzHard]);
      row[kOthersMean] = 0.0;
    }
    if (args_.means) means_pass();
  }

  // Rows without others get numbers in which every share is 0.
  void read_statistics() {
    for (int i = 0; i < kLanes<T>; ++i) {
      const double* row = statistics(token(i));
      const bool none = row[kOthersMax] == -kInfinity<double> && row[kOthersLogz] == -kInfinity<double>;
      lanes_.side.max.at[i] = static_cast<T>(none ? 0.0 : row[kOthersMax]);
      lanes_.side.logz.at[i] = static_cast<T>(none ? 0.0 : row[kOthersLogz]);
      lanes_.hard.logz.at[i] = static_cast<T>(none ? 0.0 : row[kOthersLogzHard]);
    }
  }

  // The mean of x is log sum exp(x) less the entropy of the shares.
  void means_pass() {
    read_statistics();
    double entropy[kLanes<T>] = {};
    rewind();
    for (int64_t v = 0; v < args_.vocab; v += block_width()) {
      const int steps = load_others(v);
      entropy_block(z_.at, steps, lanes_.side, entropy);
    }
    for (int i = 0; i < tokens_; ++i) {
      double* row = statistics(token(i));
      if (row[kOthersLogz] != -kInfinity<double>) row[kOthersMean] = row[kOthersLogz] - reduce(entropy, i);
    }
  }

  void gradient_pass() {
    read_statistics();
    const double scale = args_.side.scale;
    for (int i = 0; i < kLanes<T>; ++i) {
      const int64_t row = token(i);
      // At temperature 1 the two shares are one.
      const double hard = args_.hard ? args_.hard_weight[row] : 0.0, joined = tempered_ ? 0.0 : hard;
      lanes_.side.coefficient.at[i] = static_cast<T>((args_.soft[row] + joined) * scale);
      lanes_.slope.at[i] = static_cast<T>(args_.slope ? args_.slope[row] * scale : 0.0);
      lanes_.hard.coefficient.at[i] = static_cast<T>((hard - joined) * scale);
    }
    const bool hard = args_.hard && tempered_;
    const auto dense = args_.slope ? hard ? share_block<T, true, true> : share_block<T, true, false>
                       : hard      ? share_block<T, false, true>
                                   : share_block<T, false, false>;
    rewind();
    for (int64_t v = 0; v < args_.vocab; v += block_width()) {
      const int steps = load(args_.side, v, z_);
      dense(z_.at, steps, lanes_, ahead(args_.side, v), ahead_gradient(args_.side, v), gradient_.at);
      visit_ids(v, [&](int64_t index, int64_t at) { gradient_.at[at] = static_cast<T>(args_.at_ids[index] * scale); });
      store(args_.side, v, z_, gradient_.at);
    }
  }

  const Gather& args_;
  const unsigned phases_;
  bool tempered_ = false;
  int64_t cursor_[kLanes<T>];  // into each token's ids
  GatherLanes<T> lanes_;
  OnlineSum<T> online_;
  Block<T> z_, gradient_;
};

template <class T>
void run(const Gather& args, unsigned phases) {
  const double entries = static_cast<double>(args.n) * static_cast<double>(args.vocab);
  run_strips<GatherRunner<T>>(Strip<T>::strips(args.side, args.n), entries, args.threads, args, phases);
}

}  // namespace

void gather(const Gather& args, unsigned phases) {
  if (args.side.dtype == Dtype::float64) {
    run<double>(args, phases);
  } else {
    run<float>(args, phases);
  }
}

}  // namespace KD_ISA
}  // namespace kd
