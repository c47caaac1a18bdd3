#include "segment/ledger.h"

#include <pthread.h>

#include <algorithm>
#include <unordered_set>

#include "pool.h"
#include "segment/replay.h"
#include "segment/segment.h"

namespace reprise {

Ledger& Ledger::get() {
  static Ledger* ledger = [] {
    // Not while another thread holds one of the locks: that thread is not in the child.
    // Whoever holds one waits for nobody but a pool.
    Pool::prepare_for_forks();
    pthread_atfork([] { get().lock_all(); }, [] { get().unlock_all(); },
                   [] { get().unlock_all(); });
    return new Ledger;  // never destroyed: segments may outlive static teardown
  }();
  return *ledger;
}

void Ledger::lock_all() {
  rows_mutex_.lock();
  mutex_.lock();
  for (Segment* s = first_; s != nullptr; s = s->ledger_next_) {
    s->mutex_.lock();
  }
}

void Ledger::unlock_all() {
  for (Segment* s = first_; s != nullptr; s = s->ledger_next_) {
    s->mutex_.unlock();
  }
  mutex_.unlock();
  rows_mutex_.unlock();
}

void Ledger::add(Segment& segment) {
  segments_.fetch_add(1, std::memory_order_relaxed);
  std::lock_guard<std::mutex> lock(mutex_);
  segment.ledger_next_ = first_;
  if (first_ != nullptr) {
    first_->ledger_previous_ = &segment;
  }
  first_ = &segment;
  ++n_live_;
}

void Ledger::remove(Segment& segment) {
  std::lock_guard<std::mutex> lock(mutex_);
  (segment.ledger_previous_ != nullptr ? segment.ledger_previous_->ledger_next_ : first_) =
      segment.ledger_next_;
  if (segment.ledger_next_ != nullptr) {
    segment.ledger_next_->ledger_previous_ = segment.ledger_previous_;
  }
  --n_live_;
}

void Ledger::collect_replays(
    const std::function<std::vector<c10::intrusive_ptr<Replay>>(Segment&)>& visit) {
  std::vector<c10::intrusive_ptr<Replay>> taken;
  std::lock_guard<std::mutex> lock(mutex_);
  for (Segment* s = first_; s != nullptr; s = s->ledger_next_) {
    for (auto& replay : visit(*s)) {
      taken.push_back(std::move(replay));
    }
  }
}

size_t Ledger::live_segments() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return n_live_;
}

size_t Ledger::live_slots() const {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t total = 0;
  for (Segment* s = first_; s != nullptr; s = s->ledger_next_) {
    total += s->live_slots();
  }
  return total;
}

size_t Ledger::stashed_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::unordered_set<const void*> seen;
  size_t total = 0;
  for (Segment* s = first_; s != nullptr; s = s->ledger_next_) {
    total += s->stashed_bytes(seen);
  }
  return total;
}

void Ledger::count_replay(LedgerRow* row) {
  replays_.fetch_add(1, std::memory_order_relaxed);
  if (row != nullptr) {
    auto lock = lock_rows();
    ++row->replays;
  }
}

RowTimer::RowTimer(std::shared_ptr<LedgerRow> row, double LedgerRow::* seconds)
    : row_(std::move(row)), seconds_(seconds) {
  if (row_) {
    start_ = std::chrono::steady_clock::now();
  }
}

RowTimer::~RowTimer() {
  if (row_) {
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
    auto lock = Ledger::get().lock_rows();
    (*row_).*seconds_ += elapsed.count();
  }
}

std::shared_ptr<Ledger::Recording> Ledger::start_recording(size_t limit, bool timeline) {
  auto recording =
      std::make_shared<Recording>(Recording{limit, timeline, std::chrono::steady_clock::now(), {}});
  auto lock = lock_rows();
  recordings_.push_back(recording);
  n_recordings_.store(static_cast<int>(recordings_.size()), std::memory_order_relaxed);
  return recording;
}

void Ledger::stop_recording(const std::shared_ptr<Recording>& recording) {
  auto lock = lock_rows();
  recordings_.erase(std::remove(recordings_.begin(), recordings_.end(), recording),
                    recordings_.end());
  n_recordings_.store(static_cast<int>(recordings_.size()), std::memory_order_relaxed);
}

std::shared_ptr<LedgerRow> Ledger::new_row() {
  std::shared_ptr<LedgerRow> row;
  auto lock = lock_rows();
  for (auto& recording : recordings_) {
    if (recording->rows.size() >= recording->limit) {
      continue;
    }
    if (!row) {
      row = std::make_shared<LedgerRow>();
    }
    if (recording->timeline && !row->timeline) {
      row->timeline = std::make_shared<Timeline>();
    }
    recording->rows.push_back(row);
  }
  return row;
}

}  // namespace reprise
