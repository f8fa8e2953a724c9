// How numbers lie in memory: groups of consecutive entries in 16-byte words, and one number of each type.
#pragma once
#include "../rows.h"
#include "number.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KD_MAY_ALIAS
#else
#define KD_MAY_ALIAS __attribute__((may_alias))
#endif

namespace kd {
namespace cuda {

// What a kernel is compiled for. `kGroup` entries are what a thread takes at a time; where `kFixed` both sides
// have the type `kDtype`, else each has its own, looked up at run time.
struct Float32 {
  using Number = float;
  static constexpr int kGroup = 4;
  static constexpr bool kFixed = true;
  static constexpr Dtype kDtype = Dtype::float32;
};
struct Bfloat16 {
  using Number = float;
  static constexpr int kGroup = 8;
  static constexpr bool kFixed = true;
  static constexpr Dtype kDtype = Dtype::bfloat16;
};
struct Float16 {
  using Number = float;
  static constexpr int kGroup = 8;
  static constexpr bool kFixed = true;
  static constexpr Dtype kDtype = Dtype::float16;
};
struct Mixed {  // two of the above
  using Number = float;
  static constexpr int kGroup = 8;
  static constexpr bool kFixed = false;
  static constexpr Dtype kDtype = Dtype::float32;  // the widest
};
struct Wide {  // float64 on either side
  using Number = double;
  static constexpr int kGroup = 2;
  static constexpr bool kFixed = false;
  static constexpr Dtype kDtype = Dtype::float64;
};

KD_BOTH constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

KD_BOTH uint32_t low_bits(uintptr_t address) { return static_cast<uint32_t>(address & 15); }
KD_BOTH uint32_t low_bits(const void* address) { return low_bits(reinterpret_cast<uintptr_t>(address)); }

struct alignas(16) Words {
  uint32_t at[4];
};
struct alignas(8) HalfWords {
  uint32_t at[2];
};

// --- one number ----------------------------------------------------------------------------------------
KD_BOTH float decode16(uint32_t bits, Dtype dtype) {
  if (dtype == Dtype::bfloat16) return bits_of<float>(bits << 16);
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
#else
  return static_cast<float>(bits_of<_Float16>(static_cast<uint16_t>(bits)));
#endif
}

KD_BOTH uint32_t encode16(float x, Dtype dtype) {
  if (dtype == Dtype::bfloat16) {
#if defined(__CUDA_ARCH__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    const uint32_t bits = bits_of<uint32_t>(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#endif
  }
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(x));
#else
  return bits_of<uint16_t>(static_cast<_Float16>(x));
#endif
}

// As wide as T: one instruction, which needs T's alignment.
template <class T>
struct KD_MAY_ALIAS Place {
  T value;
};
template <class T>
KD_BOTH T read(const char* at) {
  return reinterpret_cast<const Place<T>*>(at)->value;
}
template <class T>
KD_BOTH void write(char* at, T value) {
  reinterpret_cast<Place<T>*>(at)->value = value;
}

template <class F>
KD_BOTH F read_number(const char* at, Dtype dtype) {
  if (dtype == Dtype::float64) return static_cast<F>(read<double>(at));
  if (dtype == Dtype::float32) return static_cast<F>(read<float>(at));
  return static_cast<F>(decode16(read<uint16_t>(at), dtype));
}

// --- a group of them, as it came from memory -------------------------------------------------------------
template <class S>
struct Raw {
  static constexpr int kWords = S::kGroup * bytes_of(S::kDtype) / 4;
  uint32_t words[kWords];

  // `inside` of the group's entries exist. `whole`: 16 bytes at a time are allowed where all of them do.
  KD_BOTH void load(const char* at, Dtype dtype, int inside, bool whole) {
    const int size = bytes_of(dtype);
    if (whole && inside >= S::kGroup) {
      KD_UNROLL
      for (int i = 0; i < kWords / 4; ++i) {
        if (16 * i < S::kGroup * size) {
          const Words loaded = read<Words>(at + 16 * i);
          for (int j = 0; j < 4; ++j) words[4 * i + j] = loaded.at[j];
        }
      }
      return;
    }
    KD_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = 0;
    KD_UNROLL
    for (int i = 0; i < S::kGroup; ++i) {
      if (i < inside) load_one(at + i * size, i, dtype);
    }
  }

  template <class F>
  KD_BOTH F number(int i, Dtype dtype) const {
    if (sizeof(F) == 8 && dtype == Dtype::float64)
      return static_cast<F>(
          bits_of<double>(static_cast<uint64_t>(words[(2 * i + 1) % kWords]) << 32 | words[2 * i % kWords]));
    if (dtype == Dtype::float32) return static_cast<F>(bits_of<float>(words[i % kWords]));
    return static_cast<F>(decode16(words[i / 2] >> 16 * (i % 2) & 0xffff, dtype));
  }

 private:
  KD_BOTH void load_one(const char* at, int i, Dtype dtype) {
    if (dtype == Dtype::float64) {
      const uint64_t bits = read<uint64_t>(at);
      words[2 * i % kWords] = static_cast<uint32_t>(bits);
      words[(2 * i + 1) % kWords] = static_cast<uint32_t>(bits >> 32);
    } else if (dtype == Dtype::float32) {
      words[i % kWords] = read<uint32_t>(at);
    } else {
      words[i / 2] |= static_cast<uint32_t>(read<uint16_t>(at)) << 16 * (i % 2);
    }
  }
};

// Whether a row's groups may be read 16 bytes at a time, and written 16 or, where a group has no more, 8.
// Groups start at multiples of their size.
KD_BOTH bool whole_loads(const void* row, int group_bytes) { return group_bytes >= 16 && low_bits(row) == 0; }
KD_BOTH bool whole_stores(const void* row, int group_bytes) {
  return group_bytes >= 8 && (low_bits(row) & (group_bytes >= 16 ? 15 : 7)) == 0;
}

template <class F>
KD_BOTH void write_number(char* at, F x, Dtype dtype) {
  if (dtype == Dtype::float64) {
    write(at, static_cast<double>(x));
  } else if (dtype == Dtype::float32) {
    write(at, static_cast<float>(x));
  } else {
    write(at, static_cast<uint16_t>(encode16(static_cast<float>(x), dtype)));
  }
}

template <int kGroup, class F>
KD_BOTH void store_group(const F (&values)[kGroup], char* at, Dtype dtype, int inside, bool whole) {
  if (!whole || inside < kGroup || dtype == Dtype::float64) {
    KD_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      if (i < inside) write_number(at + i * bytes_of(dtype), values[i], dtype);
    }
    return;
  }
  uint32_t words[kGroup];
  if (dtype == Dtype::float32) {
    KD_UNROLL
    for (int i = 0; i < kGroup; ++i) words[i] = bits_of<uint32_t>(static_cast<float>(values[i]));
  } else {
    KD_UNROLL
    for (int i = 0; i < kGroup / 2; ++i)
      words[i] = encode16(static_cast<float>(values[2 * i]), dtype) |
                 encode16(static_cast<float>(values[2 * i + 1]), dtype) << 16;
  }
  const int count = dtype == Dtype::float32 ? kGroup : kGroup / 2;  // of words: 2, 4 or 8
  if (count == 2) {
    write(at, HalfWords{{words[0], words[1]}});
    return;
  }
  KD_UNROLL
  for (int i = 0; i + 4 <= kGroup; i += 4) {
    if (i < count) write(at + 4 * i, Words{{words[i], words[i + 1], words[i + 2], words[i + 3]}});
  }
}

}  // namespace cuda
}  // namespace kd
