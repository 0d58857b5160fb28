// Index keys of a chain of blocks: what `BlockHasher.keys` is by definition, from a list of Python's integers at once.
//
// Each AES block waits for the one before it; meanwhile the processor takes the next tokens out of the list. Where it has
// no instructions for AES the function is missing, and the crypto library does it.

#include <cstdint>
#include <cstring>

#ifdef __AES__
#include <immintrin.h>

// Of Python's stable ABI, so that its headers need not be there.
extern "C" {
struct PyObject;
PyObject* PyList_GetItem(PyObject*, intptr_t);
long PyLong_AsLong(PyObject*);
PyObject* PyErr_Occurred();
}

namespace {

constexpr int kRounds = 10;

template <int kConstant>
__m128i NextKey(__m128i key) {
  const __m128i assist = _mm_shuffle_epi32(_mm_aeskeygenassist_si128(key, kConstant), 0xff);
  key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
  key = _mm_xor_si128(key, _mm_slli_si128(key, 8));
  return _mm_xor_si128(key, assist);
}

void Expand(const uint8_t* secret, __m128i (&keys)[kRounds + 1]) {
  keys[0] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(secret));
  keys[1] = NextKey<0x01>(keys[0]);
  keys[2] = NextKey<0x02>(keys[1]);
  keys[3] = NextKey<0x04>(keys[2]);
  keys[4] = NextKey<0x08>(keys[3]);
  keys[5] = NextKey<0x10>(keys[4]);
  keys[6] = NextKey<0x20>(keys[5]);
  keys[7] = NextKey<0x40>(keys[6]);
  keys[8] = NextKey<0x80>(keys[7]);
  keys[9] = NextKey<0x1b>(keys[8]);
  keys[10] = NextKey<0x36>(keys[9]);
}

}  // namespace

// Hashes the first `num_blocks` blocks of `page_size` tokens under an AES-128 key, and returns how many of them it could:
// fewer where a token is no number of 32 bits. Python's error is set where it is no integer that fits a C long.
extern "C" int64_t BatonHash(PyObject* tokens, int64_t num_blocks, int64_t page_size, const uint8_t* secret,
                             uint64_t* keys) {
  __m128i round_keys[kRounds + 1];
  Expand(secret, round_keys);
  __m128i tag = _mm_setzero_si128();
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (int64_t start = 0; start < page_size; start += 4) {
      alignas(16) int32_t four[4] = {};  // zeros behind a page's last token
      for (int64_t i = 0; i < 4 && start + i < page_size; ++i) {
        const long token = PyLong_AsLong(PyList_GetItem(tokens, block * page_size + start + i));
        if (token != static_cast<int32_t>(token) || (token == -1 && PyErr_Occurred())) return block;
        four[i] = static_cast<int32_t>(token);
      }
      const __m128i content = _mm_set_epi32(four[3], four[2], four[1], four[0]);
      tag = _mm_xor_si128(_mm_xor_si128(tag, content), round_keys[0]);
      for (int round = 1; round < kRounds; ++round) tag = _mm_aesenc_si128(tag, round_keys[round]);
      tag = _mm_aesenclast_si128(tag, round_keys[kRounds]);
    }
    keys[block] = static_cast<uint64_t>(_mm_cvtsi128_si64(tag));
  }
  return num_blocks;
}
#endif
