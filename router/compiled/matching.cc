// The lookup of a chain of blocks in the tables of `block_table.py`, all workers at once.
//
// Memory is read at random places, so that waiting for it is what a lookup costs: some blocks ahead, first the buckets are
// called for, then the words of the slots found.

#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kBucket = 8;
constexpr int64_t kAhead = 32;
constexpr int kMaxTables = 2;

// What `matching.py` writes, all of it words of 64 bits: these, a mask of the workers' columns for each word of the bitmaps,
// and for each table its keys, the number of its buckets, and, for each word and within it for each plane, the bits (null
// where there are none). Planes are tiers first, then predictions.
struct Index {
  uint64_t num_tables, num_words, num_planes, num_tiers;

  const uint64_t* Masks() const { return reinterpret_cast<const uint64_t*>(this + 1); }
  const uint64_t* Table(uint64_t number) const {
    return Masks() + num_words + number * (2 + num_words * num_planes);
  }
};

struct Buckets {
  const uint64_t* first;
  const uint64_t* second;
};

Buckets BucketsOf(const uint64_t* table, uint64_t key) {
  const uint64_t* keys = reinterpret_cast<const uint64_t*>(table[0]);
  const uint64_t num_buckets = table[1];
  return {keys + ((key & 0xffffffff) * num_buckets >> 32) * kBucket, keys + ((key >> 32) * num_buckets >> 32) * kBucket};
}

int64_t Find(const uint64_t* bucket, uint64_t key) {
  for (int64_t i = 0; i < kBucket; ++i) {
    if (bucket[i] == key) return i;
  }
  return -1;
}

// The slot of a key, -1 where it is absent.
int64_t Locate(const uint64_t* table, uint64_t key) {
  const uint64_t* keys = reinterpret_cast<const uint64_t*>(table[0]);
  const Buckets buckets = BucketsOf(table, key);
  for (const uint64_t* bucket : {buckets.first, buckets.second}) {
    const int64_t at = Find(bucket, key);
    if (at >= 0) return bucket - keys + at;
  }
  return -1;
}

uint64_t Key(uint64_t key) { return key ? key : 1; }  // 0 marks free slots

// Enters the columns of a word that hold `depth` blocks, with how many of them are no prediction.
void Enter(uint64_t columns, uint64_t word, int64_t depth, const int64_t* told, int64_t*& out) {
  if (!depth) return;
  for (; columns; columns &= columns - 1) {
    const uint64_t column = 64 * word + __builtin_ctzll(columns);
    *out++ = column;
    *out++ = depth;
    *out++ = told[column];
  }
}

}  // namespace

// Writes (column, leading blocks, of these those that are no prediction) of each column that holds any to `found`, and
// returns how many there are.
extern "C" int64_t BatonMatch(const uint64_t* chain, int64_t num_blocks, const Index* index, int64_t* found) {
  const uint64_t num_words = index->num_words, num_planes = index->num_planes;
  const uint64_t num_tiers = index->num_tiers;
  std::vector<uint64_t> alive(index->Masks(), index->Masks() + num_words);  // columns that have every block so far
  std::vector<uint64_t> telling(alive);  // those of them of which none is a prediction
  std::vector<int64_t> told(64 * num_words);
  int64_t* out = found;
  for (int64_t start = 0; start < num_blocks; start += kAhead) {
    const int64_t count = num_blocks - start < kAhead ? num_blocks - start : kAhead;
    int64_t slots[kMaxTables][kAhead];
    for (uint64_t t = 0; t < index->num_tables; ++t) {
      for (int64_t i = 0; i < count; ++i) {
        const Buckets buckets = BucketsOf(index->Table(t), Key(chain[start + i]));
        for (const uint64_t* bucket : {buckets.first, buckets.second}) {
          __builtin_prefetch(bucket);
          __builtin_prefetch(bucket + kBucket - 1);
        }
      }
    }
    for (uint64_t t = 0; t < index->num_tables; ++t) {
      const uint64_t* table = index->Table(t);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t slot = slots[t][i] = Locate(table, Key(chain[start + i]));
        if (slot < 0) continue;
        for (uint64_t at = 0; at < num_words * num_planes; ++at) {
          const uint64_t* bits = reinterpret_cast<const uint64_t*>(table[2 + at]);
          if (bits) __builtin_prefetch(bits + slot);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      uint64_t any = 0;
      for (uint64_t word = 0; word < num_words; ++word) {
        if (!alive[word]) continue;
        uint64_t held = 0, said = 0;
        for (uint64_t t = 0; t < index->num_tables; ++t) {
          if (slots[t][i] < 0) continue;
          const uint64_t* planes = index->Table(t) + 2 + word * num_planes;
          for (uint64_t plane = 0; plane < num_planes; ++plane) {
            const uint64_t* bits = reinterpret_cast<const uint64_t*>(planes[plane]);
            if (!bits) continue;
            held |= bits[slots[t][i]];
            if (plane < num_tiers) said |= bits[slots[t][i]];
          }
        }
        for (uint64_t ended = telling[word] & ~said; ended; ended &= ended - 1) {
          told[64 * word + __builtin_ctzll(ended)] = start + i;
        }
        telling[word] &= said;
        Enter(alive[word] & ~held, word, start + i, told.data(), out);
        alive[word] &= held;
        any |= alive[word];
      }
      if (!any) return (out - found) / 3;
    }
  }
  for (uint64_t word = 0; word < num_words; ++word) {
    for (uint64_t left = telling[word]; left; left &= left - 1) {
      told[64 * word + __builtin_ctzll(left)] = num_blocks;
    }
    Enter(alive[word], word, num_blocks, told.data(), out);
  }
  return (out - found) / 3;
}
