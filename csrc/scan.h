// The types that kernels and operators share. Letters: B batch, S steps, N features (all trailing sizes as one).
#pragma once

#include <cstdint>

namespace mingru {

enum class Storage { float32, float64, bfloat16, float16 };

// Every cell: its name (Python joins the names of cell and activation), its number of inputs, and its struct in cells.h.
// This list is the only one: the kinds, the names that operators accept and the kernels are all made from it.
#define MINGRU_CELLS(CELL)                      \
  CELL(linear_scan, 2, LinearScan)              \
  CELL(mingru_positive, 2, MinGRU<Positive>)    \
  CELL(mingru_linear, 2, MinGRU<Linear>)        \
  CELL(mingru_tanh, 2, MinGRU<Tanh>)            \
  CELL(minlstm_positive, 3, MinLSTM<Positive>)  \
  CELL(minlstm_linear, 3, MinLSTM<Linear>)      \
  CELL(minlstm_tanh, 3, MinLSTM<Tanh>)

#define MINGRU_KIND(name, num_inputs, type) name,
enum class CellKind { MINGRU_CELLS(MINGRU_KIND) };
#undef MINGRU_KIND

constexpr int most_inputs = 3;
// A state of this many features stays in the first-level cache beside the data that passes through.
constexpr int64_t most_features = 512;
// Features are computed in groups of this many, whatever is asked for, so that the split into tasks never changes the
// numbers.
constexpr int64_t group = 16;
// When time is split between threads, the state is recorded after this many steps.
constexpr int64_t steps_per_checkpoint = 64;

// A sequence in memory, or a part of one; the features of a step are contiguous. Strides count elements.
struct Sequence {
  void* data = nullptr;
  int64_t batch_stride = 0, step_stride = 0;
  int64_t skipped = 0;  // elements of the whole that come before `data`
};

// States are (B, N), contiguous, in the accumulation dtype.
struct Scan {
  CellKind cell;
  Storage storage;
  int64_t num_batch, num_steps, num_features;
  bool reverse;
  // Sequences of different lengths, packed as torch packs them, the longest first: step t of all sequences that have one
  // begins at row step_rows[t]. Both are null for padded sequences.
  const int64_t* step_rows;
  const int64_t* lengths;
  Sequence inputs[most_inputs];
  // Added to each input: (N) rounded up to whole groups, in the accumulation dtype; either all are null or none is.
  const void* biases[most_inputs];
  Sequence out;
  const uint8_t* reset;  // may be null; not bool, because a bool tensor viewed from bytes may hold others than 0 and 1
  int64_t reset_batch_stride, reset_step_stride;
  const void* h;
  const void* initial_state;  // the state after a reset; null: 0
  void* last;
  // Backward only.
  Sequence grad_out;
  Sequence grad_inputs[most_inputs];
  const void* grad_last;
  void* grad_h;
  void* grad_initial_state;  // may be null
};

// Batch elements and steps of a scan, both in the order of memory.
struct Part {
  int64_t batch_begin, batch_end, begin, end;
};

// The features [feature, feature + num_features) of one batch element, and its steps [begin, end), in either direction.
// `state` is read and written. `checkpoints` (the state after every `steps_per_checkpoint` steps; may be null) is written.
// With `stop_at_match` it is also compared: the run ends as soon as the state equals the recorded one, because everything
// after that is then the same. Returns whether it ended early.
struct Span {
  int64_t batch, feature, num_features, begin, end;
  void* checkpoints;
  bool stop_at_match;
};

using Kernel = bool (*)(const Scan&, const Span&, void* state, bool backward);

}  // namespace mingru
