// As many vectors as one has places, of which lines become columns.
#pragma once

#include "common.h"

#if defined(__AVX512F__)
#include <immintrin.h>

// Which places of two lines change places in a step: [step][low or high line][place].
struct Exchanges {
  alignas(64) int32_t from[4][2][kLanes] = {};

  constexpr Exchanges() {
    for (int n = 0; n < 4; ++n) {
      for (int i = 0; i < kLanes; ++i) {
        const int step = 1 << n;
        from[n][0][i] = i & step ? i - step + kLanes : i;
        from[n][1][i] = i & step ? i + kLanes : i + step;
      }
    }
  }
};

inline void Transpose(Floats (&lines)[kLanes]) {
  static constexpr Exchanges exchanges;
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) {
    const __m512i low = _mm512_load_si512(exchanges.from[n][0]), high = _mm512_load_si512(exchanges.from[n][1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i >> n & 1) continue;
      const __m512 a = lines[i], b = lines[i + (1 << n)];
      lines[i] = _mm512_permutex2var_ps(a, low, b);
      lines[i + (1 << n)] = _mm512_permutex2var_ps(a, high, b);
    }
  }
}
#elif defined(__AVX__)
#include <immintrin.h>

// Pairs of lines, then of pairs within each half, then the halves.
inline void Transpose(Floats (&lines)[kLanes]) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(lines[i], lines[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(lines[i], lines[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
  }
  for (int i = 0; i < 4; ++i) {
    lines[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    lines[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}
#else
inline void Transpose(Floats (&lines)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float other = lines[i][j];
      lines[i][j] = lines[j][i];
      lines[j][i] = other;
    }
  }
}
#endif
