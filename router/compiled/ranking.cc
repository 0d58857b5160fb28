// The costs of all pairs of workers and the best of them, as `pair_costs.py` defines them: the same operations in the same
// order, so that it finds the same numbers. Names are those of the definition.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr double kSameS = 1e-6;
constexpr double kWindowS = 10.0;
constexpr double kMaxUtilization = 0.95;
constexpr int kRanked = 3;

// The next three are what `ranking.py` reads and writes.

struct Worker {
  double placed_s, head_s, head_since, told_s, told_at, busy_s, busy_at, mean_prefill_s, rows, kv_tokens, arrivals,
      arrived_at, turn;                                                               // of its `Standing`
  double step_s, token_s, pair_s, decode_step_s, decode_row_s, decode_token_s;        // of its `StepModel`
  int64_t chunk_tokens, page_size, block_bytes, fingerprint, link;                    // link: -1 where it has none
};

struct Question {
  const Worker* workers;  // sources, then targets
  const double* links;    // [num_links, num_links, 2] seconds of a hand-over of nothing, and per byte
  int64_t num_sources, num_targets, num_links, local_prefill_tokens;
  double queue, prefill, transfer, itl, crowding, followers, affinity_s;
  double fixed_s, byte_s;  // of pairs that have no link
  double now, output_tokens;
  int64_t num_tokens, last_source, last_target;  // the session's last workers, -1 where there are none
  int64_t held[];                                // by each worker
};

struct Ranked {
  int64_t source, target;  // source -1: the target reads the prompt
  int64_t held, missing, held_decode, num_bytes;
  double reading_s, queue_s, prefill_s, transfer_s, itl_s, crowding_s, followers_s, affinity_s;
};

struct Reader {
  int64_t held, missing, chunks;
  double reading_s, queue_s, prefill_s, crowding_s, followers_s, affinity_s, total_s;
  double late;  // of a hand-over, as a share: 1 - 1 / chunks
};

struct Writer {
  Reader local;
  int64_t num_bytes;
  double itl_s, stall_s, total_s;
};

struct Choice {
  double total_s, turn, order, transfer_s;
  int64_t source, target;
};

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

double Busy(const Worker& worker, double now) {
  return std::min(worker.busy_s * std::exp((worker.busy_at - now) / kWindowS) / kWindowS, kMaxUtilization);
}

double NumFollowers(double busy) {
  const double idle = 1 - busy;
  return 0.5 * busy * (2 - busy) / (idle * idle);
}

double QueueS(const Worker& worker, double now) {
  const double own_s = worker.placed_s - std::min(worker.head_s, now - worker.head_since);
  return std::max(std::max(own_s, worker.told_s - (now - worker.told_at)), 0.0);
}

double ExpectedWaitS(const Worker& worker, double busy) { return 0.5 * busy / (1 - busy) * worker.mean_prefill_s; }

double PrefillS(const Worker& worker, int64_t num_tokens, int64_t context, int64_t chunks) {
  const double pairs = double(num_tokens * context) + double(num_tokens * (num_tokens + 1)) / 2;
  return worker.step_s * double(chunks) + worker.token_s * double(num_tokens) + worker.pair_s * pairs;
}

class Ranking {
 public:
  explicit Ranking(const Question& asked) : asked_(asked) {}

  int64_t Rank(Ranked* out) {
    Weigh();
    for (int64_t s = 0; s < asked_.num_sources; ++s) TryPairs(s);
    const bool none = !num_weighed_;
    for (int64_t t = 0; t < asked_.num_targets; ++t) {
      const Writer& writer = writers_[t];
      const int64_t limit = asked_.local_prefill_tokens;
      if (none || limit < 0 || writer.local.missing <= limit) {
        Try(writer.local.total_s + writer.total_s + writer.stall_s, 0.0, -1, t);
        ++num_weighed_;
      }
    }
    for (int i = 0; i < num_best_; ++i) Describe(best_[i], out[i]);
    return num_weighed_;
  }

 private:
  const Worker& Source(int64_t s) const { return asked_.workers[s]; }
  const Worker& Target(int64_t t) const { return asked_.workers[asked_.num_sources + t]; }

  void Weigh() {
    const int64_t num_workers = asked_.num_sources + asked_.num_targets;
    std::vector<double> busy(num_workers);
    for (int64_t i = 0; i < num_workers; ++i) busy[i] = Busy(asked_.workers[i], asked_.now);
    const int64_t num_readers = asked_.num_sources ? asked_.num_sources : asked_.num_targets;
    double sum = 0.0;
    for (int64_t i = 0; i < num_readers; ++i) sum += busy[i];
    followers_ = asked_.followers * NumFollowers(sum / double(num_readers));
    for (int64_t i = 0; i < num_workers; ++i) {
      const bool is_source = i < asked_.num_sources;
      const bool was_last = i == (is_source ? asked_.last_source : asked_.last_target);
      const Reader reader = Reading(asked_.workers[i], asked_.held[i], busy[i], was_last);
      if (is_source) {
        readers_.push_back(reader);
      } else {
        writers_.push_back(Writing(asked_.workers[i], reader));
      }
    }
    transfers_s_.resize(asked_.num_targets);
    totals_s_.resize(asked_.num_targets);
  }

  Reader Reading(const Worker& worker, int64_t held, double busy, bool was_last) const {
    Reader reader;
    reader.held = std::min(held, (asked_.num_tokens - 1) / worker.page_size * worker.page_size);
    reader.missing = asked_.num_tokens - reader.held;
    reader.chunks = worker.chunk_tokens ? CeilDiv(reader.missing, worker.chunk_tokens) : 1;
    reader.queue_s = asked_.queue * QueueS(worker, asked_.now);
    reader.reading_s = PrefillS(worker, reader.missing, reader.held, reader.chunks);
    reader.prefill_s = asked_.prefill * reader.reading_s;
    reader.crowding_s = asked_.crowding * ExpectedWaitS(worker, busy);
    reader.followers_s = followers_ * reader.prefill_s;
    reader.affinity_s = was_last ? -asked_.affinity_s / 2 : 0.0;
    reader.total_s =
        reader.queue_s + reader.prefill_s + reader.crowding_s + reader.followers_s + reader.affinity_s;
    reader.late = 1 - 1 / double(reader.chunks);
    return reader;
  }

  Writer Writing(const Worker& worker, const Reader& local) const {
    Writer writer;
    writer.local = local;
    const double output_tokens = asked_.output_tokens;
    const double row_s = worker.decode_row_s + worker.decode_token_s * double(asked_.num_tokens);
    const double alone_s = worker.decode_step_s + row_s;
    const double arrivals_per_s =
        worker.arrivals * std::exp((worker.arrived_at - asked_.now) / kWindowS) / kWindowS;
    const double crowd = std::max(worker.rows, arrivals_per_s * output_tokens * alone_s);
    const double slower_s = worker.decode_row_s * crowd + worker.decode_token_s * worker.kv_tokens;
    writer.itl_s = asked_.itl * output_tokens * (slower_s + crowd * row_s);
    const int64_t num_pages = CeilDiv(asked_.num_tokens, worker.page_size);
    writer.stall_s = asked_.itl * worker.rows * local.prefill_s;
    writer.num_bytes = (num_pages - local.held / worker.page_size) * worker.block_bytes;
    writer.total_s = writer.itl_s + local.affinity_s;
    return writer;
  }

  void TryPairs(int64_t s) {
    const Worker& source = Source(s);
    const Reader& reader = readers_[s];
    const double chunks = double(reader.chunks), hidden_s = reader.prefill_s * reader.late;
    for (int64_t t = 0; t < asked_.num_targets; ++t) {
      const Writer& writer = writers_[t];
      double fixed_s = asked_.fixed_s, byte_s = asked_.byte_s;
      const int64_t row = source.link, column = Target(t).link;
      if (row >= 0 && column >= 0) {
        const double* link = asked_.links + 2 * (row * asked_.num_links + column);
        fixed_s = link[0], byte_s = link[1];
      }
      const double moving_s = byte_s * double(writer.num_bytes);
      transfers_s_[t] = asked_.transfer * (fixed_s + std::max(moving_s / chunks, moving_s - hidden_s));
      totals_s_[t] = reader.total_s + writer.total_s + transfers_s_[t];
    }
    for (int64_t t = 0; t < asked_.num_targets; ++t) {
      if (source.fingerprint != Target(t).fingerprint) continue;
      ++num_weighed_;
      Try(totals_s_[t], transfers_s_[t], s, t);
    }
  }

  // Keeps it if it is among the best so far; of equals, those that came first.
  void Try(double total_s, double transfer_s, int64_t source, int64_t target) {
    if (total_s > limit_s_) return;
    const double turn = (source < 0 ? Target(target) : Source(source)).turn + Target(target).turn;
    const Choice choice{total_s, turn, std::nearbyint(total_s / kSameS), transfer_s, source, target};
    int at = num_best_;
    while (at > 0 && Precedes(choice, best_[at - 1])) --at;
    if (at == kRanked) return;
    num_best_ = std::min(num_best_ + 1, kRanked);
    for (int i = num_best_ - 1; i > at; --i) best_[i] = best_[i - 1];
    best_[at] = choice;
    if (num_best_ == kRanked) limit_s_ = best_[kRanked - 1].total_s + 2 * kSameS;
  }

  static bool Precedes(const Choice& one, const Choice& other) {
    return one.order != other.order ? one.order < other.order : one.turn < other.turn;
  }

  void Describe(const Choice& choice, Ranked& out) const {
    const Writer& writer = writers_[choice.target];
    const bool is_local = choice.source < 0;
    const Reader& reader = is_local ? writer.local : readers_[choice.source];
    out = {choice.source,
           choice.target,
           reader.held,
           reader.missing,
           writer.local.held,
           writer.num_bytes,
           reader.reading_s,
           reader.queue_s,
           reader.prefill_s,
           choice.transfer_s,
           writer.itl_s + (is_local ? writer.stall_s : 0.0),
           reader.crowding_s,
           reader.followers_s,
           reader.affinity_s + writer.local.affinity_s};
  }

  const Question& asked_;
  double followers_ = 0.0;
  std::vector<Reader> readers_;
  std::vector<Writer> writers_;
  std::vector<double> transfers_s_, totals_s_;  // of one source's pairs
  int64_t num_weighed_ = 0;
  Choice best_[kRanked];
  int num_best_ = 0;
  double limit_s_ = std::numeric_limits<double>::infinity();
};

}  // namespace

// Writes the best choices, the best first, and returns of how many they are the best.
extern "C" int64_t BatonRank(const Question* asked, Ranked* out) { return Ranking(*asked).Rank(out); }
