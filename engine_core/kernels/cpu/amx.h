// y[T, O] = x[T, K] @ w[O, K]^T with bfloat16 in AMX's tiles (Intel, Architecture Instruction Set Extensions, chapter 3).
//
// A tile is 16 lines of 64 bytes: 16 outputs' next 32 places of the weights, or two places each of 16 rows of x, which is
// packed into tiles once per call. Their product is added to a tile of 16 outputs x 16 rows in float32.
//
// Up to kFewRows rows the time is that of streaming the weights. They are taken where they lie, 16 outputs at a time: as
// many streams as the processor follows by itself, faster than with any prefetches (24 of 25 GB/s on two cores of a
// Sapphire Rapids, 14 where they were copied into tiles on the way). With more rows it is that of loading tiles: 2 x 2
// share what is loaded, the rows from L1, the weights from where they were copied into tiles, so that their lines do not
// compete for the same places of the caches.
#pragma once

#ifdef __AMX_BF16__

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

#include "common.h"
#include "exp.h"
#include "transpose.h"

namespace amx {

constexpr int kSide = 16;           // outputs, or rows, of a tile
constexpr int64_t kPlaces = 32;     // of a line of weights
constexpr int64_t kOutputs = 32;    // of a group of weights, two tiles; what a block is a multiple of, if not gated
constexpr int64_t kFewRows = 64;
constexpr int64_t kFewBlock = 512;  // outputs that a thread takes at a time at most
constexpr int64_t kManyBlock = 128;  // the same if their weights are to stay in its L2 cache
constexpr int64_t kSlice = 512;      // places of two panels that stay in L1
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

// By outputs, then rows: two tiles of outputs with the first rows, then the same with the next.
struct Sums {
  alignas(64) float tiles[4][kSide][kSide];
};

inline void LoadSums(const Sums& sums) {
  _tile_loadd(0, sums.tiles[0], 64);
  _tile_loadd(1, sums.tiles[1], 64);
  _tile_loadd(2, sums.tiles[2], 64);
  _tile_loadd(3, sums.tiles[3], 64);
}

inline void StoreSums(Sums& sums) {
  _tile_stored(0, sums.tiles[0], 64);
  _tile_stored(1, sums.tiles[1], 64);
  _tile_stored(2, sums.tiles[2], 64);
  _tile_stored(3, sums.tiles[3], 64);
}

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

// A sum, or two of the same outputs and rows, to [rows, width].
inline void Write(const float (*sum)[kSide], const float (*other)[kSide], float* to, int64_t count, int64_t width) {
  Floats lines[kSide];
  for (int i = 0; i < kSide; ++i) lines[i] = Load(sum[i]);
  if (other)
    for (int i = 0; i < kSide; ++i) lines[i] += Load(other[i]);
  Transpose(lines);
  for (int64_t i = 0; i < count; ++i) Store(to + i * width, lines[i]);
}

// Up to kFewRows of them.
struct FewRows {
  const uint32_t* x;  // panels, as packed
  const uint16_t* w;  // [width, depth]
  float* y;           // [rows, width]
  int64_t rows, width, depth;

  // begin, end: multiples of kOutputs.
  void Block(int64_t begin, int64_t end) const {
    Tiles tiles;
    for (int64_t col = begin; col < end; col += kSide) {
      switch ((rows + kSide - 1) / kSide) {
        case 1: Column<1>(col); break;
        case 2: Column<2>(col); break;
        case 3: Column<3>(col); break;
        default: Column<4>(col);
      }
    }
  }

  // A tile of outputs of P panels of rows. One sum would wait for itself, so that with one or two panels there are two.
  template <int P>
  void Column(int64_t col) const {
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
    for (int p = 0; p < P; ++p)
      Write(sums.tiles[p], P <= 2 ? sums.tiles[p + 2] : nullptr, y + p * kSide * width + col,
            std::min<int64_t>(kSide, rows - p * kSide), width);
  }
};

// A group's weights of [two tiles of outputs, `other` apart; depth], into tiles.
inline void CopyGroup(const uint16_t* from, int64_t other, int64_t depth, uint8_t* to) {
  for (int64_t k = 0; k < depth; k += kPlaces, to += kStepBytes) {
    _tile_loadd(4, from + k, depth * 2);
    _tile_stored(4, to, 64);
    _tile_loadd(5, from + other * depth + k, depth * 2);
    _tile_stored(5, to + kTileBytes, 64);
  }
}

// More of them. A group of weights is two tiles: neighbours, or, for a gated product, a gate's and those of what it opens
// for.
struct ManyRows {
  const uint32_t* x;  // panels, as packed
  const uint16_t* w;  // [width, depth]; gated: [2 * width, depth], all gates first
  float* y;           // [rows, width], or
  uint16_t* gated;    // [rows, width]: silu(gate) * other
  int64_t rows, width, depth;

  int64_t step() const { return gated ? kSide : kOutputs; }  // outputs of a group
  int64_t other() const { return gated ? width : kSide; }    // from its first tile's outputs to its second one's

  // begin, end: multiples of step().
  void Block(int64_t begin, int64_t end) const {
    static thread_local std::vector<uint8_t> memory;
    static thread_local std::vector<Sums> sums;
    Tiles tiles;
    const int64_t groups = (end - begin) / step(), group_bytes = depth / kPlaces * kStepBytes;
    uint8_t* weights = Room(memory, groups * group_bytes);
    sums.resize(groups);
    for (int64_t group = 0; group < groups; ++group)
      CopyGroup(w + (begin + group * step()) * depth, other(), depth, weights + group * group_bytes);
    for (int64_t row = 0; row < rows; row += 2 * kSide) {
      for (int64_t k = 0; k < depth; k += kSlice)
        for (int64_t group = 0; group < groups; ++group)
          Add(row, k, weights + group * group_bytes + k / kPlaces * kStepBytes, sums[group]);
      for (int64_t group = 0; group < groups; ++group) WriteGroup(row, begin + group * step(), sums[group]);
    }
  }

  // A slice of a group's outputs of two panels of rows. Weights are loaded as what is not needed soon again, so that they
  // do not drive the rows, which the next group needs, out of L1.
  void Add(int64_t row, int64_t begin, const uint8_t* weights, Sums& sums) const {
    const uint32_t *first = x + row * depth / 2, *second = row + kSide < rows ? first + kSide * depth / 2 : first;
    if (begin) LoadSums(sums);
    else ZeroSums();
    const int64_t end = std::min(depth, begin + kSlice);
    for (int64_t k = begin; k < end; k += kPlaces, weights += kStepBytes) {
      _tile_stream_loadd(4, weights, 64);
      _tile_loadd(6, first + k * kSide / 2, 64);
      _tile_stream_loadd(5, weights + kTileBytes, 64);
      _tile_loadd(7, second + k * kSide / 2, 64);
      MultiplyPairs();
    }
    StoreSums(sums);
  }

  void WriteGroup(int64_t row, int64_t col, const Sums& sums) const {
    for (int panel = 0; panel < 2; ++panel, row += kSide) {
      const int64_t count = std::min<int64_t>(kSide, rows - row);
      const auto *first = sums.tiles[2 * panel], *second = sums.tiles[2 * panel + 1];
      if (gated) {
        WriteGated(first, second, gated + row * width + col, count);
      } else {
        Write(first, nullptr, y + row * width + col, count, width);
        Write(second, nullptr, y + row * width + col + kSide, count, width);
      }
    }
  }

  void WriteGated(const float (*gate)[kSide], const float (*other)[kSide], uint16_t* to, int64_t count) const {
    Floats lines[kSide];
    for (int i = 0; i < kSide; ++i) {
      const Floats value = Load(gate[i]), e = Exp(value < 0 ? value : -value);
      const Floats share = _mm512_rcp14_ps(1 + e);  // 2^-14, where the result is rounded to 2^-9
      lines[i] = value * (value < 0 ? e * share : share) * Load(other[i]);
    }
    Transpose(lines);
    for (int64_t i = 0; i < count; ++i) Store(to + i * width, lines[i]);
  }
};

}  // namespace amx

#endif
