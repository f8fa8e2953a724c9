// The gibbs kernel's contract: exp(-C / epsilon) of one cost, and the same times C. kd_kernels/problems.py (GibbsJob)
// states the same.
#pragma once
#include <cstdint>

namespace kd {

// `kernel` is exp((shift - C) / epsilon), `weighted` the same times C, 0 where the kernel is. The shift is the least
// finite cost of a line, 0 where there is none: of a row, or of a column if `by_column`; `reach` is by how much the
// largest finite one exceeds it. Numbers are float, double if `wide`. NaN and -infinity are not looked for.
struct Gibbs {
  int64_t n = 0, m = 0;
  bool wide = false, by_column = false;
  double epsilon = 1.0;        // > 0
  const void* cost = nullptr;  // [n, ld]
  int64_t ld = 0;
  void* shift = nullptr;     // [n], of columns [m]
  void* reach = nullptr;     // as shift
  void* kernel = nullptr;    // [n, out_ld]
  void* weighted = nullptr;  // [n, out_ld]
  int64_t out_ld = 0;
  int threads = 1;
};

// Results do not depend on `threads`.
void gibbs(const Gibbs& args);

}  // namespace kd
