// The kernels of each instruction set that *_kernel.cpp are compiled for.
#pragma once
#include "../angle.h"
#include "../distance.h"
#include "../gather.h"
#include "../gibbs.h"
#include "../half_step.h"
#include "../pairwise_l1.h"
#include "../row_divergence.h"
#include "../sinkhorn.h"
#include "../sorted_l1.h"
#include "../topk.h"

namespace kd {
#define KD_DECLARE_KERNELS(isa)                                    \
  namespace isa {                                                  \
  void angle(const Angle& args);                                   \
  void distance(const Distance& args, unsigned phases);            \
  void gather(const Gather& args, unsigned phases);                \
  void gibbs(const Gibbs& args);                                   \
  void half_step(const HalfStep& args);                            \
  void pairwise_l1(const PairwiseL1& args, unsigned phases);       \
  void row_divergence(const RowDivergence& args, unsigned phases); \
  void sinkhorn(const Sinkhorn& args, unsigned phases);            \
  void sorted_l1(const SortedL1& args);                            \
  int64_t sorted_l1_scratch(const SortedL1& args);                 \
  void topk(const Topk& args);                                     \
  }

KD_DECLARE_KERNELS(baseline)
KD_DECLARE_KERNELS(avx2)
KD_DECLARE_KERNELS(avx512)
#undef KD_DECLARE_KERNELS
}  // namespace kd
