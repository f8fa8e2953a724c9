// A strip is kLanes numbers wide: one row whose vocabulary runs along the lanes (row-major), or as many tokens
// as there are lanes (vocabulary-major). It is walked in blocks of kSteps; load converts type, layout, scale and
// softcap away, store converts back, so that the arithmetic in between sees neither.
#pragma once
#include "row_divergence_blocks.h"

namespace kd {
namespace KD_ISA {

template <class T>
class Strip {
 public:
  static int64_t strips(const Side& side, int64_t n) { return side.offsets ? n : (n + kLanes<T> - 1) / kLanes<T>; }

 protected:
  Strip(const Side& side, int64_t n, int64_t vocab) : row_major_(side.offsets != nullptr), n_(n), vocab_(vocab) {}

  void move_to(int64_t strip) {
    first_ = row_major_ ? strip : strip * kLanes<T>;
    tokens_ = row_major_ ? 1 : static_cast<int>(n_ - first_ < kLanes<T> ? n_ - first_ : kLanes<T>);
  }

  // Vocabulary entries per step of a strip.
  int64_t step_width() const { return row_major_ ? kLanes<T> : 1; }
  int64_t block_width() const { return kSteps * step_width(); }

  // The token that a lane belongs to; lanes past the last token repeat it and are never written.
  int64_t token(int lane) const { return row_major_ ? first_ : first_ + (lane < tokens_ ? lane : tokens_ - 1); }

  // Where a token's vocabulary entry stands in the block that begins at v and holds it.
  int64_t entry(int64_t id, int64_t v, int lane) const { return row_major_ ? id - v : (id - v) * kLanes<T> + lane; }

  BlockShape shape(const int64_t* offsets, int64_t ld, int64_t v) const {
    const int64_t left = vocab_ - v;
    if (row_major_) {
      const int64_t count = left < block_width() ? left : block_width();
      const int steps = static_cast<int>((count + kLanes<T> - 1) / kLanes<T>);
      const int last = static_cast<int>(count - int64_t{steps - 1} * kLanes<T>);
      return {offsets[first_] + v, kLanes<T>, steps, kLanes<T>, last};
    }
    return {v * ld + first_, ld, static_cast<int>(left < kSteps ? left : kSteps), tokens_, tokens_};
  }

  Ahead ahead(const void* base, Dtype dtype, const int64_t* offsets, int64_t ld, int64_t v) const {
    Ahead next;
    next.address = reinterpret_cast<uintptr_t>(base);
    if (v + block_width() >= vocab_) return next;
    const BlockShape at = shape(offsets, ld, v + block_width());
    next.number_bytes = element_size(dtype);
    next.step_bytes = at.stride * next.number_bytes;
    next.address += static_cast<uintptr_t>(at.first * next.number_bytes);
    return next;
  }
  Ahead ahead(const Side& side, int64_t v) const { return ahead(side.logits, side.dtype, side.offsets, side.ld, v); }
  Ahead ahead_gradient(const Side& side, int64_t v) const {
    return ahead(side.grad, side.grad_dtype, side.grad_offsets, side.grad_ld, v);
  }

  // Returns the number of steps that the block has.
  int load(const Side& side, int64_t v, Block<T>& z) const {
    const BlockShape at = shape(side.offsets, side.ld, v);
    load_block(side.logits, side.dtype, at, z.at);
    if (side.scale != 1.0 || side.softcap != 0.0) apply_head(z.at, at.steps, side.scale, side.softcap);
    if (row_major_) {
      for (int i = at.last_width; i < kLanes<T>; ++i) z.at[(at.steps - 1) * kLanes<T> + i] = -kInfinity<T>;
    }
    return at.steps;
  }

  void store(const Side& side, int64_t v, const Block<T>& z, T* gradient) const {
    const BlockShape at = shape(side.grad_offsets, side.grad_ld, v);
    if (side.softcap != 0.0) chain_softcap(gradient, z.at, at.steps, side.softcap);
    store_block(gradient, side.grad_dtype, at, side.grad);
  }

  // A token's part of what was summed in the strip's lanes.
  double reduce(const double* lanes, int token) const {
    if (!row_major_) return lanes[token];
    double total = 0.0;
    for (int i = 0; i < kLanes<T>; ++i) total += lanes[i];
    return total;
  }

  // A token's maximum and log-sums, `none` where nothing is finite; without `hard` both sums are the first.
  void reduce(const OnlineSum<T>& online, const SideLanes<T>& side, int token, bool hard, double none, double& max,
              double& logz, double& logz_hard) const {
    const int begin = row_major_ ? 0 : token, end = row_major_ ? kLanes<T> : token + 1;
    max = -kInfinity<double>;
    for (int i = begin; i < end; ++i) max = online.max.at[i] > max ? static_cast<double>(online.max.at[i]) : max;
    const double inverse_temperature = static_cast<double>(side.inverse_temperature.at[begin]);
    double soft_sum = 0.0, hard_sum = 0.0;
    for (int i = begin; i < end; ++i) {
      // A lane of nothing but -inf; a NaN among them makes its sum NaN, not 0.
      if (online.soft[i] == 0.0) continue;
      const double step = static_cast<double>(online.max.at[i]) - max;
      soft_sum += online.soft[i] * (step == 0.0 ? 1.0 : __builtin_exp(step * inverse_temperature));
      if (hard) hard_sum += online.hard[i] * (step == 0.0 ? 1.0 : __builtin_exp(step));
    }
    // Only where all are -inf is that the maximum; NaN, which no comparison finds, may be among them.
    if (soft_sum != soft_sum && max == -kInfinity<double>) max = soft_sum;
    logz = soft_sum == 0.0 ? none : __builtin_log(soft_sum);
    logz_hard = !hard ? logz : hard_sum == 0.0 ? none : __builtin_log(hard_sum);
  }

  const bool row_major_;
  const int64_t n_, vocab_;
  int64_t first_ = 0;  // token of the strip
  int tokens_ = 0;     // in the strip
};

// Runs every strip of a call through Runner(args...).run(strip), on as many threads as the work is worth.
template <class Runner, class... Args>
void run_strips(int64_t strips, double entries, int64_t threads, const Args&... args) {
  // Waking a team costs some microseconds: as long as one thread takes for this many entries.
  constexpr double kSmall = 1 << 14;
  if (entries < kSmall) threads = 1;
  threads = threads < strips ? threads : strips;
  if (threads <= 1) {
    Runner runner(args...);
    for (int64_t strip = 0; strip < strips; ++strip) runner.run(strip);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    Runner runner(args...);
#pragma omp for schedule(dynamic, 1)
    for (int64_t strip = 0; strip < strips; ++strip) runner.run(strip);
  }
}

}  // namespace KD_ISA
}  // namespace kd
