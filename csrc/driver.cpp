#include "scratch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#ifdef MINGRU_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mingru {

namespace baseline { template <class A> Kernels kernels(); }
namespace avx2 { template <class A> Kernels kernels(); }
namespace avx512 { template <class A> Kernels kernels(); }

namespace {

struct InstructionSet {
  const char* name;
  Kernels of_float, of_double;
  const Tiles* tiles;  // null if operands of products are never rounded
};

// Whether this process may use AMX's products of bfloat16. Linux gives the memory of tiles only to processes that ask.
[[maybe_unused]] bool has_amx() {
#if defined(MINGRU_X86) && defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned bfloat16 = 1 << 22, tiles = 1 << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bfloat16) == 0 || (d & tiles) == 0) return false;
  constexpr long request = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

// Whether this processor multiplies pairs of bfloat16.
[[maybe_unused]] bool has_pairs() {
#ifdef MINGRU_X86
  unsigned a, b, c, d;
  constexpr unsigned bfloat16 = 1 << 5;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bfloat16) != 0;
#else
  return false;
#endif
}

// Those that this library and this processor have, the fastest last.
std::vector<InstructionSet> sets_here() {
  std::vector<InstructionSet> sets;
#ifdef MINGRU_X86
  unsigned a, b, c, d;
  // Not by __builtin_cpu_supports, because clang before 19 and old versions of GCC do not know this name there.
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return sets;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return sets;
  sets.push_back({"avx2", avx2::kernels<float>(), avx2::kernels<double>(), nullptr});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    sets.push_back({"avx512", avx512::kernels<float>(), avx2::kernels<double>(), nullptr});
    const InstructionSet& avx512 = sets.back();
    const InstructionSet pairs{"avx512_bf16", avx512.of_float, avx512.of_double, avx512.of_float.pairs};
    // On an Intel, they take twice the time of products of float32.
    if (has_pairs()) sets.insert(__builtin_cpu_is("amd") ? sets.end() : sets.begin(), pairs);
    if (has_amx()) sets.push_back({"amx", sets.back().of_float, sets.back().of_double, sets.back().of_float.amx});
  }
#else
  sets.push_back({"baseline", baseline::kernels<float>(), baseline::kernels<double>(), nullptr});
#endif
  // Slow, and with the bits of AMX: for tests.
  InstructionSet emulated = sets.back();
  emulated.name = "emulated", emulated.tiles = emulated.of_float.emulated;
  sets.insert(sets.begin(), emulated);
  return sets;
}

// Empty if it is not set.
std::string environment_variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

const InstructionSet& set_in_use() {
  static const InstructionSet best = [] {
    const std::string name = environment_variable("MINGRU_ISA");
    InstructionSet found{};
    for (const InstructionSet& set : sets_here()) found = name.empty() || name == set.name ? set : found;
    STD_TORCH_CHECK(found.name, "mingru: the kernels have no instruction set of this processor, or not that of MINGRU_ISA");
    return found;
  }();
  return best;
}

const Kernels& kernels_of(Storage storage) {
  return storage == Storage::float64 ? set_in_use().of_double : set_in_use().of_float;
}

// With fewer, torch's product is faster.
constexpr int64_t least_multiplications = 1 << 17;
// With fewer, a thread costs more time than it saves.
constexpr int64_t multiplications_per_thread = 1 << 20;
// The same for a step of a recurrence, whose weights are in the cache of each thread.
constexpr int64_t multiplications_per_share = 1 << 17;
// The rows of the left matrix that a task reads for each panel, from the second-level cache.
constexpr int64_t most_task_rows = 16 * tile_rows;

// With fewer weights, a thread costs more time than it saves.
constexpr int64_t weights_per_thread = 1 << 16;

class ScanTasks {
 public:
  ScanTasks(const Scan& scan, const Part& part, bool backward)
      : scan_(scan),
        part_(part),
        backward_(backward),
        kernels_(kernels_of(scan.storage)),
        forward_in_time_(scan.reverse == backward),
        size_(scan.storage == Storage::float64 ? 8 : 4) {
    const int64_t num_steps = part.end - part.begin;
    const int64_t values = (part.batch_end - part.batch_begin) * num_steps * scan.num_features;
    threads_ = std::clamp<int64_t>(values / values_per_thread, 1, torch::stable::get_num_threads());
    features_ = std::min(ceil_div(scan.num_features, group) * group, most_features);
    while (features_ > group && num_tasks() < threads_) features_ = ceil_div(features_ / 2, group) * group;
    if (num_tasks() < threads_ && may_split_time()) {
      num_chunks_ = std::min(threads_ / num_tasks(), num_steps / (4 * steps_per_checkpoint));
    }
  }

  void operator()() const {
    if (num_chunks_ > 1) return in_chunks();
    each(num_tasks(), [&](int64_t task) {
      alignas(64) char state[most_features * 8];
      start(task, state);
      kernels_.run_span(scan_, span(task, part_.begin, part_.end), state, backward_);
      finish(task, state);
    });
  }

 private:
  int64_t num_tasks() const {
    return (part_.batch_end - part_.batch_begin) * ceil_div(scan_.num_features, features_);
  }

  // Not with a gradient of the initial state, because a chunk that is run again would add its part twice.
  bool may_split_time() const { return !(backward_ && scan_.grad_initial_state && scan_.reset.data); }

  // A thread gets neighboring tasks, because their data is probably in its cache. Packed sequences are sorted by length,
  // so each of T threads gets every T-th task, which mixes long and short sequences.
  template <class F>
  void each(int64_t count, const F& f) const {
    const int64_t stride = scan_.lengths ? threads_ : 1;
    const int64_t share = scan_.lengths ? 1 : ceil_div(count, threads_);
    on_threads(threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        const int64_t last = scan_.lengths ? count : std::min(count, (thread + 1) * share);
        for (int64_t i = thread * share; i < last; i += stride) f(i);
      }
    });
  }

  Span span(int64_t task, int64_t begin, int64_t end) const {
    const int64_t ranges = ceil_div(scan_.num_features, features_);
    const int64_t batch = part_.batch_begin + task / ranges, feature = task % ranges * features_;
    if (scan_.lengths) end = std::min(end, scan_.lengths[batch]);
    return {batch, feature, std::min(features_, scan_.num_features - feature), begin, end, nullptr, false};
  }

  // In states.
  int64_t bytes_before(const Span& at) const { return (at.batch * scan_.state_stride + at.feature) * size_; }

  void copy_state(int64_t task, void* state, const void* from) const {
    const Span at = span(task, 0, 0);
    std::memset(state, 0, features_ * size_);
    if (from) std::memcpy(state, static_cast<const char*>(from) + bytes_before(at), at.num_features * size_);
  }

  void start(int64_t task, void* state) const {
    const bool is_first = forward_in_time_ ? part_.begin == 0 : part_.end == scan_.num_steps;
    const void* given = backward_ ? scan_.grad_last : scan_.h;
    copy_state(task, state, is_first ? given : backward_ ? scan_.grad_h : scan_.last);
  }

  void finish(int64_t task, const void* state) const {
    const Span at = span(task, 0, 0);
    char* to = static_cast<char*>(backward_ ? scan_.grad_h : scan_.last);
    std::memcpy(to + bytes_before(at), state, at.num_features * size_);
  }

  // If there are fewer tasks than threads, time is split into chunks that run in parallel, each from a guessed state.
  // Then the chunks are run again in order, from the true state. Such a run stops as soon as its state is bit-identical
  // to the recorded state, because the rest is already correct. The guess usually has no effect after a few hundred
  // steps, because states decay. The results are bit-identical to those of a single pass for any number of chunks.
  void in_chunks() const {
    const int64_t tasks = num_tasks();
    const int64_t num_steps = part_.end - part_.begin;
    const int64_t length = ceil_div(ceil_div(num_steps, num_chunks_), steps_per_checkpoint) * steps_per_checkpoint;
    const int64_t state_size = features_ * size_;
    const int64_t checkpoints_size = length / steps_per_checkpoint * state_size;
    Scratch ends_scratch, checkpoints_scratch;
    char* const ends = static_cast<char*>(ends_scratch.at_least(tasks * num_chunks_ * state_size));
    char* const checkpoints = static_cast<char*>(checkpoints_scratch.at_least(tasks * num_chunks_ * checkpoints_size));
    const auto chunk = [&](int64_t task, int64_t index) {
      const int64_t begin = std::min(index * length, num_steps), end = std::min(begin + length, num_steps);
      Span at = forward_in_time_ ? span(task, part_.begin + begin, part_.begin + end)
                                 : span(task, part_.end - end, part_.end - begin);
      at.checkpoints = checkpoints + (task * num_chunks_ + index) * checkpoints_size;
      return at;
    };
    each(tasks * num_chunks_, [&](int64_t item) {
      const int64_t task = item / num_chunks_, index = item % num_chunks_;
      char* state = ends + item * state_size;
      if (index == 0) start(task, state);
      if (index > 0) copy_state(task, state, backward_ ? nullptr : scan_.initial_state);
      kernels_.run_span(scan_, chunk(task, index), state, backward_);
    });
    each(tasks, [&](int64_t task) {
      char* end = ends + task * num_chunks_ * state_size;
      alignas(64) char state[most_features * 8];
      std::memcpy(state, end, state_size);
      for (int64_t index = 1; index < num_chunks_; ++index) {
        Span at = chunk(task, index);
        at.stop_at_match = true;
        if (kernels_.run_span(scan_, at, state, backward_)) std::memcpy(state, end + index * state_size, state_size);
      }
      finish(task, state);
    });
  }

  const Scan& scan_;
  const Part part_;
  const bool backward_;
  const Kernels& kernels_;
  const bool forward_in_time_;
  const int64_t size_;
  int64_t features_ = 0, num_chunks_ = 1, threads_ = 1;
};

}  // namespace

void run_scan(const Scan& scan, const Part& part, bool backward) { ScanTasks(scan, part, backward)(); }

void run_diagonal_blocks(const Scan& scan, const DiagonalBlocks& blocks, const Part& part, bool backward) {
  const Kernels& kernels = kernels_of(scan.storage);
  const int64_t batch = part.batch_end - part.batch_begin, threads = torch::stable::get_num_threads();
  const int64_t groups = blocks.is_wide() ? 1 : backward ? DiagonalBlocks::most_totals : ceil_div(threads, blocks.count);
  const int64_t size = ceil_div(ceil_div(batch, groups), blocks.per_group()) * blocks.per_group();
  const int64_t bytes = blocks.values_of_total() * (scan.storage == Storage::float64 ? 8 : 4);
  const int64_t least = ceil_div(values_per_thread, size * (part.end - part.begin) * blocks.padded);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = part.batch_begin + i / blocks.count * size, last = std::min(first + size, part.batch_end);
      char* totals = blocks.totals ? static_cast<char*>(blocks.totals) + i * bytes : nullptr;
      kernels.run_diagonal_block(scan, blocks, part, i % blocks.count, first, last, backward, totals);
    }
  };
  const int64_t tasks = ceil_div(batch, size) * blocks.count;
  blocks.is_wide() ? run(0, tasks) : on_threads(tasks, least, run);
}

void share_wide_block(
    int64_t count, int64_t multiplications, void (*f)(const void*, int64_t, int64_t), const void* given) {
  on_threads(count, ceil_div(multiplications_per_share, multiplications), [&](int64_t begin, int64_t end) {
    f(given, begin, end);
  });
}

const Tiles* tiles_in_use() { return set_in_use().tiles; }

void pack_diagonal_blocks(const DiagonalBlocks& blocks, Storage storage, void* packed, bool is_transposed) {
  const Kernels& kernels = kernels_of(storage);
  for_each(blocks.count, blocks.num_gates * blocks.size * blocks.padded, [&](int64_t block) {
    kernels.pack_diagonal_block(blocks, packed, block, is_transposed);
  });
}

void pack_input_weights(const InputWeights& weights, const DiagonalBlocks& blocks, void* packed) {
  const Kernels& kernels = kernels_of(Storage::float32);
  for_each(blocks.count, blocks.num_gates * blocks.padded * weights.num_x, [&](int64_t block) {
    kernels.pack_input_weights(weights, blocks, packed, block);
  });
}

void multiply_few_rows(const Product& product) {
  const int64_t least = std::max<int64_t>(1, weights_per_thread / product.features);
  const Kernels& kernels = kernels_of(product.storage);
  on_threads(
      product.columns, least, [&](int64_t begin, int64_t end) { kernels.multiply_few_rows(product, begin, end); });
}

// torch calls MKL, which takes 1.1 times as long on AMD's Zen 4, and twice as long as oneDNN on Zen 5 (docs/speed.md).
// The environment variable MINGRU_PRODUCT, "mingru" or "torch", chooses elsewhere. It depends on no measurement at run
// time, so that results are the same in every run.
bool multiplies_in_tiles() {
#ifdef MINGRU_X86
  static const std::string name = environment_variable("MINGRU_PRODUCT");
  static const bool is_faster = name.empty() ? __builtin_cpu_is("amd") != 0 : name == "mingru";
  return is_faster && kernels_of(Storage::float32).multiply_panel;
#else
  return false;
#endif
}

bool is_faster_in_tiles(const MatrixProduct& product) {
  return multiplies_in_tiles() && product.rows >= least_tiled_rows &&
         product.rows * product.columns * product.depth >= least_multiplications;
}

void multiply_in_tiles(const MatrixProduct& product, float* packed) {
  const Kernels& kernels = kernels_of(Storage::float32);
  const int64_t rows = product.rows;
  // Parts of the right matrix that fit in the memory.
  const int64_t width = ceil_div(product.columns, panel_columns) * panel_columns;
  const int64_t most_columns = std::min(most_packed / tile_depth, width);
  const int64_t most_depth = most_packed / most_columns / tile_depth * tile_depth;
  // Each thread gets as many shares of the rows.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t shares = ceil_div(ceil_div(rows, most_task_rows), threads) * threads;
  const int64_t task_rows = ceil_div(ceil_div(rows, shares), tile_rows) * tile_rows;
  for (int64_t column = 0; column < product.columns; column += most_columns) {
    MatrixProduct part = product;
    part.columns = std::min(most_columns, product.columns - column);
    part.right.data += column * part.right.column_stride;
    part.out += column;
    if (part.added) part.added += column;
    const int64_t panels = ceil_div(part.columns, panel_columns), tasks = ceil_div(rows, task_rows) * panels;
    for (int64_t k = 0; k < product.depth; k += most_depth) {
      part.depth = std::min(most_depth, product.depth - k);
      const int64_t panel_size = panel_columns * part.depth;
      for_each(panels, panel_size, [&](int64_t i) { kernels.pack_panel(part, packed + i * panel_size, i); });
      const int64_t least = ceil_div(multiplications_per_thread, task_rows * panel_size);
      on_threads(tasks, least, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t panel = i % panels, row = i / panels * task_rows;
          kernels.multiply_panel(part, packed + panel * panel_size, panel, row, std::min(row + task_rows, rows));
        }
      });
      part.left.data += part.depth * part.left.column_stride;
      part.right.data += part.depth * part.right.row_stride;
      part.added = part.out;
      part.added_stride = part.out_stride;
    }
  }
}

// By columns, so that the order of a sum does not depend on the number of threads.
void add_rows(const RowSum& sum) {
  const Kernels& kernels = kernels_of(sum.storage);
  const int64_t least = ceil_div(values_per_thread, sum.num_rows * group);
  on_threads(ceil_div(sum.columns, group), least, [&](int64_t begin, int64_t end) {
    kernels.add_rows(sum, begin * group, std::min(end * group, sum.columns));
  });
}

void normalize(const Normalization& of, bool is_backward) {
  const Kernels& kernels = kernels_of(of.storage);
  const int64_t least = ceil_div(values_per_thread, of.features);
  on_threads(
      of.rows, least, [&](int64_t begin, int64_t end) { kernels.normalize(of, begin, end, is_backward); });
}

void convolve(const Convolution& of, bool is_backward) {
  const Kernels& kernels = kernels_of(of.scan.storage);
  const int64_t values = Convolution::task_rows * of.scan.num_features;
  for_each(of.num_tasks(), values, [&](int64_t task) { kernels.convolve(of, task, is_backward); });
}

// The number of the sources, which src/mingru/ops/backends/sources.py reads in the built file. Not constant, so that it
// is after everything else, and only a whole file has it.
char built_from[] = "built from the mingru sources " C10_STRINGIZE(MINGRU_SOURCES) ".";

std::string instruction_sets() {
  std::string names;
  for (const InstructionSet& set : sets_here()) names += std::string(set.name) + " ";
  return names;
}

}  // namespace mingru
