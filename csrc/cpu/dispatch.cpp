// Chooses the instruction set at run time.
#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace kd {
namespace {

struct InstructionSet {
  const char* name;
  decltype(&baseline::angle) angle;
  decltype(&baseline::distance) distance;
  decltype(&baseline::gather) gather;
  decltype(&baseline::gibbs) gibbs;
  decltype(&baseline::half_step) half_step;
  decltype(&baseline::pairwise_l1) pairwise_l1;
  decltype(&baseline::row_divergence) row_divergence;
  decltype(&baseline::sinkhorn) sinkhorn;
  decltype(&baseline::sorted_l1) sorted_l1;
  decltype(&baseline::sorted_l1_scratch) sorted_l1_scratch;
  decltype(&baseline::topk) topk;
};
#define KD_INSTRUCTION_SET(isa)                                                                                      \
  InstructionSet {                                                                                                   \
    #isa, isa::angle, isa::distance, isa::gather, isa::gibbs, isa::half_step, isa::pairwise_l1, isa::row_divergence, \
        isa::sinkhorn, isa::sorted_l1, isa::sorted_l1_scratch, isa::topk                                             \
  }

InstructionSet choose() {
  const char* requested = std::getenv("KD_KERNELS_ISA");
  const auto allows = [&](const char* weaker) { return !requested || std::strcmp(requested, weaker) != 0; };
#if defined(KD_KERNELS_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && allows("avx2") && allows("baseline")) return KD_INSTRUCTION_SET(avx512);
  if (avx2 && allows("baseline")) return KD_INSTRUCTION_SET(avx2);
#else
  (void)allows;
#endif
  return KD_INSTRUCTION_SET(baseline);
}

const InstructionSet& chosen() {
  static const InstructionSet instruction_set = choose();
  return instruction_set;
}

}  // namespace

void angle(const Angle& args) {
  if (args.n > 0) chosen().angle(args);
}

void distance(const Distance& args, unsigned phases) {
  if (args.n > 0) chosen().distance(args, phases);
}

void gather(const Gather& args, unsigned phases) {
  if (args.n > 0) chosen().gather(args, phases);
}

void gibbs(const Gibbs& args) {
  if (args.n > 0 && args.m > 0) chosen().gibbs(args);
}

void half_step(const HalfStep& args) {
  if (args.count > 0 && args.n > 0 && args.m > 0) chosen().half_step(args);
}

void pairwise_l1(const PairwiseL1& args, unsigned phases) {
  if (args.n > 0 && args.vocab > 0) chosen().pairwise_l1(args, phases);
}

void row_divergence(const RowDivergence& args, unsigned phases) {
  if (args.n > 0) chosen().row_divergence(args, phases);
}

void sinkhorn(const Sinkhorn& args, unsigned phases) {
  if (args.count > 0 && args.n > 0 && args.m > 0 && args.iterations > 0) chosen().sinkhorn(args, phases);
}

void sorted_l1(const SortedL1& args) {
  if (args.n > 0) chosen().sorted_l1(args);
}

int64_t sorted_l1_scratch(const SortedL1& args) { return chosen().sorted_l1_scratch(args); }

void topk(const Topk& args) {
  if (args.n > 0) chosen().topk(args);
}

const char* instruction_set() { return chosen().name; }

const char* objective_name(Objective objective) {
  switch (objective) {
    case Objective::forward_kl:
      return "forward_kl";
    case Objective::reverse_kl:
      return "reverse_kl";
    case Objective::jensen_shannon:
      return "jensen_shannon";
    case Objective::skew_kl:
      return "skew_kl";
    case Objective::skew_reverse_kl:
      return "skew_reverse_kl";
    case Objective::total_variation:
      return "total_variation";
    case Objective::weighted_kl:
      return "weighted_kl";
  }
  return "";
}

}  // namespace kd
