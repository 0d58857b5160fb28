// e^x, by vectors.
#pragma once

#include "common.h"

constexpr float kMasked = -1e30f;
constexpr float kLowest = -1e29f;  // far above a masked score, whose weight is therefore 0 and not exp(0)

// e^x for x <= 0, 2 ulp; 0 below -87. With x = n ln 2 + r, |r| <= ln 2 / 2: a Taylor polynomial in r, times 2^n.
inline Floats Exp(Floats x) {
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
