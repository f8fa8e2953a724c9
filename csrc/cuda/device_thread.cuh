// A thread of a GPU, as row_walk.h wants one.
#pragma once
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include "row_walk.h"

namespace kd {
namespace cuda {

constexpr int kThreads = kWarp * kMostWarps;

struct DeviceThread {
  __device__ __forceinline__ static int index() { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ static constexpr int count() { return kThreads; }
  __device__ __forceinline__ static void barrier() { __syncthreads(); }
  __device__ __forceinline__ static void* shared() {
    extern __shared__ __align__(16) char memory[];
    return memory;
  }

  // Every lane gets the same bits: the operations commute, and the lanes pair up alike.
  template <class T, int kCount, class Operation>
  __device__ __forceinline__ static void warp_reduce(T (&values)[kCount], Operation operation) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        values[i] = operation(values[i], __shfl_xor_sync(0xffffffffu, values[i], offset));
    }
  }

  // 16 bytes from global to shared memory; wait<N>() until all but the last N committed batches are there.
  __device__ __forceinline__ static void copy_async(char* to, const char* from) {
    __pipeline_memcpy_async(to, from, 16);
  }
  __device__ __forceinline__ static void commit() { __pipeline_commit(); }
  template <int kLeft>
  __device__ __forceinline__ static void wait() {
    __pipeline_wait_prior(kLeft);
  }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __device__ __forceinline__ static int rank() {
    return static_cast<int>(cooperative_groups::this_cluster().block_rank());
  }
  __device__ __forceinline__ static int ranks() {
    return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
  }
  __device__ __forceinline__ static void cluster_barrier() { cooperative_groups::this_cluster().sync(); }
  template <class T>
  __device__ __forceinline__ static T* remote(T* shared, int rank) {
    return cooperative_groups::this_cluster().map_shared_rank(shared, static_cast<unsigned>(rank));
  }
#else  // a block is all there is
  __device__ __forceinline__ static constexpr int rank() { return 0; }
  __device__ __forceinline__ static constexpr int ranks() { return 1; }
  __device__ __forceinline__ static void cluster_barrier() { __syncthreads(); }
  template <class T>
  __device__ __forceinline__ static T* remote(T* shared, int) {
    return shared;
  }
#endif
  __device__ __forceinline__ static int64_t cluster() { return blockIdx.x / static_cast<unsigned>(ranks()); }
};

}  // namespace cuda
}  // namespace kd
