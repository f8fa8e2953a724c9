// The row kernels of csrc/cuda, run by threads of the host.
#pragma once
#include "../cuda/geometry.h"

namespace host {

struct Launch {
  kd::cuda::Work work;
  int threads, ranks;
  bool held;
  int64_t shared_bytes;
};

// One per storage of cuda/storage.h. `teacher`: its parts too.
void emulate_Float32(const Launch& launch, bool teacher);
void emulate_Bfloat16(const Launch& launch, bool teacher);
void emulate_Float16(const Launch& launch, bool teacher);
void emulate_Mixed(const Launch& launch, bool teacher);
void emulate_Wide(const Launch& launch, bool teacher);

}  // namespace host
