// Causal attention of packed query rows over the pages of their sequences: see kernels/paged_attention/api.py.
//
// A work item is a tile of query tokens of one sequence with one KV head: kMaxRows rows (tokens x query heads of the
// group) at most. It goes through the cache kKeys tokens at a time, from position 0 or a multiple of kKeys: keys and
// values are widened to float32 once for the tile, then scores, an online softmax and the weighted sum follow in
// registers and L1. A row's operations are the same whatever its neighbours do. Where the processor has AMX, its tiles
// take items with many bfloat16 rows (amx_attention.h), which are larger then.

#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "amx_attention.h"
#include "common.h"
#include "exp.h"
#include "transpose.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kKeys = 64;
constexpr int kMaxRows = 60;
constexpr int kTileRows = 6;  // rows summed at once, with kTileVectors as many sums as registers hold; 2 where few are left
constexpr int kTailRows = 2;
constexpr int kTileVectors = 2;

float Get(float value) { return value; }
float Get(uint16_t bits) { return Widen(bits); }

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

// An item's rows with one KV head.
template <class S>
struct Job {
  Cache<S> cache;
  const S* q;  // [T, N, H]
  S* out;
  const int32_t* pages;
  Item item;
  int64_t head, window;
  float scale;

  int64_t dim() const { return cache.sizes.dim; }
  int64_t rows() const { return item.count * cache.sizes.group(); }
  const S* Query(int64_t row) const { return q + Offset(row); }
  S* Out(int64_t row) const { return out + Offset(row); }
  const S* Key(int64_t place) const { return cache.Token(pages, head, place); }

  // Keys that a row sees.
  int64_t Begin(int64_t row) const { return window ? std::max<int64_t>(0, End(row) - window) : 0; }
  int64_t End(int64_t row) const { return item.place + row / cache.sizes.group() + 1; }

  int64_t Offset(int64_t row) const {
    const int64_t group = cache.sizes.group();
    return ((item.begin + row / group) * cache.sizes.heads + head * group + row % group) * dim();
  }

#ifdef __AMX_BF16__
  static bool HasTiles() { return std::is_same_v<S, uint16_t> && amx::Allowed(); }
  static int64_t MaxRows() { return HasTiles() ? amx::kAttendMost : kMaxRows; }

  void Run() const {
    if constexpr (std::is_same_v<S, uint16_t>)
      if (rows() >= amx::kAttendLeast && HasTiles()) return amx::Attending<Job>(*this).Run();
    RunVectors();
  }
#else
  static int64_t MaxRows() { return kMaxRows; }
  void Run() const { RunVectors(); }
#endif

  void RunVectors() const {
    static thread_local Tile tile;
    const int64_t dim = this->dim(), rows = this->rows();
    tile.Clear(rows, dim);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t h = 0; h < dim; ++h) tile.queries[row * dim + h] = Get(Query(row)[h]) * scale;
    const int64_t lowest = Begin(0), end = End(rows - 1);
    for (int64_t block = lowest / kKeys * kKeys; block < end; block += kKeys) {
      int64_t first = std::max(lowest, block), count = std::min<int64_t>(block + kKeys, end) - first;
      int64_t skipped = first - block;
      std::fill(tile.values.begin(), tile.values.begin() + skipped * dim, 0.0f);
      cache.Read(pages, head, first, count, &tile.keys[skipped], &tile.values[skipped * dim]);
      tile.Scores(rows, dim);
      for (int64_t row = 0; row < rows; ++row) tile.Softmax(row, dim, Begin(row) - block, End(row) - block);
      tile.AddValues(rows, dim, skipped + count);
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t h = 0; h < dim; h += kLanes) Store(Out(row) + h, Load(&tile.out[row * dim + h]) / tile.total[row]);
  }
};

std::vector<Item> Items(const int32_t* kv_lens, const int32_t* cu_q_lens, int64_t sequences, int64_t tokens, int64_t group,
                        int64_t max_rows) {
  std::vector<Item> items;
  int64_t step = std::max<int64_t>(1, max_rows / group);
  for (int64_t b = 0; b < sequences; ++b) {
    bool decode = tokens == sequences;
    int64_t begin = decode ? b : cu_q_lens[b], end = decode ? b + (kv_lens[b] > 0) : cu_q_lens[b + 1];
    for (int64_t at = begin; at < end; at += step)
      items.push_back({b, at, std::min(step, end - at), kv_lens[b] - end + at});
  }
  return items;
}

// job: all but the item, its pages and the head.
template <class S>
void RunAll(ffi::ThreadPool& pool, const Job<S>& job, const int32_t* table, std::vector<Item> items) {
  int64_t kv_heads = job.cache.sizes.kv_heads;
  int64_t count = static_cast<int64_t>(items.size()) * kv_heads;
  if (count == 0) return;
  ParallelFor(pool, count, [job, table, kv_heads, items = std::move(items)](int64_t i) {
    Job<S> own = job;
    own.item = items[i / kv_heads];
    own.head = i % kv_heads;
    own.pages = table + own.item.sequence * job.cache.sizes.table_width;
    own.Run();
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
  std::memset(out->untyped_data(), 0, out->size_bytes());
  int64_t seen = *window.typed_data();
  auto run = [&](auto zero) {
    using S = decltype(zero);
    auto at = [](void* p) { return reinterpret_cast<S*>(p); };
    auto items = Items(kv_lens.typed_data(), cu_q_lens.typed_data(), kv_lens.dimensions()[0], shape[0], sizes.group(),
                       Job<S>::MaxRows());
    Cache<S> held{at(cache.untyped_data()), sizes};
    const Job<S> job{held, at(q.untyped_data()), at(out->untyped_data()), nullptr, {}, 0, seen, scale};
    RunAll(pool, job, table.typed_data(), std::move(items));
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
