// Attention of many query rows with bfloat16 in AMX's tiles (amx.h).
//
// Keys stand where a product has its weights, so that scores, weights and results lie transposed: a vector for each key,
// or for each dimension of the values, with a place for each of a panel's 16 rows. Thus the softmax goes row beside row,
// with no sum across a vector, and the weights of two keys, rounded, are a line of the next product's tile. Scores and
// sums are float32; the softmax is online, over blocks of keys. What is packed of keys and values serves all rows.
#pragma once

#ifdef __AMX_BF16__

#include "amx.h"
#include "exp.h"

namespace amx {

constexpr int64_t kAttendLeast = kSide;   // rows; with fewer, most of a tile is empty
constexpr int64_t kAttendMost = 128;      // their queries and results stay in L2 beside a block's keys and values
constexpr int64_t kAttendKeys = 256;      // of a block, whose scores of a panel fit L1
constexpr int64_t kPanels = kAttendMost / kSide;

// Job: rows of one KV head, later ones see later keys.
//   int64_t rows() const, dim() const;                        at most kAttendMost; a multiple of kPlaces
//   float scale;
//   const uint16_t* Query(row), uint16_t* Out(row) const;     [dim]
//   int64_t Begin(row), End(row) const;                       the keys it sees
//   const uint16_t* Key(place) const;                         [2 * dim], the value behind the key
template <class Job>
class Attending {
 public:
  explicit Attending(const Job& job) : job_(job), rows_(job.rows()), dim_(job.dim()) {
    static thread_local std::vector<uint32_t> memory[4];
    static thread_local std::vector<float> floats[2];
    static thread_local std::vector<uint16_t> zeros;
    zeros.resize(2 * dim_);
    zeros_ = zeros.data();
    const int64_t places = (rows_ + 2 * kSide - 1) / (2 * kSide) * 2 * kSide;  // for rows: whole pairs of panels
    queries_ = Room(memory[0], places * dim_ / 2);
    keys_ = Room(memory[1], kAttendKeys * dim_ / 2);
    values_ = Room(memory[2], kAttendKeys * dim_ / 2);
    weights_ = Room(memory[3], 2 * kSide * kAttendKeys / 2);
    scores_ = Room(floats[0], 2 * kSide * kAttendKeys);
    sums_ = Room(floats[1], places * dim_);
    std::fill_n(sums_, places * dim_, 0.0f);
  }

  void Run() {
    Tiles tiles;
    for (int64_t row = 0; row < rows_; row += 2 * kSide) {
      Start(row);
      Start(row + kSide);
    }
    const int64_t lowest = job_.Begin(0), end = job_.End(rows_ - 1);
    for (int64_t block = lowest / kAttendKeys * kAttendKeys; block < end; block += kAttendKeys) {
      const int64_t first = std::max(block, lowest / kPlaces * kPlaces), last = std::min(block + kAttendKeys, end);
      for (int64_t key = first; key < last; key += kPlaces) Pack(key, key - first, lowest, end);
      for (int64_t row = 0; row < rows_; row += 2 * kSide) {
        const int64_t seen = std::min(last, job_.End(std::min(rows_, row + 2 * kSide) - 1)) - first;
        if (seen > 0) AddBlock(row, first, (seen + kPlaces - 1) / kPlaces * kPlaces);
      }
    }
    for (int64_t row = 0; row < rows_; row += kSide) Write(row);
  }

 private:
  struct Panel {
    Ints begin, end;  // the keys that its rows see: none where there is no row
    Floats top, total;
  };

  // A panel's queries as tiles, [pair of dimensions][row][2].
  void Start(int64_t row) {
    Panel& panel = panels_[row / kSide];
    panel = {Ints{}, Ints{}, Floats{} + kLowest, Floats{}};
    const int64_t count = std::clamp<int64_t>(rows_ - row, 0, kSide);
    for (int64_t i = 0; i < count; ++i) {
      panel.begin[i] = job_.Begin(row + i);
      panel.end[i] = job_.End(row + i);
    }
    for (int64_t pair = 0; pair < dim_ / 2; pair += kSide) {
      Floats lines[kSide] = {};
      for (int64_t i = 0; i < count; ++i) lines[i] = _mm512_loadu_ps(job_.Query(row + i) + 2 * pair);
      Transpose(lines);
      for (int i = 0; i < kSide; ++i) _mm512_store_ps(queries_ + row * dim_ / 2 + (pair + i) * kSide, lines[i]);
    }
  }

  // kPlaces keys as tiles of [key][dimension], their values as tiles of [dimension][key]; zeros out of [lowest, end),
  // whose places may hold anything.
  void Pack(int64_t key, int64_t at, int64_t lowest, int64_t end) {
    const uint16_t* from[kPlaces];
    for (int64_t i = 0; i < kPlaces; ++i) from[i] = key + i >= lowest && key + i < end ? job_.Key(key + i) : zeros_;
    for (int64_t i = 0; i < kPlaces; ++i)
      for (int64_t h = 0; h < dim_; h += kPlaces)
        _mm512_store_si512(keys_ + (at + i) / kSide * kSide * dim_ / 2 + h / 2 * kSide + i % kSide * kSide,
                           _mm512_loadu_si512(from[i] + h));
    for (int64_t h = 0; h < dim_; h += kSide) {
      Floats lines[kSide];
      for (int i = 0; i < kSide; ++i) {
        auto wide = [&](int j) {
          return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from[j] + dim_ + h)));
        };
        lines[i] = _mm512_castsi512_ps(_mm512_or_si512(wide(2 * i), _mm512_slli_epi32(wide(2 * i + 1), 16)));
      }
      Transpose(lines);
      for (int i = 0; i < kSide; ++i)
        _mm512_store_ps(values_ + h * kAttendKeys / 2 + at / 2 * kSide + i * kSide, lines[i]);
    }
  }

  // `count` keys from `first` on, of which two panels of rows see some.
  void AddBlock(int64_t row, int64_t first, int64_t count) {
    Score(row, count);
    for (int64_t i = 0; i < 2; ++i) Softmax(row + i * kSide, first, count, i * kSide * kAttendKeys);
    AddValues(row, count);
  }

  void Score(int64_t row, int64_t count) {
    const uint32_t* low = queries_ + row * dim_ / 2;
    const uint32_t* high = low + kSide * dim_ / 2;
    for (int64_t key = 0; key < count; key += 2 * kSide) {
      const uint32_t* keys = keys_ + key * dim_ / 2;
      ZeroSums();
      for (int64_t at = 0; at < kSide * dim_ / 2; at += kTileWords) {
        _tile_loadd(4, keys + at, 64);
        _tile_loadd(6, low + at, 64);
        _tile_loadd(5, keys + kSide * dim_ / 2 + at, 64);
        _tile_loadd(7, high + at, 64);
        MultiplyPairs();
      }
      float* to = scores_ + key * kSide;
      _tile_stored(0, to, 64);
      _tile_stored(1, to + kTileWords, 64);
      _tile_stored(2, to + kSide * kAttendKeys, 64);
      _tile_stored(3, to + kSide * kAttendKeys + kTileWords, 64);
    }
  }

  // A panel's scores, from place `at` of scores on, become weights.
  void Softmax(int64_t row, int64_t first, int64_t count, int64_t at) {
    Panel& panel = panels_[row / kSide];
    const Ints begin = panel.begin - static_cast<int32_t>(first), end = panel.end - static_cast<int32_t>(first);
    float* scores = scores_ + at;
    Floats highest = panel.top;
    for (int32_t key = 0; key < count; ++key) {
      Floats score = Load(scores + key * kSide) * job_.scale;
      score = (begin <= key & end > key) ? score : kMasked - Floats{};
      Store(scores + key * kSide, score);
      highest = score > highest ? score : highest;
    }
    const Floats decay = Exp(panel.top - highest);
    Floats total = panel.total * decay;
    for (int64_t key = 0; key < count; key += 2) {
      const Floats even = Exp(Load(scores + key * kSide) - highest), odd = Exp(Load(scores + (key + 1) * kSide) - highest);
      total += even + odd;
      const Words pairs = Rounded(even) >> 16 | (Rounded(odd) & 0xffff0000u);
      _mm512_store_si512(weights_ + (at + key * kSide) / 2, reinterpret_cast<__m512i>(pairs));
    }
    panel.top = highest;
    panel.total = total;
    float* sums = sums_ + row * dim_;
    for (int64_t h = 0; h < dim_; ++h) Store(sums + h * kSide, Load(sums + h * kSide) * decay);
  }

  void AddValues(int64_t row, int64_t count) {
    for (int64_t h = 0; h < dim_; h += 2 * kSide) {
      float* sums = sums_ + row * dim_ + h * kSide;
      float* others = sums + kSide * dim_;
      const uint32_t* values = values_ + h * kAttendKeys / 2;
      _tile_loadd(0, sums, 64);
      _tile_loadd(1, sums + kTileWords, 64);
      _tile_loadd(2, others, 64);
      _tile_loadd(3, others + kTileWords, 64);
      for (int64_t at = 0; at < count * kSide / 2; at += kTileWords) {
        _tile_loadd(4, values + at, 64);
        _tile_loadd(6, weights_ + at, 64);
        _tile_loadd(5, values + kSide * kAttendKeys / 2 + at, 64);
        _tile_loadd(7, weights_ + kSide * kAttendKeys / 2 + at, 64);
        MultiplyPairs();
      }
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + kTileWords, 64);
      _tile_stored(2, others, 64);
      _tile_stored(3, others + kTileWords, 64);
    }
  }

  // A panel's sums, divided and put where they belong.
  void Write(int64_t row) {
    const int64_t count = std::min<int64_t>(kSide, rows_ - row);
    const Floats share = 1 / panels_[row / kSide].total;
    for (int64_t h = 0; h < dim_; h += kSide) {
      Floats lines[kSide];
      for (int i = 0; i < kSide; ++i) lines[i] = Load(sums_ + row * dim_ + (h + i) * kSide) * share;
      Transpose(lines);
      for (int64_t i = 0; i < count; ++i) Store(job_.Out(row + i) + h, lines[i]);
    }
  }

  const Job& job_;
  const int64_t rows_, dim_;
  Panel panels_[kPanels];
  const uint16_t* zeros_;  // [2 * dim]
  uint32_t* queries_;  // [panel][dim / 2][row], of pairs, as all that tiles multiply
  uint32_t* keys_;     // [tile of keys][dim / 32][key][16]
  uint32_t* values_;   // [dim / 16][kAttendKeys / 32][dimension][16]
  uint32_t* weights_;  // of two panels: [kAttendKeys / 2][row]
  float* scores_;      // of two panels: [kAttendKeys][row]
  float* sums_;        // [panel][dim][row]
};

}  // namespace amx

#endif
