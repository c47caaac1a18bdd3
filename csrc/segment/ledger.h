// The record of all segments: what is alive now, totals since import, and, while
// somebody records, a row per segment.
//
// Live figures are computed by walking the list of live segments when they are
// asked for, so that a segment pays for them only by being linked in and out.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "segment/timeline.h"

namespace reprise {

class Replay;
class Segment;

// One segment of a recording. Filled by the segment and its replays, read by
// whoever recorded; guarded by Ledger::lock_rows().
struct LedgerRow {
  std::shared_ptr<Timeline> timeline;  // null if none was asked for
  std::string name;
  int depth = 0;
  bool reentrant = false;
  uint64_t slots = 0;
  uint64_t bytes = 0;                   // bytes not saved
  std::vector<std::string> generators;  // those that the forward moved
  double forward_seconds = 0;
  double replay_seconds = 0;
  uint64_t replays = 0;
};

class Ledger {
 public:
  static Ledger& get();

  void add(Segment& segment);
  void remove(Segment& segment);

  // Calls `visit` for each live segment and drops what it returned after the
  // list is unlocked.
  void collect_replays(
      const std::function<std::vector<c10::intrusive_ptr<Replay>>(Segment&)>& visit);

  size_t live_segments() const;
  size_t live_slots() const;
  size_t stashed_bytes() const;
  uint64_t segments() const { return segments_.load(std::memory_order_relaxed); }
  uint64_t replays() const { return replays_.load(std::memory_order_relaxed); }
  uint64_t bytes_not_saved() const { return bytes_not_saved_.load(std::memory_order_relaxed); }
  // `row`: of the segment that is replayed, or null.
  void count_replay(LedgerRow* row);
  void count_bytes(uint64_t bytes) { bytes_not_saved_.fetch_add(bytes, std::memory_order_relaxed); }

  // A recording gets a row for each segment that begins while it is on.
  // Recordings may overlap; each sees all segments of the process.
  struct Recording {
    size_t limit;   // rows
    bool timeline;  // does a row have one?
    std::chrono::steady_clock::time_point begin;
    std::vector<std::shared_ptr<LedgerRow>> rows;
  };
  std::shared_ptr<Recording> start_recording(size_t limit = SIZE_MAX, bool timeline = true);
  void stop_recording(const std::shared_ptr<Recording>& recording);
  bool recording() const { return n_recordings_.load(std::memory_order_relaxed) > 0; }
  // Null if all recordings have as many rows as they want.
  std::shared_ptr<LedgerRow> new_row();
  // Rows are written and read under this lock.
  std::unique_lock<std::mutex> lock_rows() { return std::unique_lock<std::mutex>(rows_mutex_); }

 private:
  // All locks of the ledger and of live segments, around a fork.
  void lock_all();
  void unlock_all();

  mutable std::mutex mutex_;  // guards the list
  Segment* first_ = nullptr;
  size_t n_live_ = 0;
  std::atomic<uint64_t> segments_{0};
  std::atomic<uint64_t> replays_{0};
  std::atomic<uint64_t> bytes_not_saved_{0};

  std::mutex rows_mutex_;
  std::atomic<int> n_recordings_{0};
  std::vector<std::shared_ptr<Recording>> recordings_;
};

// Adds the time of a scope to a segment's row, if somebody records.
class RowTimer {
 public:
  RowTimer(std::shared_ptr<LedgerRow> row, double LedgerRow::* seconds);
  ~RowTimer();
  RowTimer(const RowTimer&) = delete;
  RowTimer& operator=(const RowTimer&) = delete;

 private:
  std::shared_ptr<LedgerRow> row_;  // null: nothing is timed
  double LedgerRow::* seconds_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace reprise
