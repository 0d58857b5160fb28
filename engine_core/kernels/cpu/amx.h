// y[T, O] = x[T, K] @ w[O, K]^T with bfloat16 in AMX's tiles (Intel, Architecture Instruction Set Extensions, chapter 3).
//
// A tile is 16 lines of 64 bytes: 16 outputs' next 32 places of the weights, or two places each of 16 rows of x, which is
// packed into tiles once per call. Their product is added to a tile of 16 outputs x 16 rows in float32.
//
// Up to kFewRows rows the time is that of streaming the weights. They are taken where they lie, 16 outputs at a time: as
// many streams as the processor follows by itself, faster than with any prefetches (24 of 25 GB/s on two cores of a
// Sapphire Rapids, 14 where they were copied into tiles on the way). With more rows it is that of loading tiles: 2 x 2
// share what is loaded, from weights that were copied into tiles, so that their lines do not compete for the same places
// of the caches.
#pragma once

#ifdef __AMX_BF16__

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

#include "common.h"
#include "transpose.h"

namespace amx {

constexpr int kSide = 16;           // outputs, or rows, of a tile
constexpr int64_t kPlaces = 32;     // of a line of weights
constexpr int64_t kOutputs = 32;    // of a group of weights, two tiles; what a block is a multiple of
constexpr int64_t kFewRows = 64;
constexpr int64_t kFewBlock = 512;  // outputs that a thread takes at a time at most
constexpr int64_t kManyBlock = 128;  // the same if their weights are to stay in its L2 cache
constexpr int64_t kTileWords = 256;
constexpr int64_t kTileBytes = 1024, kStepBytes = 2 * kTileBytes;  // the latter of a group's 32 places

// Whether the system lets this process use tiles: it must be asked, as they make its threads' state larger by 8 KB.
inline bool Allowed() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return allowed;
}

// Eight whole tiles, for as long as it lives.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

inline void ZeroSums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Tiles 0 to 3 += tile 4, then 5, with tile 6, then the same with tile 7.
inline void MultiplyPairs() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 5, 6);
  _tile_dpbf16ps(2, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
}

// By outputs, then rows.
struct Sums {
  alignas(64) float tiles[4][kSide][kSide];
};

// Room for `count` values where a line begins, in memory that the caller keeps.
template <class T>
T* Room(std::vector<T>& memory, int64_t count) {
  memory.resize(count + 64 / sizeof(T));
  return memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 63) / sizeof(T);
}

// Panel `number` of x[T, K] as tiles: [pair of places][row][2], zeros where there are no more rows.
inline void Pack(const uint16_t* x, int64_t rows, int64_t depth, int64_t number, uint32_t* panels) {
  const int64_t pairs = depth / 2, begin = number * kSide, count = std::min<int64_t>(kSide, rows - begin);
  uint32_t* to = panels + begin * pairs;
  for (int64_t pair = 0; pair < pairs; pair += kSide, to += kSide * kSide) {
    Floats lines[kSide] = {};
    for (int64_t row = 0; row < count; ++row) lines[row] = _mm512_loadu_ps(x + (begin + row) * depth + 2 * pair);
    Transpose(lines);
    for (int i = 0; i < kSide; ++i) _mm512_store_ps(to + i * kSide, lines[i]);
  }
}

struct Product {
  const uint32_t* x;  // panels, as packed
  const uint16_t* w;  // [width, depth]
  float* y;           // [rows, width]
  int64_t rows, width, depth;

  // begin, end: multiples of kOutputs.
  void Block(int64_t begin, int64_t end) const {
    Tiles tiles;
    if (rows > kFewRows) return ManyRows(begin, end);
    for (int64_t col = begin; col < end; col += kSide) {
      switch ((rows + kSide - 1) / kSide) {
        case 1: FewRows<1>(col); break;
        case 2: FewRows<2>(col); break;
        case 3: FewRows<3>(col); break;
        default: FewRows<4>(col);
      }
    }
  }

  // A tile of outputs of P panels of rows. One sum would wait for itself, so that with one or two panels there are two.
  template <int P>
  void FewRows(int64_t col) const {
    const uint16_t* weights = w + col * depth;
    const int64_t panel = depth * kSide / 2;
    const uint32_t* from = x;
    ZeroSums();
    for (int64_t k = 0; k < depth; k += kPlaces, from += kTileBytes / 4) {
      const bool odd = P <= 2 && k & kPlaces;
      _tile_loadd(4, weights + k, depth * 2);
      _tile_loadd(5, from, 64);
      if (odd) _tile_dpbf16ps(2, 4, 5);
      else _tile_dpbf16ps(0, 4, 5);
      if (P >= 2) {
        _tile_loadd(6, from + panel, 64);
        if (odd) _tile_dpbf16ps(3, 4, 6);
        else _tile_dpbf16ps(1, 4, 6);
      }
      if (P >= 3) {
        _tile_loadd(7, from + 2 * panel, 64);
        _tile_dpbf16ps(2, 4, 7);
      }
      if (P == 4) {
        _tile_loadd(5, from + 3 * panel, 64);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    Sums sums;
    StoreSums(sums);
    for (int p = 0; p < P; ++p) Write(sums.tiles[p], P <= 2 ? sums.tiles[p + 2] : nullptr, p * kSide, col);
  }

  void ManyRows(int64_t begin, int64_t end) const {
    static thread_local std::vector<uint8_t> memory;
    const int64_t num_groups = (end - begin) / kOutputs, group_bytes = depth / kPlaces * kStepBytes;
    uint8_t* slots = Room(memory, num_groups * group_bytes);
    for (int64_t k = 0; k < depth; k += kPlaces) Copy(begin, k, slots + k / kPlaces * kStepBytes);
    for (int64_t row = 0; row < rows; row += 2 * kSide) {
      for (int64_t group = 0; group < num_groups; ++group) {
        uint8_t* slot = slots + group * group_bytes;
        uint8_t* next = row || group + 1 == num_groups ? nullptr : slot + group_bytes;
        Group(row, begin + group * kOutputs, slot, next);
      }
    }
  }

  // Weights of a group's 32 places into tiles.
  void Copy(int64_t col, int64_t k, uint8_t* to) const {
    const uint16_t* from = w + col * depth + k;
    _tile_loadd(4, from, depth * 2);
    _tile_stored(4, to, 64);
    _tile_loadd(5, from + kSide * depth, depth * 2);
    _tile_stored(5, to + kTileBytes, 64);
  }

  // A group's outputs of two panels of rows, while the next group, if any, is copied.
  void Group(int64_t row, int64_t col, const uint8_t* weights, uint8_t* next) const {
    const bool is_pair = row + kSide < rows;
    const uint32_t *first = x + row * depth / 2, *second = is_pair ? first + kSide * depth / 2 : first;
    ZeroSums();
    for (int64_t k = 0; k < depth; k += kPlaces, weights += kStepBytes) {
      _tile_loadd(4, weights, 64);
      _tile_loadd(6, first + k * kSide / 2, 64);
      _tile_loadd(5, weights + kTileBytes, 64);
      _tile_loadd(7, second + k * kSide / 2, 64);
      MultiplyPairs();
      if (next) Copy(col + kOutputs, k, next + k / kPlaces * kStepBytes);
    }
    Sums sums;
    StoreSums(sums);
    for (int i = 0; i < (is_pair ? 4 : 2); ++i)
      Write(sums.tiles[i], nullptr, row + i / 2 * kSide, col + i % 2 * kSide);
  }

  static void StoreSums(Sums& sums) {
    _tile_stored(0, sums.tiles[0], 64);
    _tile_stored(1, sums.tiles[1], 64);
    _tile_stored(2, sums.tiles[2], 64);
    _tile_stored(3, sums.tiles[3], 64);
  }

  // A sum, or two of the same outputs and rows, to where it belongs.
  void Write(const float (*sum)[kSide], const float (*other)[kSide], int64_t row, int64_t col) const {
    Floats lines[kSide];
    for (int i = 0; i < kSide; ++i) lines[i] = Load(sum[i]);
    if (other)
      for (int i = 0; i < kSide; ++i) lines[i] += Load(other[i]);
    Transpose(lines);
    const int64_t count = std::min<int64_t>(kSide, rows - row);
    for (int64_t i = 0; i < count; ++i) Store(y + (row + i) * width + col, lines[i]);
  }
};

}  // namespace amx

#endif
