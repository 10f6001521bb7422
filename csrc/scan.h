// The types that kernels and operators share. Letters: B batch, S steps, N lanes (all trailing sizes as one).
#pragma once

#include <cstdint>

namespace mingru {

enum class Storage { float32, float64, bfloat16, float16 };
// In this order Python numbers them (body_native.py).
enum class CellKind {
  linear_scan,
  mingru_positive,
  mingru_linear,
  mingru_tanh,
  minlstm_positive,
  minlstm_linear,
  minlstm_tanh,
};

constexpr int most_inputs = 3;
// State of this many lanes stays in the first-level cache beside the rows that pass through.
constexpr int64_t most_lanes = 512;
// Lanes are computed in groups of this many, whatever is asked for, so that how work is cut never shows in the numbers.
constexpr int64_t group = 16;
// Where time is cut for want of other work, the state is noted after this many steps.
constexpr int64_t steps_per_note = 64;

// A sequence (B, S, N) in memory, or what is there of it; lanes lie side by side. Strides count elements.
struct Sequence {
  void* data = nullptr;
  int64_t batch_stride = 0, step_stride = 0;
  int64_t skipped = 0;  // elements of the whole that come before `data`
};

// States (B, N) in the type of computation, dense.
struct Scan {
  CellKind cell;
  Storage storage;
  int64_t num_batch, num_steps, num_lanes;
  bool reverse;
  // Sequences of different lengths, packed as torch packs them, the longest first: step t of all that have one lies in
  // the rows from step_rows[t] on. Both null: (B, S).
  const int64_t* step_rows;
  const int64_t* lengths;
  Sequence inputs[most_inputs];
  // Added to each input: (N) rounded up to whole groups, in the type of computation; all null or none.
  const void* biases[most_inputs];
  Sequence out;
  const uint8_t* reset;  // may be null; not bool, as a bool tensor viewed from bytes may hold others than 0 and 1
  int64_t reset_batch_stride, reset_step_stride;
  const void* h;
  const void* initial;  // null: 0
  void* last;
  // Backward only.
  Sequence grad_out;
  Sequence grad_inputs[most_inputs];
  const void* grad_last;
  void* grad_h;
  void* grad_initial;  // may be null
};

// Batch elements and steps of a scan, both in the order of memory.
struct Part {
  int64_t batch_begin, batch_end, begin, end;
};

// One batch element's lanes [lane, lane + num_lanes), and its steps [begin, end), whichever way they are gone through.
// `state` goes in and comes out. `notes` (a row of lanes after every `steps_per_note` steps, may be null) is written, or,
// with `until_met`, compared: the run ends early where the state is the noted one, as all that follows is then the same.
// Returns whether it ended early.
struct Span {
  int64_t batch, lane, num_lanes, begin, end;
  void* notes;
  bool until_met;
};

using Kernel = bool (*)(const Scan&, const Span&, void* state, bool backward);

}  // namespace mingru
