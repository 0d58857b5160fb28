// What the kernels share: vectors of this machine's width, and a loop over XLA's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef float LooseFloats __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t LooseWords __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));

inline Floats Load(const float* p) { return *reinterpret_cast<const LooseFloats*>(p); }
inline LooseWords Load(const uint16_t* p) { return *reinterpret_cast<const LooseWords*>(p); }
inline void Store(float* p, Floats value) { *reinterpret_cast<LooseFloats*>(p) = value; }

// To bfloat16, to the nearest, ties to even: in the high halves, with anything in the low ones.
inline Words Rounded(Floats value) {
  const Words bits = reinterpret_cast<Words>(value);
  return bits + 0x7fff + (bits >> 16 & 1);
}

inline void Store(uint16_t* p, Floats value) {
  *reinterpret_cast<LooseHalves*>(p) = __builtin_convertvector(Rounded(value) >> 16, Halves);
}

inline float Sum(Floats value) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += value[i];
  return sum;
}

inline float Widen(float value) { return value; }
inline float Widen(uint16_t bits) {
  uint32_t word = uint32_t{bits} << 16;
  float value;
  __builtin_memcpy(&value, &word, sizeof(value));
  return value;
}

// Runs f(0) .. f(count - 1) on XLA's threads and this one; whoever comes takes the next. A helper that starts late finds
// nothing left and touches nothing but the counters, which it keeps alive; so the caller waits only for what is running.
template <class F>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t count, F f) {
  struct Shared {
    F f;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    void Work() {
      for (int64_t i = next++; i < count; i = next++) {
        f(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  std::shared_ptr<Shared> shared(new Shared{std::move(f), count});
  for (int64_t i = 1; i < std::min<int64_t>(pool.num_threads(), count); ++i) pool.Schedule([shared] { shared->Work(); });
  shared->Work();
  while (shared->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}
