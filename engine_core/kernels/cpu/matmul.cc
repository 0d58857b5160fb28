// y[T, O] = x[T, K] @ w[O, K]^T in float32, w in float32 or bfloat16: few rows against weights that stream from memory.
//
// The outputs are split into blocks whose weights stay in a core's L2 cache; threads draw blocks from a counter. In a
// block, tiles of kRows x kCols outputs are summed along K in vector registers, kDepth at a time, so that a tile's rows
// of x stay in L1. Vectors of bfloat16 weights are read as 32-bit words, whose low and high halves are the even and odd
// places; x is put in the same order once per call.

#include <vector>

#include "common.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kCols = kLanes == 16 ? 6 : 3;  // with kRows, as many sums as there are vector registers for them
constexpr int kRows = 4;
constexpr int64_t kDepth = 1024;
constexpr int64_t kBlock = 48;  // outputs, a multiple of kCols

template <int R, int C>
void Accumulate(const float* x, const float* w, int64_t stride, int64_t depth, Floats (&sums)[R][C]) {
  for (int64_t k = 0; k < depth; k += kLanes) {
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

template <class W>
void Run(ffi::ThreadPool& pool, const Product<W>& product) {
  int64_t threads = std::max<int64_t>(1, pool.num_threads());
  int64_t share = (product.width + 4 * threads - 1) / (4 * threads);  // a few blocks each, so that none waits long
  int64_t block = std::clamp<int64_t>((share + kCols - 1) / kCols * kCols, kCols, kBlock);
  ParallelFor(pool, (product.width + block - 1) / block, [product, block](int64_t i) {
    product.Block(i * block, std::min((i + 1) * block, product.width));
  });
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  int64_t rows = x.dimensions()[0], depth = x.dimensions()[1], width = w.dimensions()[0];
  if (w.dimensions()[1] != depth || depth % (2 * kLanes) || x.element_type() != w.element_type())
    return ffi::Error::InvalidArgument("matmul: shapes or dtypes do not fit");
  if (w.element_type() == ffi::F32) {
    Run(pool, Product<float>{x.typed_data<float>(), w.typed_data<float>(), y->typed_data(), rows, width, depth});
    return ffi::Error::Success();
  }
  if (w.element_type() != ffi::BF16) return ffi::Error::InvalidArgument("matmul: dtype must be float32 or bfloat16");
  static thread_local std::vector<float> ordered;
  ordered.resize(rows * depth);
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(x.untyped_data());
  for (int64_t i = 0; i < rows * depth; i += 2 * kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      ordered[i + lane] = Widen(bits[i + 2 * lane]);
      ordered[i + kLanes + lane] = Widen(bits[i + 2 * lane + 1]);
    }
  }
  const uint16_t* weights = reinterpret_cast<const uint16_t*>(w.untyped_data());
  Run(pool, Product<uint16_t>{ordered.data(), weights, y->typed_data(), rows, width, depth});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(BatonMatmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
