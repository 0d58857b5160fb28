// y[T, O] = x[T, K] @ w[O, K]^T in float32; x and w in float32 or bfloat16, x no narrower than w.
//
// The outputs are split into blocks whose weights stay in a core's L2 cache; threads draw blocks from a counter.
//
// Up to kFewRows rows, the time is that of streaming the weights: tiles of kRows x kCols outputs are summed along K in
// vector registers, kDepth at a time, so that a tile's rows of x stay in L1. Meanwhile the next tile's weights are
// fetched: pieces of kDepth are too short for the hardware to see a stream in them. Vectors of bfloat16 weights are read as
// 32-bit words, whose low and high halves are the even and odd places; x is put in the same order once per call.
//
// With more rows it is that of the arithmetic: x is packed so that a vector holds the same place of kLanes rows, and
// each weight is multiplied with two such vectors, kPanelDepth places at a time. bfloat16 weights of a block are widened
// once for all panels. Where the processor has AMX, its tiles do all products with bfloat16 weights (amx.h, of x in
// float32 amx_pieces.h).
//
// A row's operations are the same whatever the other rows hold.

#include <vector>

#include "amx_pieces.h"
#include "common.h"
#include "transpose.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kCols = kLanes == 16 ? 6 : 3;  // with kRows, as many sums as there are vector registers for them
constexpr int kRows = 4;
constexpr int64_t kDepth = 1024;
constexpr int64_t kBlock = 48;  // outputs, a multiple of kCols and kPanelCols
constexpr int64_t kFewRows = kLanes, kFewRowsBf16 = 3 * kLanes;  // what is widened for panels must serve some of them
constexpr int64_t kPanelRows = 2 * kLanes;
constexpr int kPanelCols = kLanes == 16 ? 12 : 6;
constexpr int64_t kPanelDepth = 512;
constexpr int64_t kWidened = kPanelDepth + 16;  // between two outputs' weights: not in the same places of L1

template <int R, int C>
void Accumulate(const float* x, const float* w, int64_t stride, int64_t depth, Floats (&sums)[R][C]) {
  for (int64_t k = 0; k < depth; k += kLanes) {
    for (int c = 0; c < C; ++c) __builtin_prefetch(w + (C + c) * stride + k);
    Floats b[C];
    for (int c = 0; c < C; ++c) b[c] = Load(w + c * stride + k);
    for (int r = 0; r < R; ++r) {
      Floats a = Load(x + r * stride + k);
      for (int c = 0; c < C; ++c) sums[r][c] += a * b[c];
    }
  }
}

template <int R, int C>
void Accumulate(const float* x, const uint16_t* w, int64_t stride, int64_t depth, Floats (&sums)[R][C]) {
  for (int64_t k = 0; k < depth; k += 2 * kLanes) {
    for (int c = 0; c < C; ++c) __builtin_prefetch(w + (C + c) * stride + k);
    for (int half = 0; half < 2; ++half) {
      Floats b[C];
      for (int c = 0; c < C; ++c) {
        LooseWords pairs = Load(w + c * stride + k);
        b[c] = reinterpret_cast<Floats>(half ? pairs & 0xffff0000u : pairs << 16);
      }
      for (int r = 0; r < R; ++r) {
        Floats a = Load(x + r * stride + k + half * kLanes);
        for (int c = 0; c < C; ++c) sums[r][c] += a * b[c];
      }
    }
  }
}

template <class W>
struct Product {
  const float* x;  // [rows, depth]
  const W* w;      // [width, depth]
  float* y;        // [rows, width]
  int64_t rows, width, depth;

  template <int R, int C>
  void Tile(int64_t row, int64_t col, int64_t k) const {
    Floats sums[R][C] = {};
    int64_t span = std::min(kDepth, depth - k);
    Accumulate<R, C>(x + row * depth + k, w + col * depth + k, depth, span, sums);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) {
        float sum = Sum(sums[r][c]);
        float* out = y + (row + r) * width + col + c;
        *out = k ? *out + sum : sum;
      }
    }
  }

  template <int C>
  void Column(int64_t row, int64_t col, int64_t k) const {
    switch (std::min<int64_t>(kRows, rows - row)) {
      case 1: return Tile<1, C>(row, col, k);
      case 2: return Tile<2, C>(row, col, k);
      case 3: return Tile<3, C>(row, col, k);
      default: return Tile<kRows, C>(row, col, k);
    }
  }

  void Block(int64_t begin, int64_t end) const {
    for (int64_t k = 0; k < depth; k += kDepth) {
      for (int64_t row = 0; row < rows; row += kRows) {
        int64_t col = begin;
        for (; col + kCols <= end; col += kCols) Column<kCols>(row, col, k);
        for (; col < end; ++col) Column<1>(row, col, k);
      }
    }
  }
};

// Panel `number` of x[rows, depth], in float32: [K][kPanelRows], zeros where there are no more rows.
template <class X>
void Pack(const X* x, int64_t rows, int64_t depth, int64_t number, float* panels) {
  const int64_t begin = number * kPanelRows;
  float* to = panels + begin * depth;
  for (int64_t k = 0; k < depth; k += kLanes, to += kLanes * kPanelRows) {
    for (int64_t half = 0; half < kPanelRows; half += kLanes) {
      Floats lines[kLanes] = {};
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, rows - begin - half); ++i) {
        const X* from = x + (begin + half + i) * depth + k;
        for (int lane = 0; lane < kLanes; ++lane) lines[i][lane] = Widen(from[lane]);
      }
      Transpose(lines);
      for (int i = 0; i < kLanes; ++i) Store(to + i * kPanelRows + half, lines[i]);
    }
  }
}

// sums[c, row] += w[c, k] * x[k, row] for k < depth and each row of the panel x.
template <int C>
void AddTile(const float* x, const float* w, int64_t stride, int64_t depth, float* sums) {
  Floats tile[C][2] = {};
  for (int64_t k = 0; k < depth; ++k, x += kPanelRows) {
    Floats low = Load(x), high = Load(x + kLanes);
    for (int c = 0; c < C; ++c) {  // one weight at a time: more do not fit the registers beside the sums
      Floats weight = w[c * stride + k] - Floats{};
      tile[c][0] += weight * low;
      tile[c][1] += weight * high;
    }
  }
  for (int c = 0; c < C; ++c, sums += kPanelRows) {
    Store(sums, Load(sums) + tile[c][0]);
    Store(sums + kLanes, Load(sums + kLanes) + tile[c][1]);
  }
}

// Weights [count, span], stride apart.
struct Weights {
  const float* values;
  int64_t stride;
};

Weights InFloat(const float* w, int64_t depth, int64_t, int64_t) { return {w, depth}; }
Weights InFloat(const uint16_t* w, int64_t depth, int64_t count, int64_t span) {
  static thread_local std::vector<float> widened(kBlock * kWidened);
  for (int64_t c = 0; c < count; ++c)
    for (int64_t k = 0; k < span; ++k) widened[c * kWidened + k] = Widen(w[c * depth + k]);
  return {widened.data(), kWidened};
}

template <class W>
struct PanelProduct {
  const float* x;  // as packed
  const W* w;      // [width, depth]
  float* y;        // [rows, width]
  int64_t rows, width, depth;

  void Block(int64_t begin, int64_t end) const {
    static thread_local std::vector<float> sums;  // [panel][output][kPanelRows]
    int64_t count = end - begin;
    sums.assign((rows + kPanelRows - 1) / kPanelRows * kPanelRows * count, 0.0f);
    for (int64_t k = 0; k < depth; k += kPanelDepth) {
      int64_t span = std::min(kPanelDepth, depth - k);
      Weights weights = InFloat(w + begin * depth + k, depth, count, span);
      for (int64_t row = 0; row < rows; row += kPanelRows)
        AddPanel(x + row * depth + k * kPanelRows, weights, span, count, &sums[row * count]);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = &sums[row / kPanelRows * kPanelRows * count + row % kPanelRows];
      for (int64_t c = 0; c < count; ++c) y[row * width + begin + c] = from[c * kPanelRows];
    }
  }

  static void AddPanel(const float* x, Weights weights, int64_t span, int64_t count, float* sums) {
    auto [w, stride] = weights;
    int64_t c = 0;
    for (; c + kPanelCols <= count; c += kPanelCols)
      AddTile<kPanelCols>(x, w + c * stride, stride, span, sums + c * kPanelRows);
    for (; c < count; ++c) AddTile<1>(x, w + c * stride, stride, span, sums + c * kPanelRows);
  }
};

template <class P>
void Run(ffi::ThreadPool& pool, const P& product, int64_t cols, int64_t most = kBlock) {
  int64_t threads = std::max<int64_t>(1, pool.num_threads());
  int64_t share = (product.width + 4 * threads - 1) / (4 * threads);  // a few blocks each, so that none waits long
  int64_t block = std::clamp<int64_t>((share + cols - 1) / cols * cols, cols, most);
  ParallelFor(pool, (product.width + block - 1) / block, [product, block](int64_t i) {
    product.Block(i * block, std::min((i + 1) * block, product.width));
  });
}

template <class X, class W>
void RunPanels(ffi::ThreadPool& pool, const X* x, const W* w, float* y, int64_t rows, int64_t width, int64_t depth) {
  static thread_local std::vector<float> memory;
  const int64_t num_panels = (rows + kPanelRows - 1) / kPanelRows;
  memory.resize(num_panels * kPanelRows * depth);
  float* panels = memory.data();
  ParallelFor(pool, num_panels, [=](int64_t i) { Pack(x, rows, depth, i, panels); });
  Run(pool, PanelProduct<W>{panels, w, y, rows, width, depth}, kPanelCols);
}

#ifdef __AMX_BF16__
const uint32_t* PackTiles(ffi::ThreadPool& pool, const uint16_t* x, int64_t rows, int64_t depth) {
  static thread_local std::vector<uint32_t> memory;
  const int64_t num_panels = (rows + amx::kSide - 1) / amx::kSide;
  uint32_t* panels = amx::Room(memory, num_panels * amx::kSide * depth / 2);
  ParallelFor(pool, num_panels, [=](int64_t i) { amx::Pack(x, rows, depth, i, panels); });
  return panels;
}

void RunTiles(ffi::ThreadPool& pool, const uint16_t* x, const uint16_t* w, float* y, int64_t rows, int64_t width,
              int64_t depth) {
  const uint32_t* panels = PackTiles(pool, x, rows, depth);
  if (rows <= amx::kFewRows) Run(pool, amx::FewRows{panels, w, y, rows, width, depth}, amx::kOutputs, amx::kFewBlock);
  else Run(pool, amx::ManyRows{panels, w, y, nullptr, rows, width, depth}, amx::kOutputs, amx::kManyBlock);
}

void RunTiles(ffi::ThreadPool& pool, const float* x, const uint16_t* w, float* y, int64_t rows, int64_t width,
              int64_t depth) {
  static thread_local std::vector<uint32_t> memory;
  const amx::Pieces pieces{x, rows, depth};
  uint32_t* panels = amx::Room(memory, pieces.NumPanels() * pieces.Panel());
  ParallelFor(pool, pieces.NumPanels(), [=](int64_t i) { pieces.Pack(i, panels); });
  Run(pool, amx::PiecesProduct{panels, w, y, rows, width, depth, pieces}, amx::kOutputs,
      rows <= amx::kFewRows ? amx::kFewBlock : amx::kManyBlock);
}
#endif

// x in float32, even places of 2 kLanes before odd ones, as Product<uint16_t> takes them.
template <class X>
void Order(const X* x, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      to[i + lane] = Widen(x[i + 2 * lane]);
      to[i + kLanes + lane] = Widen(x[i + 2 * lane + 1]);
    }
  }
}

// Weights in bfloat16, x in float32 or bfloat16.
template <class X>
void RunNarrow(ffi::ThreadPool& pool, const X* x, const uint16_t* w, float* y, int64_t rows, int64_t width,
               int64_t depth) {
#ifdef __AMX_BF16__
  if (width % amx::kOutputs == 0 && amx::Allowed()) return RunTiles(pool, x, w, y, rows, width, depth);
#endif
  if (rows > kFewRowsBf16) return RunPanels(pool, x, w, y, rows, width, depth);
  static thread_local std::vector<float> ordered;
  ordered.resize(rows * depth);
  Order(x, rows * depth, ordered.data());
  Run(pool, Product<uint16_t>{ordered.data(), w, y, rows, width, depth}, kCols);
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  int64_t rows = x.dimensions()[0], depth = x.dimensions()[1], width = w.dimensions()[0];
  const bool wide_x = x.element_type() == ffi::F32, wide_w = w.element_type() == ffi::F32;
  if ((!wide_x && x.element_type() != ffi::BF16) || (!wide_w && w.element_type() != ffi::BF16) || (wide_w && !wide_x))
    return ffi::Error::InvalidArgument("matmul: dtypes must be float32 or bfloat16, x as wide as the weights at least");
  if (w.dimensions()[1] != depth || depth % (2 * kLanes))
    return ffi::Error::InvalidArgument("matmul: shapes do not fit");
  float* to = y->typed_data();
  if (wide_w) {
    const float *from = x.typed_data<float>(), *weights = w.typed_data<float>();
    if (rows <= kFewRows) Run(pool, Product<float>{from, weights, to, rows, width, depth}, kCols);
    else RunPanels(pool, from, weights, to, rows, width, depth);
    return ffi::Error::Success();
  }
  const uint16_t* weights = reinterpret_cast<const uint16_t*>(w.untyped_data());
  if (wide_x) RunNarrow(pool, x.typed_data<float>(), weights, to, rows, width, depth);
  else RunNarrow(pool, reinterpret_cast<const uint16_t*>(x.untyped_data()), weights, to, rows, width, depth);
  return ffi::Error::Success();
}

using Bits = ffi::Buffer<ffi::BF16>;

#ifdef __AMX_BF16__
ffi::Error Gated(ffi::ThreadPool pool, Bits x, Bits w, ffi::Result<Bits> y) {
  int64_t rows = x.dimensions()[0], depth = x.dimensions()[1], width = w.dimensions()[0] / 2;
  if (w.dimensions()[1] != depth || depth % amx::kPlaces || width % amx::kSide)
    return ffi::Error::InvalidArgument("gated: shapes do not fit");
  auto bits = [](Bits& any) { return reinterpret_cast<uint16_t*>(any.untyped_data()); };
  const uint32_t* panels = PackTiles(pool, bits(x), rows, depth);
  Run(pool, amx::ManyRows{panels, bits(w), nullptr, bits(*y), rows, width, depth}, amx::kSide, amx::kManyBlock / 2);
  return ffi::Error::Success();
}
#else
ffi::Error Gated(ffi::ThreadPool, Bits, Bits, ffi::Result<Bits>) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "gated: no tiles");
}
#endif

}  // namespace

// Whether there is a gated product.
extern "C" int BatonHasTiles() {
#ifdef __AMX_BF16__
  return amx::Allowed();
#else
  return 0;
#endif
}

// y[T, F] = silu(x @ gates^T) * (x @ others^T) in bfloat16, gates and others the halves of w[2F, D].
XLA_FFI_DEFINE_HANDLER_SYMBOL(BatonGated, Gated,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Bits>().Arg<Bits>().Ret<Bits>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(BatonMatmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
