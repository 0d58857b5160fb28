// Token ids of ASCII text: what `Words` (words.py) is by definition for tokenizers that cut words as GPT-2 or as Qwen and
// Llama 3 do, and encode each by byte-level BPE. A text is cut at added tokens, what is between them into words, and each
// word looked up among those that were met before.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

// Of Python's stable ABI, so that its headers need not be there.
extern "C" {
struct PyObject;
const char* PyUnicode_AsUTF8AndSize(PyObject*, intptr_t*);
PyObject* PyList_New(intptr_t);
int PyList_SetItem(PyObject*, intptr_t, PyObject*);
PyObject* PyLong_FromLong(long);
PyObject* Py_BuildValue(const char*, ...);
}

namespace {

constexpr int kMaxLetters = 256;  // of a word: merging takes time that grows with their square
constexpr int kTextBytes = 32;    // of a word that is remembered
constexpr int kNumIds = 7;        // at most, of one
constexpr int kLogWords = 16;     // so many are
constexpr int kNone = INT32_MAX;

enum Kind : uint8_t { kPunctuation, kLetter, kDigit, kSpace };

Kind KindOf(char c) {
  if (uint8_t((c | 0x20) - 'a') < 26) return kLetter;
  if (uint8_t(c - '0') < 10) return kDigit;
  return c == ' ' || uint8_t(c - '\t') < 5 ? kSpace : kPunctuation;
}

bool IsNewline(char c) { return c == '\n' || c == '\r'; }

// The expressions, by hand. Functions return where what begins at `at` ends; `at` < `end`.

const char* Run(const char* at, const char* end, Kind kind) {
  while (at < end && KindOf(*at) == kind) ++at;
  return at;
}

// 's 't 're 've 'm 'll 'd; `at` where there is none.
const char* Contraction(const char* at, const char* end, int any_case) {
  if (*at != '\'' || end - at < 2) return at;
  const char first = at[1] | any_case, second = end - at > 2 ? at[2] | any_case : 0;
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return at + 2;
  const bool two = (second == 'e' && (first == 'r' || first == 'v')) || (second == 'l' && first == 'l');
  return two ? at + 3 : at;
}

// \s+(?!\S)|\s+
const char* Spaces(const char* at, const char* end) {
  const char* stop = Run(at, end, kSpace);
  return stop == end || stop == at + 1 ? stop : stop - 1;
}

const char* Gpt2Word(const char* at, const char* end) {
  const char* stop = Contraction(at, end, 0);
  if (stop != at) return stop;
  const char* first = at + (*at == ' ' && at + 1 < end);
  const Kind kind = KindOf(*first);
  return kind == kSpace ? Spaces(at, end) : Run(first, end, kind);
}

const char* QwenWord(const char* at, const char* end, int max_digits) {
  const char* stop = Contraction(at, end, 0x20);
  if (stop != at) return stop;
  const Kind kind = KindOf(*at);
  if (kind == kLetter) return Run(at, end, kLetter);
  if (kind == kDigit) return Run(at, std::min(end, at + max_digits), kDigit);
  const bool followed = at + 1 < end;
  if (followed && !IsNewline(*at) && KindOf(at[1]) == kLetter) return Run(at + 1, end, kLetter);
  const char* first = at + (*at == ' ' && followed);
  if (KindOf(*first) == kPunctuation) {
    stop = Run(first, end, kPunctuation);
    while (stop < end && IsNewline(*stop)) ++stop;
    return stop;
  }
  for (stop = Run(at, end, kSpace); stop > at; --stop) {
    if (IsNewline(stop[-1])) return stop;
  }
  return Spaces(at, end);
}

// Two neighbours that become one, those of the lowest rank first.
struct Merge {
  uint64_t pair;
  int32_t rank, id;
};

uint64_t Mix(uint64_t x) { return (x ^ x >> 32) * 0x9e3779b97f4a7c15; }

class Merges {
 public:
  // Of each merge left, right and new id, in order of rank.
  Merges(const int32_t* triples, int64_t count) {
    while ((int64_t(1) << log_size_) < 2 * count) ++log_size_;
    table_.resize(size_t(1) << log_size_, {0, kNone, 0});
    for (int32_t rank = 0; rank < count; ++rank) {
      Merge& merge = table_[Slot(triples[3 * rank], triples[3 * rank + 1])];
      merge = {Pair(triples[3 * rank], triples[3 * rank + 1]), rank, triples[3 * rank + 2]};
    }
  }

  // Its rank is `kNone` where there is none.
  const Merge& Find(int32_t left, int32_t right) const { return table_[Slot(left, right)]; }

 private:
  static uint64_t Pair(int32_t left, int32_t right) { return uint64_t(left) << 32 | uint32_t(right); }

  size_t Slot(int32_t left, int32_t right) const {
    const uint64_t pair = Pair(left, right);
    size_t slot = Mix(pair) >> (64 - log_size_);
    while (table_[slot].rank != kNone && table_[slot].pair != pair) slot = (slot + 1) & (table_.size() - 1);
    return slot;
  }

  int log_size_ = 4;
  std::vector<Merge> table_;
};

// A word that was met before, one line of the cache. One that is met replaces the one whose place it takes.
struct alignas(64) Known {
  char text[kTextBytes];
  int32_t ids[kNumIds];
  uint8_t length, num_ids;
};

class Words {
 public:
  Words(int max_digits, const int32_t* letters, const int32_t* triples, int64_t count)
      : max_digits_(max_digits), letters_(letters, letters + 128), merges_(triples, count), known_(1 << kLogWords) {}

  // An added token, longer ones first.
  void AddToken(std::string text, int32_t id) {
    starts_[text[0] & 127] = true;
    tokens_.emplace_back(std::move(text), id);
  }

  // A word that is one token whatever merging makes of it.
  void AddWhole(std::string text, int32_t id) {
    int32_t ids[kMaxLetters];
    if (text.size() > kMaxLetters || (Merged(text.data(), text.size(), ids) == 1 && ids[0] == id)) return;
    wholes_.emplace(std::move(text), id);
  }

  // Into `ids()`; how many, -1 where a word is too long.
  int64_t Encode(const char* at, const char* end) {
    ids_.resize(end - at + kNumIds);  // no token is shorter than a letter
    num_ids_ = 0;
    while (at < end) {
      const char* stop = at;
      const std::pair<std::string, int32_t>* token = nullptr;
      while (stop < end && !(starts_[*stop & 127] && (token = TokenAt(stop, end)))) ++stop;
      while (at < stop) {
        const char* next = max_digits_ ? QwenWord(at, stop, max_digits_) : Gpt2Word(at, stop);
        if (!EncodeWord(at, next - at)) return -1;
        at = next;
      }
      if (token) {
        ids_[num_ids_++] = token->second;
        at += token->first.size();
      }
    }
    return num_ids_;
  }

  const int32_t* ids() const { return ids_.data(); }

 private:
  const std::pair<std::string, int32_t>* TokenAt(const char* at, const char* end) const {
    for (const auto& token : tokens_) {
      const size_t size = token.first.size();
      if (size <= size_t(end - at) && !memcmp(at, token.first.data(), size)) return &token;
    }
    return nullptr;
  }

  bool EncodeWord(const char* text, int64_t length) {
    if (length > kMaxLetters) return false;
    if (length > kTextBytes) {
      num_ids_ += EncodeNew(text, length, &ids_[num_ids_]);
      return true;
    }
    uint64_t padded[kTextBytes / 8] = {}, hash = length;
    memcpy(padded, text, length);
    for (int i = 0; 8 * i < length; ++i) hash = Mix(hash ^ padded[i]);
    Known& known = known_[hash >> (64 - kLogWords)];
    if (known.length == length && !memcmp(known.text, padded, kTextBytes)) {
      memcpy(&ids_[num_ids_], known.ids, sizeof(known.ids));
      num_ids_ += known.num_ids;
      return true;
    }
    const int count = EncodeNew(text, length, &ids_[num_ids_]);
    if (count <= kNumIds) {
      memcpy(known.text, padded, kTextBytes);
      memcpy(known.ids, &ids_[num_ids_], count * sizeof(int32_t));
      known.length = length;
      known.num_ids = count;
    }
    num_ids_ += count;
    return true;
  }

  int EncodeNew(const char* text, int length, int32_t* ids) const {
    if (!wholes_.empty()) {
      const auto found = wholes_.find(std::string(text, length));
      if (found != wholes_.end()) {
        ids[0] = found->second;
        return 1;
      }
    }
    return Merged(text, length, ids);
  }

  int Merged(const char* text, int length, int32_t* ids) const {
    Merge with_next[kMaxLetters];  // by letter
    for (int i = 0; i < length; ++i) ids[i] = letters_[text[i] & 127];
    for (int i = 0; i + 1 < length; ++i) with_next[i] = merges_.Find(ids[i], ids[i + 1]);
    while (length > 1) {
      int best = 0;
      for (int i = 1; i + 1 < length; ++i) {
        if (with_next[i].rank < with_next[best].rank) best = i;
      }
      if (with_next[best].rank == kNone) break;
      ids[best] = with_next[best].id;
      --length;
      for (int i = best + 1; i < length; ++i) {
        ids[i] = ids[i + 1];
        with_next[i] = with_next[i + 1];
      }
      if (best > 0) with_next[best - 1] = merges_.Find(ids[best - 1], ids[best]);
      if (best + 1 < length) with_next[best] = merges_.Find(ids[best], ids[best + 1]);
    }
    return length;
  }

  const int max_digits_;
  const std::vector<int32_t> letters_;
  const Merges merges_;
  std::vector<Known> known_;
  std::vector<std::pair<std::string, int32_t>> tokens_;
  std::unordered_map<std::string, int32_t> wholes_;
  bool starts_[128] = {};
  std::vector<int32_t> ids_;
  int64_t num_ids_ = 0;
};

}  // namespace

// An encoder, to be freed.
//
// max_digits: of one word, where they are cut as Qwen and Llama 3 do; 0: as GPT-2 does.
// letters: [128] ids of single characters.
// merges: [count, 3] ids of what is merged and what it becomes, in order of rank.
extern "C" Words* BatonWords(int64_t max_digits, const int32_t* letters, const int32_t* merges, int64_t count) {
  return new Words(max_digits, letters, merges, count);
}

extern "C" void BatonWordsFree(Words* words) { delete words; }

// An added token; longer ones first.
extern "C" void BatonWordsToken(Words* words, const char* text, int64_t id) { words->AddToken(text, id); }

// A word that is one token, whatever merging makes of it.
extern "C" void BatonWordsWhole(Words* words, const char* text, int64_t id) { words->AddWhole(text, id); }

// A list of ids of ASCII text; None where a word is too long. Null, and Python's error set, where memory is short.
extern "C" PyObject* BatonWordsEncode(Words* words, PyObject* text) {
  intptr_t size = 0;
  const char* start = PyUnicode_AsUTF8AndSize(text, &size);
  if (!start) return nullptr;
  const int64_t count = words->Encode(start, start + size);
  if (count < 0) return Py_BuildValue("");
  PyObject* list = PyList_New(count);
  for (int64_t i = 0; list && i < count; ++i) PyList_SetItem(list, i, PyLong_FromLong(words->ids()[i]));
  return list;
}
