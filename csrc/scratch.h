// Memory for intermediate values of a call.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "call.h"

HIDDEN_NAMESPACE_BEGIN(mingru)

// Aligned to cache lines, for the matrix multiplication.
struct Memory {
  struct alignas(64) Line {
    char bytes[64];
  };
  std::unique_ptr<Line[]> lines;
  int64_t size = 0;
};

// The memory that the process keeps for later calls of any thread, because new pages cost more time than the computation
// in them. An idle thread has no part in it.
class KeptMemory {
 public:
  // Smaller memory is as fast if it is new.
  static constexpr int64_t least_bytes = 1 << 16;
  static constexpr int64_t most_bytes = 1 << 27;

  Memory take(int64_t bytes) {
    // Without waiting, also because a fork may have copied a lock that another thread held.
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock && bytes >= least_bytes) {
      // The newest first, which may still be in the cache.
      for (size_t i = memories_.size(); i-- > 0;) {
        const int64_t size = memories_[i].size;
        if (size < bytes || size > 2 * bytes) continue;
        Memory found = std::move(memories_[i]);
        memories_.erase(memories_.begin() + i);
        total_ -= size;
        return found;
      }
    }
    const int64_t lines = ceil_div(bytes, sizeof(Memory::Line));
    std::unique_ptr<Memory::Line[]> memory(new (std::nothrow) Memory::Line[lines]);
    check_allocated(memory != nullptr, bytes);
    return {std::move(memory), bytes};
  }

  void give_back(Memory memory) {
    if (memory.size < least_bytes || memory.size > most_bytes) return;
    std::vector<Memory> oldest;  // freed without the lock
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return;
    for (total_ += memory.size; total_ > most_bytes; memories_.pop_front()) {
      total_ -= memories_.front().size;
      oldest.push_back(std::move(memories_.front()));
    }
    memories_.push_back(std::move(memory));
  }

 private:
  std::mutex mutex_;
  std::deque<Memory> memories_;
  int64_t total_ = 0;
};

inline KeptMemory& kept_memory() {
  static KeptMemory& kept = *new KeptMemory;  // never destroyed, because threads may still run at the exit
  return kept;
}

// Memory that an object uses during a call.
class Scratch {
 public:
  ~Scratch() { kept_memory().give_back(std::move(memory_)); }

  void* at_least(int64_t bytes) {
    if (bytes > memory_.size) {
      kept_memory().give_back(std::exchange(memory_, {}));
      memory_ = kept_memory().take(bytes);
    }
    return data();
  }

  // As it was last asked for.
  void* data() const { return memory_.lines.get(); }

 private:
  Memory memory_;
};

HIDDEN_NAMESPACE_END(mingru)
