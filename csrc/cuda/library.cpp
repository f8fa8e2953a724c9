// What libkd_kernels_cuda.so offers, in C: kd_kernels/native_cuda.py loads it. It loads where there is no driver;
// every call then returns the driver's words.
#include <cuda_runtime.h>

#include <cstdio>

#include "choice.h"
#include "geometry.h"
#include "kernels.h"

#define KD_EXPORT extern "C" __attribute__((visibility("default")))

namespace kd {
namespace cuda {
namespace {

// Raised with every change to what follows, or to what rows.h and row_divergence.h say of a call;
// kd_kernels/native_cuda.py compares.
constexpr int kAbiVersion = 2;
constexpr int kThreads = kWarp * kMostWarps;

// Where a call leaves its reason for failing.
class Report {
 public:
  Report(char* text, int64_t size) : text_(text), size_(size) {}

  // Whether a call of the CUDA runtime succeeded.
  bool good(cudaError_t status, const char* what) const {
    if (status == cudaSuccess) return true;
    std::snprintf(text_, static_cast<size_t>(size_), "%s: %s (%s)", what, cudaGetErrorString(status),
                  cudaGetErrorName(status));
    cudaGetLastError();  // or the next call would report it again
    return false;
  }

 private:
  char* text_;
  int64_t size_;
};
#define KD_GOOD(call) report.good(call, #call)

bool describe(const Report& report, int device, Device& found) {
  int shared = 0, of_all = 0, reserved = 0;
  if (!KD_GOOD(cudaDeviceGetAttribute(&found.major, cudaDevAttrComputeCapabilityMajor, device)) ||
      !KD_GOOD(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) ||
      !KD_GOOD(cudaDeviceGetAttribute(&of_all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)) ||
      !KD_GOOD(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device)))
    return false;
  // What was compiled for an older GPU, and for this one by the driver, has no clusters.
  cudaFuncAttributes attributes;
  if (!KD_GOOD(cudaFuncGetAttributes(&attributes, kernel_Float32_student(Objective::forward_kl, false)))) return false;
  if (attributes.ptxVersion / 10 < found.major) found.major = attributes.ptxVersion / 10;
  found.shared_bytes = shared;
  found.shared_of_all = of_all;
  found.shared_reserved = reserved;
  return true;
}

const void* kernel(const RowDivergence& job, unsigned phases, bool held) {
  const bool both = teacher_parts(job, phases);
  switch (storage_of(job)) {
    case Storage::float32:
      return (both ? kernel_Float32_both : kernel_Float32_student)(job.objective, held);
    case Storage::bfloat16:
      return (both ? kernel_Bfloat16_both : kernel_Bfloat16_student)(job.objective, held);
    case Storage::float16:
      return (both ? kernel_Float16_both : kernel_Float16_student)(job.objective, held);
    case Storage::mixed:
      return (both ? kernel_Mixed_both : kernel_Mixed_student)(job.objective, held);
    case Storage::wide:
      return (both ? kernel_Wide_both : kernel_Wide_student)(job.objective, held);
  }
  return nullptr;
}

// One call on its way to the device.
class Launch {
 public:
  Launch(const Report& report, const RowDivergence& job, unsigned phases, const Device& device, cudaStream_t stream)
      : report(report),
        cut_(geometry(job, phases, device)),
        shared_bytes_(device.shared_bytes),
        function_(kernel(job, phases, cut_.held)) {
    const Geometry& cut = cut_;
    work_ = {job, phases, 0, cut.width, cut.student_bytes};
    config_.blockDim = dim3(kThreads);
    config_.dynamicSmemBytes = static_cast<size_t>(cut.shared_bytes);
    config_.stream = stream;
    if (cut.ranks == 1) return;
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim = {static_cast<unsigned>(cut.ranks), 1, 1};
    config_.attrs = &attribute_;
    config_.numAttrs = 1;
  }

  // Asks for the shared memory and the cluster; `possible`: whether the device has room for one.
  bool prepare(bool& possible) {
    possible = true;
    // As much as there is: another thread may be launching the same kernel with more than this call needs.
    if (cut_.held && !KD_GOOD(cudaFuncSetAttribute(function_, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes_))))
      return false;
    if (cut_.ranks == 1) return true;
    if (cut_.ranks > 8 && !KD_GOOD(cudaFuncSetAttribute(function_, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)))
      return false;
    config_.gridDim = dim3(static_cast<unsigned>(cut_.ranks));
    int clusters = 0;
    const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, function_, &config_);
    if (status == cudaErrorInvalidClusterSize || status == cudaErrorInvalidConfiguration) {
      cudaGetLastError();  // or the next call would report it
    } else if (!report.good(status, "cudaOccupancyMaxActiveClusters")) {
      return false;
    }
    possible = status == cudaSuccess && clusters > 0;
    return true;
  }

  bool run() {
    void* arguments[] = {&work_};
    for (; work_.first_row < work_.job.n; work_.first_row += cut_.rows) {
      const int64_t left = work_.job.n - work_.first_row;
      config_.gridDim = dim3(static_cast<unsigned>((left < cut_.rows ? left : cut_.rows) * cut_.ranks));
      if (!KD_GOOD(cudaLaunchKernelExC(&config_, function_, arguments))) return false;
    }
    return true;
  }

 private:
  const Report& report;
  const Geometry cut_;
  const int64_t shared_bytes_;
  const void* function_;
  Work work_{};
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attribute_{};
};

bool enqueue(const Report& report, const RowDivergence& job, unsigned phases, int device, cudaStream_t stream) {
  if (job.n == 0 || job.vocab == 0) return true;
  Device found;
  if (!KD_GOOD(cudaSetDevice(device)) || !describe(report, device, found)) return false;
  // A part of a device (MIG) may not have room for the cluster: then as on a device that has none.
  for (const bool clusters : {true, false}) {
    if (!clusters) found.major = 0;
    Launch launch(report, job, phases, found, stream);
    bool possible = false;
    if (!launch.prepare(possible)) return false;
    if (possible) return launch.run();
  }
  return false;
}

}  // namespace
}  // namespace cuda
}  // namespace kd

KD_EXPORT int kd_cuda_abi_version() { return kd::cuda::kAbiVersion; }

KD_EXPORT int64_t kd_cuda_job_bytes() { return sizeof(kd::RowDivergence); }

// 1 where `device` can run the kernels; else 0, and the reason in `text`.
KD_EXPORT int kd_cuda_ready(int device, char* text, int64_t size) {
  const kd::cuda::Report report(text, size);
  int count = 0, current = 0;
  if (!KD_GOOD(cudaGetDeviceCount(&count)) || !KD_GOOD(cudaGetDevice(&current)) || !KD_GOOD(cudaSetDevice(device)))
    return 0;
  // Fails where the library was compiled for other GPUs only.
  cudaFuncAttributes attributes;
  const void* any = kd::cuda::kernel_Float32_student(kd::Objective::forward_kl, false);
  const bool ready = KD_GOOD(cudaFuncGetAttributes(&attributes, any));
  return KD_GOOD(cudaSetDevice(current)) && ready;
}

// Enqueues the call on `stream` of `device`; 0 where that failed, and the reason in `text`.
KD_EXPORT int kd_cuda_row_divergence(const kd::RowDivergence* job, unsigned phases, int device, uintptr_t stream,
                                     char* text, int64_t size) {
  const kd::cuda::Report report(text, size);
  return kd::cuda::enqueue(report, *job, phases, device, reinterpret_cast<cudaStream_t>(stream));
}
