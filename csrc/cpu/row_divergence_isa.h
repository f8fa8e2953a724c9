// One row_divergence per instruction set that row_divergence_kernel.cpp is compiled for.
#pragma once
#include "../row_divergence.h"

namespace kd {
namespace baseline {
void row_divergence(const RowDivergence& args, unsigned phases);
}
namespace avx2 {
void row_divergence(const RowDivergence& args, unsigned phases);
}
namespace avx512 {
void row_divergence(const RowDivergence& args, unsigned phases);
}
}  // namespace kd
