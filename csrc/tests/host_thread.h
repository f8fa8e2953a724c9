// A GPU's thread played by one of the host, as cuda/row_walk.h wants one: as many std::threads as a cluster has.
#pragma once
#include <barrier>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "../cuda/geometry.h"

namespace host {

using kd::cuda::kWarp;

struct Warp {
  std::barrier<> barrier{kWarp};
  alignas(16) char lanes[kWarp][64];  // what each lane has laid down
};

struct Block {
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<char, decltype(&std::free)> shared;

  Block(int threads, int64_t bytes) : barrier(threads), shared(static_cast<char*>(allocate(bytes)), &std::free) {
    for (int i = 0; i < threads / kWarp; ++i) warps.push_back(std::make_unique<Warp>());
    std::memset(shared.get(), 0xff, static_cast<size_t>(bytes));  // NaN
  }
  static void* allocate(int64_t bytes) { return std::aligned_alloc(16, static_cast<size_t>((bytes + 15) / 16 * 16)); }
};

struct Cluster {
  int threads;
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Block>> blocks;

  Cluster(int threads_, int ranks, int64_t shared_bytes) : threads(threads_), barrier(threads_ * ranks) {
    for (int i = 0; i < ranks; ++i) blocks.push_back(std::make_unique<Block>(threads, shared_bytes));
  }
};

class Thread {
 public:
  Thread(Cluster& cluster, int rank, int index, int64_t row)
      : cluster_(cluster), block_(*cluster.blocks[rank]), rank_(rank), index_(index), row_(row) {}

  int index() const { return index_; }
  int count() const { return cluster_.threads; }
  int rank() const { return rank_; }
  int ranks() const { return static_cast<int>(cluster_.blocks.size()); }
  int64_t cluster() const { return row_; }
  void* shared() const { return block_.shared.get(); }
  void barrier() const { block_.barrier.arrive_and_wait(); }
  void cluster_barrier() const { cluster_.barrier.arrive_and_wait(); }

  template <class T>
  T* remote(T* shared, int rank) const {
    return reinterpret_cast<T*>(cluster_.blocks[rank]->shared.get() +
                                (reinterpret_cast<char*>(shared) - block_.shared.get()));
  }

  // All lanes lay down their values, then each goes through the device's exchange by itself.
  template <class T, int kCount, class Operation>
  void warp_reduce(T (&values)[kCount], Operation operation) const {
    static_assert(sizeof values <= 64, "a lane's place");
    Warp& warp = *block_.warps[index_ / kWarp];
    std::memcpy(warp.lanes[index_ % kWarp], values, sizeof values);
    warp.barrier.arrive_and_wait();
    T all[kWarp][kCount], next[kWarp][kCount];
    for (int lane = 0; lane < kWarp; ++lane) std::memcpy(all[lane], warp.lanes[lane], sizeof all[lane]);
    warp.barrier.arrive_and_wait();
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      for (int lane = 0; lane < kWarp; ++lane)
        for (int i = 0; i < kCount; ++i) next[lane][i] = operation(all[lane][i], all[lane ^ offset][i]);
      std::memcpy(all, next, sizeof all);
    }
    std::memcpy(values, all[index_ % kWarp], sizeof values);
  }

  // What has not been waited for is not there: the copies happen in wait().
  void copy_async(char* to, const char* from) const { pending_.push_back({to, from, batch_}); }
  void commit() const { ++batch_; }
  template <int kLeft>
  void wait() const {
    for (Copy& copy : pending_) {
      if (copy.batch >= batch_ - kLeft || !copy.to) continue;
      kd::cuda::write(copy.to, kd::cuda::read<kd::cuda::Words>(copy.from));
      copy.to = nullptr;
    }
  }

 private:
  struct Copy {
    char* to;
    const char* from;
    int batch;
  };
  Cluster& cluster_;
  Block& block_;
  const int rank_, index_;
  const int64_t row_;
  mutable std::vector<Copy> pending_;
  mutable int batch_ = 0;
};

// Runs body(thread) for every row, by one cluster after the other.
template <class Body>
void launch(int threads, int ranks, int64_t shared_bytes, int64_t rows, const Body& body) {
  Cluster cluster(threads, ranks, shared_bytes);
  std::vector<std::thread> all;
  for (int rank = 0; rank < ranks; ++rank)
    for (int index = 0; index < threads; ++index)
      all.emplace_back([&, rank, index] {
        for (int64_t row = 0; row < rows; ++row) {
          body(Thread(cluster, rank, index, row));
          cluster.barrier.arrive_and_wait();  // a block ends before another takes its place
        }
      });
  for (std::thread& thread : all) thread.join();
}

}  // namespace host
