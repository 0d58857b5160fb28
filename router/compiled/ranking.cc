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
  int64_t chunk_tokens, page_size, block_bytes, fingerprint;
  int64_t kinship, is_prefill;  // kinship: -1 where it neither donates nor fetches
  int64_t link;                 // -1 where it has none
};

struct Link {
  double fixed_s, byte_s;  // of a hand-over of nothing, and per byte
};

struct Question {
  const Worker* workers;  // sources, then targets, then those that may only donate
  const Link* links;      // [num_links, num_links]
  int64_t num_sources, num_targets, num_leaving, num_links, local_prefill_tokens;
  double queue, prefill, transfer, itl, crowding, followers, affinity_s;
  double fixed_s, byte_s;  // of pairs that have no link
  double now, output_tokens;
  int64_t num_tokens, last_source, last_target;  // the session's last workers, -1 where there are none
  int64_t tokens[];                              // held by each source and target, then told by each worker
};

struct Ranked {
  int64_t source, target, donor;  // source -1: the target reads the prompt; donor -1: nobody
  int64_t held, missing, held_decode, fetched, num_bytes;
  double reading_s, queue_s, prefill_s, transfer_s, itl_s, crowding_s, followers_s, affinity_s, fetch_s;
};

struct Reader {
  int64_t worker, held, missing, chunks;
  double reading_s, queue_s, prefill_s, crowding_s, followers_s, affinity_s, total_s;
  double late;  // of a hand-over, as a share: 1 - 1 / chunks
  double fetch_s;
  int64_t donor, fetched;  // donor -1: nobody
};

struct Writer {
  Reader local;
  int64_t num_bytes;
  double itl_s, stall_s, total_s;
};

struct Choice {
  double total_s, turn, order, transfer_s;
  int64_t reader, target;  // reader -1: the target
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
    AddFetching();
    for (int64_t r = 0; r < int64_t(readers_.size()); ++r) TryPairs(r);
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
      const Reader reader = Reading(i, asked_.tokens[i], busy[i], was_last);
      if (is_source) {
        readers_.push_back(reader);
      } else {
        writers_.push_back(Writing(asked_.workers[i], reader));
      }
    }
    transfers_s_.resize(asked_.num_targets);
    totals_s_.resize(asked_.num_targets);
  }

  Reader Reading(int64_t i, int64_t held, double busy, bool was_last) const {
    const Worker& worker = asked_.workers[i];
    Reader reader;
    reader.worker = i;
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
    reader.fetch_s = 0.0;
    reader.donor = -1;
    reader.fetched = 0;
    return reader;
  }

  // Appends each reader that could fetch, fetching.
  void AddFetching() {
    const int64_t num_held = asked_.num_sources + asked_.num_targets;
    const int64_t* told = asked_.tokens + num_held;
    std::vector<int64_t> donors;
    for (int64_t i = 0; i < num_held + asked_.num_leaving; ++i) {
      if (told[i]) donors.push_back(i);
    }
    if (donors.empty()) return;
    std::stable_sort(donors.begin(), donors.end(), [&](int64_t a, int64_t b) {
      const Worker &one = asked_.workers[a], &other = asked_.workers[b];
      if (told[a] != told[b]) return told[a] > told[b];
      return one.is_prefill != other.is_prefill ? one.is_prefill < other.is_prefill : one.turn < other.turn;
    });
    for (int64_t s = 0; s < asked_.num_sources; ++s) {
      const Worker& worker = Source(s);
      if (worker.kinship < 0) continue;
      const int64_t most = (asked_.num_tokens - 1) / worker.page_size * worker.page_size;
      for (const int64_t donor : donors) {
        const int64_t fetched = std::min(told[donor], most) - readers_[s].held;
        if (fetched < worker.page_size) break;
        if (donor == s || asked_.workers[donor].kinship != worker.kinship) continue;
        readers_.push_back(Fetching(readers_[s], donor, fetched));
        break;
      }
    }
  }

  Reader Fetching(Reader reader, int64_t donor, int64_t fetched) const {
    const Worker& worker = asked_.workers[reader.worker];
    const Link link = LinkOf(asked_.workers[donor], worker);
    const double moving_s = link.fixed_s + link.byte_s * double(fetched / worker.page_size * worker.block_bytes);
    reader.fetch_s = asked_.transfer * std::max(moving_s - QueueS(worker, asked_.now), 0.0);
    reader.missing -= fetched;
    reader.chunks = worker.chunk_tokens ? CeilDiv(reader.missing, worker.chunk_tokens) : 1;
    reader.reading_s = PrefillS(worker, reader.missing, reader.held + fetched, reader.chunks);
    reader.prefill_s = asked_.prefill * reader.reading_s;
    const double total_s =
        reader.queue_s + reader.prefill_s + reader.crowding_s + reader.followers_s + reader.affinity_s;
    reader.total_s = total_s + reader.fetch_s;
    reader.late = 1 - 1 / double(reader.chunks);
    reader.donor = donor;
    reader.fetched = fetched;
    return reader;
  }

  Link LinkOf(const Worker& source, const Worker& target) const {
    if (source.link < 0 || target.link < 0) return {asked_.fixed_s, asked_.byte_s};
    return asked_.links[source.link * asked_.num_links + target.link];
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

  void TryPairs(int64_t r) {
    const Reader& reader = readers_[r];
    const Worker& source = Source(reader.worker);
    const double chunks = double(reader.chunks), hidden_s = reader.prefill_s * reader.late;
    for (int64_t t = 0; t < asked_.num_targets; ++t) {
      const Writer& writer = writers_[t];
      const Link link = LinkOf(source, Target(t));
      const double moving_s = link.byte_s * double(writer.num_bytes);
      transfers_s_[t] = asked_.transfer * (link.fixed_s + std::max(moving_s / chunks, moving_s - hidden_s));
      totals_s_[t] = reader.total_s + writer.total_s + transfers_s_[t];
    }
    for (int64_t t = 0; t < asked_.num_targets; ++t) {
      if (source.fingerprint != Target(t).fingerprint) continue;
      ++num_weighed_;
      Try(totals_s_[t], transfers_s_[t], r, t);
    }
  }

  // Keeps it if it is among the best so far; of equals, those that came first.
  void Try(double total_s, double transfer_s, int64_t reader, int64_t target) {
    if (total_s > limit_s_) return;
    const Worker& worker = reader < 0 ? Target(target) : Source(readers_[reader].worker);
    const double turn = worker.turn + Target(target).turn;
    const Choice choice{total_s, turn, std::nearbyint(total_s / kSameS), transfer_s, reader, target};
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
    const bool is_local = choice.reader < 0;
    const Reader& reader = is_local ? writer.local : readers_[choice.reader];
    out = {is_local ? -1 : reader.worker,
           choice.target,
           reader.donor,
           reader.held,
           reader.missing,
           writer.local.held,
           reader.fetched,
           writer.num_bytes,
           reader.reading_s,
           reader.queue_s,
           reader.prefill_s,
           choice.transfer_s,
           writer.itl_s + (is_local ? writer.stall_s : 0.0),
           reader.crowding_s,
           reader.followers_s,
           reader.affinity_s + writer.local.affinity_s,
           reader.fetch_s};
  }

  const Question& asked_;
  double followers_ = 0.0;
  std::vector<Reader> readers_;  // sources, then those that could fetch, fetching
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
