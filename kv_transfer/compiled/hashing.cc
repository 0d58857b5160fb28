// Digests of blocks, while they are copied or where they lie: what `PlainDigester` (kv_transfer/digester.py) does by
// definition, in one pass over the bytes.
//
// A digest is XXH3 with 64 bits and its default secret (Collet, https://github.com/Cyan4973/xxHash, its specification),
// over a block's rows one behind the other, in the case of more than 240 bytes that are a multiple of 64: eight sums take
// in a stripe of 64 bytes at a time and are scrambled after every 16 stripes; the last stripe has a key of its own.

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int kStripe = 64, kRound = 16;  // bytes; stripes between scrambles
constexpr uint64_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F, kPrime64_3 = 0x165667B19E3779F9,
                   kPrime64_4 = 0x85EBCA77C2B2AE63, kPrime64_5 = 0x27D4EB2F165667C5;
constexpr uint64_t kAvalanche = 0x165667919E3779F9;

// Where keys lie in the secret.
constexpr int kScrambleKey = 128, kLastKey = 121, kMergeKey = 11;
alignas(64) constexpr uint8_t kSecret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

// What becomes of the bytes besides their digest.
enum class Write { kNot, kCached, kStreamed };

inline uint64_t Load(const uint8_t* at) {
  uint64_t value;
  memcpy(&value, at, sizeof value);
  return value;
}

constexpr uint64_t kStart[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                                kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};

#ifdef __AVX512F__
// A whole line at a time. The constants are those of a Sapphire Rapids (docs/adr/0017).
struct Sums {
  static constexpr int kTogether = 4, kTogetherStreamed = 4, kKeptStreamed = 3;  // see Group
  static constexpr bool kPrefersStreams = true;

  using Vector = __m512i;
  Vector sum;

  void Start() { sum = _mm512_loadu_si512(kStart); }

  void Store(uint64_t (&values)[8]) const { _mm512_storeu_si512(values, sum); }

  template <Write kWrite>
  inline void Take(const uint8_t* from, uint8_t* to, const uint8_t* secret) {
    const __m512i in = _mm512_loadu_si512(from);
    if (kWrite == Write::kCached) _mm512_storeu_si512(to, in);
    if (kWrite == Write::kStreamed) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), in);
    const __m512i keyed = _mm512_xor_si512(in, _mm512_loadu_si512(secret));
    const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    const __m512i swapped = _mm512_shuffle_epi32(in, static_cast<_MM_PERM_ENUM>(_MM_SHUFFLE(1, 0, 3, 2)));
    sum = _mm512_add_epi64(product, _mm512_add_epi64(sum, swapped));
  }

  inline void Scramble() {
    const __m512i prime = _mm512_set1_epi64(kPrime32_1), key = _mm512_loadu_si512(kSecret + kScrambleKey);
    const __m512i mixed = _mm512_xor_si512(_mm512_xor_si512(sum, _mm512_srli_epi64(sum, 47)), key);
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(mixed, 32), prime);
    sum = _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), _mm512_slli_epi64(high, 32));
  }
};
#elif defined(__AVX2__)
struct Sums {
  // One is streamed at a time: there are few buffers for lines that are half written.
  static constexpr int kTogether = 2, kTogetherStreamed = 1, kKeptStreamed = 0;
  static constexpr bool kPrefersStreams = false;

  using Vector = __m256i;
  Vector half[2];

  void Start() {
    for (int i = 0; i < 2; ++i) half[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kStart + 4 * i));
  }

  void Store(uint64_t (&values)[8]) const {
    for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + 4 * i), half[i]);
  }

  template <Write kWrite>
  inline void Take(const uint8_t* from, uint8_t* to, const uint8_t* secret) {
    for (int i = 0; i < 2; ++i) {
      const __m256i in = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + i);
      if (kWrite == Write::kCached) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + i, in);
      if (kWrite == Write::kStreamed) _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + i, in);
      const __m256i keyed = _mm256_xor_si256(in, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret) + i));
      const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
      const __m256i swapped = _mm256_shuffle_epi32(in, _MM_SHUFFLE(1, 0, 3, 2));
      half[i] = _mm256_add_epi64(product, _mm256_add_epi64(half[i], swapped));
    }
  }

  inline void Scramble() {
    const __m256i prime = _mm256_set1_epi64x(kPrime32_1);
    for (int i = 0; i < 2; ++i) {
      const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kSecret + kScrambleKey) + i);
      const __m256i mixed = _mm256_xor_si256(_mm256_xor_si256(half[i], _mm256_srli_epi64(half[i], 47)), key);
      const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
      half[i] = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
    }
  }
};
#else
struct Sums {
  static constexpr int kTogether = 2, kTogetherStreamed = 1, kKeptStreamed = 0;
  static constexpr bool kPrefersStreams = false;

  uint64_t sum[8];

  void Start() { memcpy(sum, kStart, sizeof sum); }

  void Store(uint64_t (&values)[8]) const { memcpy(values, sum, sizeof sum); }

  template <Write kWrite>
  inline void Take(const uint8_t* from, uint8_t* to, const uint8_t* secret) {
    uint64_t in[8];
    memcpy(in, from, kStripe);
    if (kWrite != Write::kNot) memcpy(to, in, kStripe);
    for (int i = 0; i < 8; ++i) {
      const uint64_t keyed = in[i] ^ Load(secret + 8 * i);
      sum[i] += in[i ^ 1] + (keyed & 0xffffffff) * (keyed >> 32);
    }
  }

  inline void Scramble() {
    for (int i = 0; i < 8; ++i) {
      sum[i] = (sum[i] ^ sum[i] >> 47 ^ Load(kSecret + kScrambleKey + 8 * i)) * kPrime32_1;
    }
  }
};
#endif

#ifdef __AVX2__
inline bool CanStream(const uint8_t* to, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(stride)) % sizeof(Sums::Vector) == 0;
}
inline void EndStream() { _mm_sfence(); }
#else
inline bool CanStream(const uint8_t*, int64_t) { return false; }
inline void EndStream() {}
#endif

inline uint64_t Fold(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t Merge(const uint64_t (&values)[8], uint64_t num_bytes) {
  uint64_t found = num_bytes * kPrime64_1;
  for (int i = 0; i < 8; i += 2) {
    found += Fold(values[i] ^ Load(kSecret + kMergeKey + 8 * i), values[i + 1] ^ Load(kSecret + kMergeKey + 8 * i + 8));
  }
  found = (found ^ found >> 37) * kAvalanche;
  return found ^ found >> 32;
}

// `kTogether` blocks that are taken in side by side: memory has more to do at a time than with one.
template <Write kWrite, int kTogether>
struct Group {
  static constexpr int kAhead = kWrite == Write::kStreamed ? 2048 : 1024;  // bytes called before they are needed
  static constexpr int kKept = kWrite == Write::kStreamed ? Sums::kKeptStreamed : 3;  // in which caches: 3 is all

  Sums sums[kTogether];
  const uint8_t* from[kTogether];
  uint8_t* to[kTogether];

  // Takes in the next stripe of each.
  inline void Take(const uint8_t* secret) {
    for (int i = 0; i < kTogether; ++i) {
      __builtin_prefetch(from[i] + kAhead, 0, kKept);
      sums[i].template Take<kWrite>(from[i], to[i], secret);
      from[i] += kStripe;
      if (kWrite != Write::kNot) to[i] += kStripe;
    }
  }

  // Takes in `count` stripes, of which the first is number `position` of its round; returns the next one's.
  inline int TakeRow(int position, int64_t count) {
    while (count) {
      const int run = count < kRound - position ? static_cast<int>(count) : kRound - position;
      for (int i = 0; i < run; ++i) Take(kSecret + 8 * (position + i));
      count -= run;
      position += run;
      if (position == kRound) {
        for (Sums& each : sums) each.Scramble();
        position = 0;
      }
    }
    return position;
  }
};

struct Rows {
  const uint8_t* const* sources;
  int64_t source_stride;
  uint8_t* const* targets;
  int64_t target_stride, num_layers, layer_bytes;
};

template <Write kWrite, int kTogether>
void TakeBlocks(const Rows& rows, const int64_t* places, int64_t first, uint64_t* found) {
  Group<kWrite, kTogether> group;
  for (Sums& each : group.sums) each.Start();
  int position = 0;
  for (int64_t layer = 0; layer < rows.num_layers; ++layer) {
    for (int i = 0; i < kTogether; ++i) {
      group.from[i] = rows.sources[layer] + places[first + i] * rows.source_stride;
      if (kWrite != Write::kNot) group.to[i] = rows.targets[layer] + (first + i) * rows.target_stride;
    }
    const bool is_last = layer == rows.num_layers - 1;
    position = group.TakeRow(position, rows.layer_bytes / kStripe - is_last);
    if (is_last) group.Take(kSecret + kLastKey);
  }
  for (int i = 0; i < kTogether; ++i) {
    uint64_t values[8];  // a copy: were the address of the sums known elsewhere, every write could change them
    group.sums[i].Store(values);
    found[first + i] = Merge(values, rows.num_layers * rows.layer_bytes);
  }
}

template <Write kWrite, int kTogether>
void TakeAll(const Rows& rows, const int64_t* places, int64_t n, uint64_t* found) {
  int64_t i = 0;
  for (; i + kTogether <= n; i += kTogether) TakeBlocks<kWrite, kTogether>(rows, places, i, found);
  for (; i < n; ++i) TakeBlocks<kWrite, 1>(rows, places, i, found);
}

}  // namespace

// Digests, and copies where there are targets, `n` blocks: number places[i] of the sources to number i of the targets.
//
// sources, targets: of each layer the address of block 0's row, `layer_bytes` long, a multiple of 64; that of block b is
// b strides further. A block has more than 240 bytes.
// targets: null: nothing is copied.
// streams: whether targets are written past the caches, for somebody who reads them later than the caches would keep them.
extern "C" void BatonDigest(const uint8_t* const* sources, int64_t source_stride, uint8_t* const* targets,
                            int64_t target_stride, int64_t num_layers, int64_t layer_bytes, const int64_t* places,
                            int64_t n, bool streams, uint64_t* found) {
  const Rows rows{sources, source_stride, targets, target_stride, num_layers, layer_bytes};
  if (!targets) return TakeAll<Write::kNot, Sums::kTogether>(rows, places, n, found);
  for (int64_t layer = 0; layer < num_layers; ++layer) streams = streams && CanStream(targets[layer], target_stride);
  if (!streams) return TakeAll<Write::kCached, Sums::kTogether>(rows, places, n, found);
  TakeAll<Write::kStreamed, Sums::kTogetherStreamed>(rows, places, n, found);
  EndStream();
}

// Whether copies past the caches cost so much less that they are better for a reader that comes at once, too.
extern "C" bool BatonPrefersStreams() { return Sums::kPrefersStreams; }
