// Causal attention of packed query rows over the pages of their sequences: see kernels/paged_attention/api.py.
//
// A work item is a tile of query tokens of one sequence with one KV head: kMaxRows rows (tokens x query heads of the
// group) at most. It goes through the cache kKeys tokens at a time, from position 0 or a multiple of kKeys: keys and
// values are widened to float32 once for the tile, then scores, an online softmax and the weighted sum follow in
// registers and L1. A row's operations are the same whatever its neighbours do.

#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"
#include "transpose.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kKeys = 64;
constexpr int kMaxRows = 60;
constexpr int kTileRows = 6;  // rows summed at once, with kTileVectors as many sums as registers hold; 2 where few are left
constexpr int kTailRows = 2;
constexpr int kTileVectors = 2;
constexpr float kMasked = -1e30f;
constexpr float kLowest = -1e29f;  // far above a masked score, whose weight is therefore 0 and not exp(0)

// e^x for x <= 0, 2 ulp; 0 below -87. With x = n ln 2 + r, |r| <= ln 2 / 2: a Taylor polynomial in r, times 2^n.
Floats Exp(Floats x) {
  Floats floor = x < -87.0f ? x - x - 87.0f : x;
  Floats shifted = floor * 1.44269504f - 0.5f;
  Ints n = __builtin_convertvector(shifted, Ints);  // towards zero: to the nearest for what is negative
  Floats whole = __builtin_convertvector(n, Floats);
  Floats r = floor - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  Floats p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Floats power = reinterpret_cast<Floats>((n + 127) << 23);
  Floats result = p * power;
  return x < -87.0f ? result - result : result;
}

float Get(float value) { return value; }
float Get(uint16_t bits) { return Widen(bits); }
void Set(float* to, float value) { *to = value; }
void Set(uint16_t* to, float value) {  // to the nearest, ties to even
  uint32_t word;
  __builtin_memcpy(&word, &value, sizeof(word));
  *to = static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

struct Sizes {
  int64_t heads, kv_heads, dim, page_size, table_width;
  int64_t group() const { return heads / kv_heads; }
};

template <class S>
struct Cache {
  const S* values;  // [pages, page_size, 2K, H]: K0, V0, K1, V1, ...
  Sizes sizes;

  // Keys and values of tokens [begin, begin + count) of one head, widened: keys [H, kKeys], values [count, H].
  void Read(const int32_t* pages, int64_t head, int64_t begin, int64_t count, float* keys, float* vals) const {
    const int64_t dim = sizes.dim;
    for (int64_t first = 0; first < count; first += kLanes) {
      const int64_t some = std::min<int64_t>(kLanes, count - first);
      const S* from[kLanes];
      for (int64_t i = 0; i < some; ++i) from[i] = Token(pages, head, begin + first + i);
      for (int64_t h = 0; h < dim; h += kLanes) {
        Floats lines[kLanes] = {};
        for (int64_t i = 0; i < some; ++i) lines[i] = Widened(from[i] + h);
        Transpose(lines);
        for (int j = 0; j < kLanes; ++j) {
          float* to = keys + (h + j) * kKeys + first;
          if (some == kLanes) Store(to, lines[j]);
          else std::memcpy(to, &lines[j], some * sizeof(float));
        }
      }
      for (int64_t i = 0; i < some; ++i)
        for (int64_t h = 0; h < dim; h += kLanes) Store(vals + (first + i) * dim + h, Widened(from[i] + dim + h));
    }
  }

  // Its key, behind which its value lies.
  const S* Token(const int32_t* pages, int64_t head, int64_t place) const {
    const int64_t at = int64_t{pages[place / sizes.page_size]} * sizes.page_size + place % sizes.page_size;
    return values + (at * 2 * sizes.kv_heads + 2 * head) * sizes.dim;
  }

  static Floats Widened(const S* from) {
    Floats wide;
    for (int i = 0; i < kLanes; ++i) wide[i] = Get(from[i]);
    return wide;
  }
};

// One tile's memory: fits L1 and L2 for the usual head sizes.
struct Tile {
  std::vector<float> queries, keys, values, weights, out;
  float top[kMaxRows], total[kMaxRows];

  void Clear(int64_t rows, int64_t dim) {
    int64_t room = kMaxRows + kTailRows, used = rows + kTailRows;
    queries.resize(room * dim);
    out.resize(room * dim);
    weights.resize(room * kKeys);
    keys.resize(kKeys * dim);
    values.resize(kKeys * dim);
    std::fill_n(queries.begin(), used * dim, 0.0f);
    std::fill_n(out.begin(), used * dim, 0.0f);
    std::fill_n(top, rows, kLowest);
    std::fill_n(total, rows, 0.0f);
  }

  // sums[r][c] += a[r, i] * b[i, vector c] for i < count: a row by row, b vector by vector.
  template <int R>
  static void Multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count,
                       Floats (&sums)[R][kTileVectors]) {
    for (int64_t i = 0; i < count; ++i) {
      Floats v[kTileVectors];
      for (int c = 0; c < kTileVectors; ++c) v[c] = Load(b + i * b_stride + c * kLanes);
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < kTileVectors; ++c) sums[r][c] += a[r * a_stride + i] * v[c];
    }
  }

  template <int R>
  void ScoreRows(int64_t row, int64_t dim) {
    for (int64_t key = 0; key < kKeys; key += kTileVectors * kLanes) {
      Floats sums[R][kTileVectors] = {};
      Multiply<R>(&queries[row * dim], dim, &keys[key], kKeys, dim, sums);
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < kTileVectors; ++c) Store(&weights[(row + r) * kKeys + key + c * kLanes], sums[r][c]);
    }
  }

  template <int R>
  void AddRows(int64_t row, int64_t dim, int64_t count) {
    for (int64_t h = 0; h < dim; h += kTileVectors * kLanes) {
      Floats sums[R][kTileVectors];
      float* at = &out[row * dim + h];
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < kTileVectors; ++c) sums[r][c] = Load(at + r * dim + c * kLanes);
      Multiply<R>(&weights[row * kKeys], kKeys, &values[h], dim, count, sums);
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < kTileVectors; ++c) Store(at + r * dim + c * kLanes, sums[r][c]);
    }
  }

  void Scores(int64_t rows, int64_t dim) {
    int64_t row = 0;
    for (; row + kTileRows <= rows; row += kTileRows) ScoreRows<kTileRows>(row, dim);
    for (; row < rows; row += kTailRows) ScoreRows<kTailRows>(row, dim);
  }

  void AddValues(int64_t rows, int64_t dim, int64_t count) {
    int64_t row = 0;
    for (; row + kTileRows <= rows; row += kTileRows) AddRows<kTileRows>(row, dim, count);
    for (; row < rows; row += kTailRows) AddRows<kTailRows>(row, dim, count);
  }

  // Scores of one row become weights; keys outside [first, last) of this block count nothing.
  void Softmax(int64_t row, int64_t dim, int64_t first, int64_t last) {
    float* w = &weights[row * kKeys];
    for (int64_t c = 0; c < kKeys; ++c) w[c] = c >= first && c < last ? w[c] : kMasked;
    Floats highest = Load(w);
    for (int64_t c = kLanes; c < kKeys; c += kLanes) {
      Floats v = Load(w + c);
      highest = v > highest ? v : highest;
    }
    float now = top[row];
    for (int i = 0; i < kLanes; ++i) now = std::max(now, highest[i]);
    Floats sums = {};
    for (int64_t c = 0; c < kKeys; c += kLanes) {
      Floats e = Exp(Load(w + c) - now);
      Store(w + c, e);
      sums += e;
    }
    float decay = std::exp(top[row] - now);
    total[row] = total[row] * decay + Sum(sums);
    top[row] = now;
    if (decay != 1.0f)
      for (int64_t h = 0; h < dim; h += kLanes) Store(&out[row * dim + h], Load(&out[row * dim + h]) * decay);
  }
};

struct Item {
  int64_t sequence, begin, count, place;  // query tokens [begin, begin + count) of the step; position of the first
};

template <class S>
struct Attention {
  Cache<S> cache;
  const S* q;  // [T, N, H]
  S* out;
  const int32_t* table;
  int64_t window;
  float scale;

  void Run(const Item& item, int64_t head) const {
    static thread_local Tile tile;
    const Sizes& sizes = cache.sizes;
    int64_t dim = sizes.dim, group = sizes.group(), rows = item.count * group;
    tile.Clear(rows, dim);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t h = 0; h < dim; ++h) tile.queries[row * dim + h] = Get(q[Offset(item, head, row) + h]) * scale;
    int64_t lowest = window ? std::max<int64_t>(0, item.place - window + 1) : 0;
    int64_t end = item.place + item.count;
    for (int64_t block = lowest / kKeys * kKeys; block < end; block += kKeys) {
      int64_t first = std::max(lowest, block), count = std::min<int64_t>(block + kKeys, end) - first;
      const int32_t* pages = table + item.sequence * sizes.table_width;
      int64_t skipped = first - block;
      std::fill(tile.values.begin(), tile.values.begin() + skipped * dim, 0.0f);
      cache.Read(pages, head, first, count, &tile.keys[skipped], &tile.values[skipped * dim]);
      tile.Scores(rows, dim);
      for (int64_t row = 0; row < rows; ++row) {
        int64_t place = item.place + row / group;
        int64_t begin = window ? std::max<int64_t>(0, place - window + 1) : 0;
        tile.Softmax(row, dim, begin - block, place + 1 - block);
      }
      tile.AddValues(rows, dim, skipped + count);
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t h = 0; h < dim; ++h) Set(&out[Offset(item, head, row) + h], tile.out[row * dim + h] / tile.total[row]);
  }

  int64_t Offset(const Item& item, int64_t head, int64_t row) const {
    int64_t group = cache.sizes.group();
    return ((item.begin + row / group) * cache.sizes.heads + head * group + row % group) * cache.sizes.dim;
  }
};

std::vector<Item> Items(const int32_t* kv_lens, const int32_t* cu_q_lens, int64_t sequences, int64_t tokens, int64_t group) {
  std::vector<Item> items;
  int64_t step = std::max<int64_t>(1, kMaxRows / group);
  for (int64_t b = 0; b < sequences; ++b) {
    bool decode = tokens == sequences;
    int64_t begin = decode ? b : cu_q_lens[b], end = decode ? b + (kv_lens[b] > 0) : cu_q_lens[b + 1];
    for (int64_t at = begin; at < end; at += step)
      items.push_back({b, at, std::min(step, end - at), kv_lens[b] - end + at});
  }
  return items;
}

template <class S>
void RunAll(ffi::ThreadPool& pool, const Attention<S>& attention, std::vector<Item> items) {
  int64_t kv_heads = attention.cache.sizes.kv_heads;
  int64_t count = static_cast<int64_t>(items.size()) * kv_heads;
  if (count == 0) return;
  ParallelFor(pool, count, [attention, kv_heads, items = std::move(items)](int64_t i) {
    attention.Run(items[i / kv_heads], i % kv_heads);
  });
}

using I32 = ffi::Buffer<ffi::S32>;

ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer cache, I32 kv_lens, I32 table, I32 cu_q_lens,
                  I32 window, ffi::Result<ffi::AnyBuffer> out, float scale) {
  auto shape = q.dimensions();
  auto pages = cache.dimensions();
  Sizes sizes{shape[1], pages[2] * pages[3] / 2, shape[2], pages[1], table.dimensions()[1]};
  if (pages[4] != sizes.dim || sizes.dim % (kTileVectors * kLanes) || sizes.heads % sizes.kv_heads ||
      sizes.group() > kMaxRows)
    return ffi::Error::InvalidArgument("attention: head sizes do not fit");
  auto items = Items(kv_lens.typed_data(), cu_q_lens.typed_data(), kv_lens.dimensions()[0], shape[0], sizes.group());
  std::memset(out->untyped_data(), 0, out->size_bytes());
  int64_t seen = *window.typed_data();
  auto run = [&](auto zero) {
    using S = decltype(zero);
    auto at = [](void* p) { return reinterpret_cast<S*>(p); };
    Cache<S> held{at(cache.untyped_data()), sizes};
    RunAll(pool, Attention<S>{held, at(q.untyped_data()), at(out->untyped_data()), table.typed_data(), seen, scale}, items);
  };
  if (q.element_type() == ffi::F32 && cache.element_type() == ffi::F32) run(float{});
  else if (q.element_type() == ffi::BF16 && cache.element_type() == ffi::U16) run(uint16_t{});
  else return ffi::Error::InvalidArgument("attention: dtypes do not fit");
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(BatonAttention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale"));
