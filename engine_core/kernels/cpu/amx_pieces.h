// y[T, O] = x[T, K] @ w[O, K]^T with x in float32 and w in bfloat16, in AMX's tiles of bfloat16 (amx.h).
//
// A float32 is the sum of three bfloat16 numbers, its pieces: 24 bits, 8 in each. The products of the pieces with w are
// therefore those of x with w, not rounded, and tiles add them up in float32. (What is below 2^-126 counts as zero in
// tiles.) Weights that are loaded serve all pieces.
//
// x is packed in panels of 16 rows, whose pieces lie in three tiles, added to one sum. A few rows are one panel, in whose
// one or two tiles pieces lie as if each were a row, so that less is loaded; their sums are added at the end.
#pragma once

#include "amx.h"

#ifdef __AMX_BF16__

namespace amx {

// x in panels of [32 places][tile][pair of places][line][2].
struct Pieces {
  static constexpr int64_t kNum = 3;
  static constexpr int64_t kFew = 2 * kSide / kNum;  // rows whose pieces share tiles

  const float* x;
  int64_t rows, depth;

  bool Shared() const { return rows <= kFew; }
  int64_t Height() const { return Shared() ? rows : kSide; }  // of a panel
  int64_t NumPanels() const { return (rows + Height() - 1) / Height(); }
  int64_t NumTiles() const { return (kNum * Height() + kSide - 1) / kSide; }  // for 32 places of a panel
  int64_t Panel() const { return depth / kPlaces * NumTiles() * kTileWords; }  // words

  // Panel `number`; lines of no row are zero.
  void Pack(int64_t number, uint32_t* panels) const {
    const int64_t begin = number * Height(), count = std::min(Height(), rows - begin);
    uint32_t* to = panels + number * Panel();
    Floats lines[kNum * kSide] = {};
    for (int64_t k = 0; k < depth; k += kPlaces) {
      for (int64_t row = 0; row < count; ++row) {
        const float* from = x + (begin + row) * depth + k;
        Floats low = Load(from), high = Load(from + kSide);
        for (int piece = 0; piece < kNum; ++piece) {
          const Words low_first = First(low), high_first = First(high);
          lines[piece * Height() + row] = Pairs(low_first, high_first);
          low -= reinterpret_cast<Floats>(low_first);
          high -= reinterpret_cast<Floats>(high_first);
        }
      }
      for (int64_t tile = 0; tile < NumTiles(); ++tile, to += kTileWords) {
        Floats square[kSide];
        std::copy_n(lines + tile * kSide, kSide, square);
        Transpose(square);
        for (int i = 0; i < kSide; ++i) _mm512_store_ps(to + i * kSide, square[i]);
      }
    }
  }

 private:
  static Words First(Floats x) { return reinterpret_cast<Words>(x) & 0xffff0000u; }

  // Upper halves of 32 words.
  static Floats Pairs(Words low, Words high) {
    typedef uint16_t Halves __attribute__((vector_size(64)));
    Halves upper;
    for (int i = 0; i < 2 * kSide; ++i) upper[i] = 2 * i + 1;
    return reinterpret_cast<Floats>(_mm512_permutex2var_epi16(
        reinterpret_cast<__m512i>(low), reinterpret_cast<__m512i>(upper), reinterpret_cast<__m512i>(high)));
  }
};

struct PiecesProduct {
  const uint32_t* x;  // panels, as packed
  const uint16_t* w;  // [width, depth]
  float* y;           // [rows, width]
  int64_t rows, width, depth;
  Pieces pieces;

  void Block(int64_t begin, int64_t end) const {
    Tiles tiles;
    if (rows > kFewRows) return ManyRows(begin, end);
    for (int64_t col = begin; col < end; col += kSide) {
      if (pieces.Shared()) {
        if (pieces.NumTiles() == 1) Few<1, 1>(col);
        else Few<2, 1>(col);
        continue;
      }
      switch (pieces.NumPanels()) {
        case 1: Few<1, Pieces::kNum>(col); break;
        case 2: Few<2, Pieces::kNum>(col); break;
        case 3: Few<3, Pieces::kNum>(col); break;
        default: Few<4, Pieces::kNum>(col);
      }
    }
  }

  // A tile of outputs; P sums of `times` tiles of x each. One sum would wait for itself, so that one or two are doubled.
  template <int P, int times>
  void Few(int64_t col) const {
    const uint16_t* weights = w + col * depth;
    const uint32_t* from = x;
    const int64_t next = times == 1 ? kTileWords : pieces.Panel();
    ZeroSums();
    for (int64_t k = 0; k < depth; k += kPlaces) {
      _tile_loadd(4, weights + k, depth * 2);
      for (int i = 0; i < times; ++i, from += (times == 1 ? P : 1) * kTileWords) {
        if (P <= 2 && (times == 1 ? k & kPlaces : i == 1)) {
          Add<2>(from);
          if (P == 2) Add<3>(from + next);
        } else {
          Add<0>(from);
          if (P >= 2) Add<1>(from + next);
          if (P >= 3) Add<2>(from + 2 * next);
          if (P == 4) Add<3>(from + 3 * next);
        }
      }
    }
    Sums sums;
    StoreSums(sums);
    if (times > 1) {
      for (int p = 0; p < P; ++p) WriteTile(sums.tiles[p], P <= 2 ? sums.tiles[p + 2] : nullptr, p * kSide, col);
    } else {
      WriteShared<P>(sums, col);
    }
  }

  // The weights' tile with one of x, to sum S.
  template <int S>
  static void Add(const uint32_t* from) {
    if (S == 0) {
      _tile_loadd(5, from, 64);
      _tile_dpbf16ps(0, 4, 5);
    } else if (S == 1) {
      _tile_loadd(6, from, 64);
      _tile_dpbf16ps(1, 4, 6);
    } else if (S == 2) {
      _tile_loadd(7, from, 64);
      _tile_dpbf16ps(2, 4, 7);
    } else {
      _tile_loadd(5, from, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }

  template <int P>
  void WriteShared(const Sums& sums, int64_t col) const {
    Floats lines[P * kSide];
    for (int p = 0; p < P; ++p) {
      Floats square[kSide];
      for (int i = 0; i < kSide; ++i) square[i] = Load(sums.tiles[p][i]) + Load(sums.tiles[p + 2][i]);
      Transpose(square);
      std::copy_n(square, kSide, lines + p * kSide);
    }
    for (int64_t row = 0; row < rows; ++row)
      Store(y + row * width + col, lines[row] + lines[rows + row] + lines[2 * rows + row]);
  }

  void ManyRows(int64_t begin, int64_t end) const {
    static thread_local std::vector<uint8_t> memory;
    const int64_t groups = (end - begin) / kOutputs, group_bytes = depth / kPlaces * kStepBytes;
    uint8_t* weights = Room(memory, groups * group_bytes);
    for (int64_t group = 0; group < groups; ++group)
      CopyGroup(w + (begin + group * kOutputs) * depth, kSide, depth, weights + group * group_bytes);
    for (int64_t row = 0; row < rows; row += 2 * kSide)
      for (int64_t group = 0; group < groups; ++group)
        Group(row, begin + group * kOutputs, weights + group * group_bytes);
  }

  // A group's outputs of two panels of rows.
  void Group(int64_t row, int64_t col, const uint8_t* weights) const {
    const bool is_pair = row + kSide < rows;
    const uint32_t* first = x + row / kSide * pieces.Panel();
    const uint32_t* second = is_pair ? first + pieces.Panel() : first;
    ZeroSums();
    for (int64_t k = 0; k < depth; k += kPlaces, weights += kStepBytes) {
      _tile_stream_loadd(4, weights, 64);
      _tile_stream_loadd(5, weights + kTileBytes, 64);
      for (int i = 0; i < Pieces::kNum; ++i, first += kTileWords, second += kTileWords) {
        _tile_loadd(6, first, 64);
        _tile_loadd(7, second, 64);
        MultiplyPairs();
      }
    }
    Sums sums;
    StoreSums(sums);
    for (int i = 0; i < (is_pair ? 4 : 2); ++i)
      WriteTile(sums.tiles[i], nullptr, row + i / 2 * kSide, col + i % 2 * kSide);
  }

  void WriteTile(const float (*sum)[kSide], const float (*other)[kSide], int64_t row, int64_t col) const {
    Write(sum, other, y + row * width + col, std::min<int64_t>(kSide, rows - row), width);
  }
};

}  // namespace amx

#endif
