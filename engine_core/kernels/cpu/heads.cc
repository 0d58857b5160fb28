// Queries, keys and values out of one product: heads are normed (where a model does so), rotated and rounded in one pass,
// on all threads. XLA does it in several, each on one core, and takes sines and cosines again in every layer.

#include <cmath>

#include "common.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kTokens = 16;  // of a thread at a time

// What is done with every head of a kind.
struct Norm {
  const float* scale;  // [dim]; null: heads are not normed
  float eps;
};

// A head of a token, rotated: dimension i with i + dim / 2.
template <class S>
void Rotate(const float* from, int64_t dim, Norm norm, const float* cos, const float* sin, S* to) {
  const int64_t half = dim / 2;
  float unit = 1;
  if (norm.scale) {
    Floats squares = {};
    for (int64_t h = 0; h < dim; h += kLanes) squares += Load(from + h) * Load(from + h);
    unit = 1 / std::sqrt(Sum(squares) / dim + norm.eps);
  }
  for (int64_t h = 0; h < half; h += kLanes) {
    Floats low = Load(from + h), high = Load(from + half + h);
    if (norm.scale) {
      low = low * unit * Load(norm.scale + h);
      high = high * unit * Load(norm.scale + half + h);
    }
    const Floats c = Load(cos + h), s = Load(sin + h);
    Store(to + h, low * c - high * s);
    Store(to + half + h, high * c + low * s);
  }
}

template <class S>
struct Split {
  const float* product;  // [T, (N + 2K) H]: queries, keys, values
  const float *cos, *sin;  // [T, H / 2]
  Norm query_norm, key_norm;
  int64_t heads, kv_heads, dim;
  S *q, *k, *v;  // [T, N, H], twice [T, K, H]

  void Token(int64_t t) const {
    const int64_t turn = t * dim / 2;
    const float* from = product + t * (heads + 2 * kv_heads) * dim;
    S *query = q + t * heads * dim, *key = k + t * kv_heads * dim, *value = v + t * kv_heads * dim;
    for (int64_t i = 0; i < heads; ++i, from += dim)
      Rotate(from, dim, query_norm, cos + turn, sin + turn, query + i * dim);
    for (int64_t i = 0; i < kv_heads; ++i, from += dim)
      Rotate(from, dim, key_norm, cos + turn, sin + turn, key + i * dim);
    for (int64_t h = 0; h < kv_heads * dim; h += kLanes) Store(value + h, Load(from + h));
  }
};

using F32 = ffi::Buffer<ffi::F32>;
using Any = ffi::Result<ffi::AnyBuffer>;

ffi::Error Heads(ffi::ThreadPool pool, F32 product, F32 query_norm, F32 key_norm, F32 cos, F32 sin, Any q, Any k, Any v,
                 float eps) {
  const auto shape = q->dimensions();
  const int64_t tokens = shape[0], heads = shape[1], dim = shape[2], kv_heads = k->dimensions()[1];
  auto norm = [&](F32& scale) { return Norm{scale.element_count() ? scale.typed_data() : nullptr, eps}; };
  if (dim % (2 * kLanes) || product.dimensions()[1] != (heads + 2 * kv_heads) * dim)
    return ffi::Error::InvalidArgument("heads: sizes do not fit");
  auto run = [&](auto zero) {
    using S = decltype(zero);
    auto at = [](Any& any) { return reinterpret_cast<S*>(any->untyped_data()); };
    const Split<S> split{product.typed_data(), cos.typed_data(), sin.typed_data(), norm(query_norm), norm(key_norm),
                         heads, kv_heads, dim, at(q), at(k), at(v)};
    ParallelFor(pool, (tokens + kTokens - 1) / kTokens, [split, tokens](int64_t i) {
      for (int64_t t = i * kTokens; t < std::min(tokens, (i + 1) * kTokens); ++t) split.Token(t);
    });
  };
  if (q->element_type() == ffi::F32) run(float{});
  else if (q->element_type() == ffi::BF16) run(uint16_t{});
  else return ffi::Error::InvalidArgument("heads: dtype must be float32 or bfloat16");
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(BatonHeads, Heads,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"));
