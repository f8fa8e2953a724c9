// Compiled once for each storage (KD_STORAGE), as cuda/row_divergence.cu is.
#include "cuda_emulation.h"

#include <type_traits>

#include "host_thread.h"

namespace host {
namespace {

using kd::Objective;
using Storage = kd::cuda::KD_STORAGE;

template <class Functor, bool kTeacher>
void run(const Launch& l) {
  launch(l.threads, l.ranks, l.shared_bytes, l.work.job.n,
         [&](const Thread& thread) { kd::cuda::row_divergence<Storage, Functor, kTeacher>(thread, l.work, l.held); });
}

template <class Functor>
void run(const Launch& l, bool teacher) {
  // Leaving the teacher out has nothing to do with the storage; compiling it takes time.
  if constexpr (std::is_same_v<Storage, kd::cuda::Float32> || std::is_same_v<Storage, kd::cuda::Wide>) {
    if (!teacher) return run<Functor, false>(l);
  }
  run<Functor, true>(l);
}

}  // namespace

#define KD_JOIN(storage) emulate_##storage
#define KD_NAME(storage) KD_JOIN(storage)
void KD_NAME(KD_STORAGE)(const Launch& launch, bool teacher) {
  switch (launch.work.job.objective) {
    case Objective::forward_kl:
      return run<kd::ForwardKL>(launch, teacher);
    case Objective::reverse_kl:
      return run<kd::ReverseKL>(launch, teacher);
    case Objective::jensen_shannon:
      return run<kd::JensenShannon>(launch, teacher);
    case Objective::skew_kl:
      return run<kd::SkewKL>(launch, teacher);
    case Objective::skew_reverse_kl:
      return run<kd::SkewReverseKL>(launch, teacher);
    case Objective::total_variation:
      return run<kd::TotalVariation>(launch, teacher);
    case Objective::weighted_kl:
      return run<kd::WeightedKL>(launch, teacher);
  }
}

}  // namespace host
