// The loops over the steps, compiled once for each instruction set (kernels_*.cpp).
#pragma once

#include "convert.h"
#include "convolution.h"
#include "diagonal_blocks.h"
#include "lanes.h"
#include "norm.h"
#include "product.h"
#include "tiles.h"

namespace mingru::MINGRU_ISA {

// The number of values in a tile, which stays in the first-level cache.
constexpr int64_t tile_size = 512;

// Features of some steps in the accumulation type. Whole groups that need no conversion are not copied.
template <class A>
class Tile {
 public:
  template <class T>
  Rows<const A> read(Rows<const T> from, int64_t steps, int64_t count, const A* bias = nullptr) {
    Rows<const A> features = place<const A>(from, count);
    if (features.data == values_) load(values_, from, steps, count);
    if (!bias) return features;
    A rest[group] = {};
    if (count < group) {
      copy_few(rest, bias, count);
      bias = rest;
    }
    const int64_t padded = padded_size(count);
    for (int64_t step = 0; step < steps; ++step, features.data += features.stride) {
      A* to = values_ + step * padded;
      MINGRU_LANES
      for (int64_t i = 0; i < padded; ++i) to[i] = features.data[i] + bias[i];
    }
    return {values_, padded};
  }

  // The given memory, or that of the tile if features are copied. There they are to be written before `write` is called
  // with the same arguments.
  template <class Value, class T>
  Rows<Value> place(Rows<T> rows, int64_t count) {
    if constexpr (std::is_same_v<T, Value>) {
      if (count >= group) return rows;
    }
    return {values_, padded_size(count)};
  }

  template <class T>
  void write(Rows<T> to, int64_t steps, int64_t count) {
    if (!std::is_same_v<T, A> || count < group) store(to, values_, steps, count);
  }

  A* values() { return values_; }

 private:
  alignas(64) A values_[tile_size];
};

// Successive steps in the order of the pass, at equal distances in memory.
struct Run {
  int64_t position, stride, steps;
};

// The steps of a span.
template <class T>
class Steps {
  using A = Accumulated<T>;

 public:
  Steps(const Scan& scan, const Span& span, void* state, bool is_backward)
      : scan_(scan), span_(span), is_backward_(is_backward), state_(static_cast<A*>(state)) {
    lanes_.scan = &scan;
  }

  // Returns whether the run stopped at a match.
  bool operator()() {
    for (int64_t done = 0; done < num_steps();) {
      const Run run = run_from(done);
      const bool is_reset = is_reset_at(run.position);
      if (is_reset && !is_backward_) reset();
      // Whole groups, and then the rest.
      for (int64_t feature = 0, count; feature < span_.num_features; feature += count) {
        count = span_.num_features - feature;
        if (count >= group) count = count / group * group;
        run_features(run, done, span_.feature + feature, count);
      }
      if (is_reset && is_backward_) reset();
      done += run.steps;
      if (is_at_match(done)) return true;
    }
    return false;
  }

 private:
  int64_t num_steps() const { return span_.end - span_.begin; }

  // The place in the dimension of time, or in packed data, after a number of steps of the pass.
  int64_t position_of(int64_t done) const {
    const int64_t step = scan_.reverse != is_backward_ ? span_.end - 1 - done : span_.begin + done;
    return scan_.step_offsets ? scan_.step_offsets[step] : step;
  }

  bool is_reset_at(int64_t position) const { return scan_.is_reset(span_.batch, position); }

  // Whether the step of a backward pass is the first of the sequence.
  bool is_first(int64_t done) const {
    const int64_t length = scan_.lengths ? scan_.lengths[span_.batch] : scan_.num_steps;
    return scan_.reverse ? span_.begin + done == length - 1 : span_.end - 1 - done == 0;
  }

  // As many steps as the tiles have place for, until the next reset and the next checkpoint. Steps whose previous state is
  // not in `out` are alone.
  Run run_from(int64_t done) const {
    const int64_t widest = span_.num_features < group ? group : span_.num_features / group * group;
    const bool is_copied = !std::is_same_v<T, A> || scan_.biases[0] || scan_.has_output_gate;
    int64_t most = tile_size / (is_copied ? widest : group);
    if (span_.checkpoints) most = least_of(most, steps_per_checkpoint - done % steps_per_checkpoint);
    most = least_of(most, num_steps() - done);
    Run run = {position_of(done), 0, 1};
    if (is_backward_ && (is_reset_at(run.position) || is_first(done))) return run;
    if (most > 1) run.stride = position_of(done + 1) - run.position;
    while (run.steps < most) {
      const int64_t next = done + run.steps, position = position_of(next);
      if (position != run.position + run.steps * run.stride || is_reset_at(position)) break;
      if (is_backward_ && (is_first(next) || position_of(next + 1) != position + run.stride)) break;
      ++run.steps;
    }
    return run;
  }

  // The values of a run, from `feature` on.
  template <class Value>
  Rows<Value> rows_of(const Sequence& sequence, const Run& run, int64_t feature) const {
    const int64_t first = sequence.index(span_.batch, run.position) + feature;
    return {static_cast<Value*>(sequence.data) + first, run.stride * sequence.step_stride};
  }

  // The state of the batch element, which is 0 without states.
  const A* state_of(const void* states) const {
    static constexpr A zeros[most_features] = {};
    return states ? static_cast<const A*>(states) + span_.batch * scan_.state_stride + span_.feature : zeros;
  }

  void run_features(const Run& run, int64_t done, int64_t feature, int64_t count) {
    const int num_inputs = loops_.num_inputs, num_written = is_backward_ ? num_inputs : 1;
    const Sequence* written = is_backward_ ? scan_.grad_inputs : &scan_.out;
    static constexpr A one = 1;
    lanes_.steps = run.steps;
    lanes_.groups = padded_size(count) / group;
    lanes_.feature = feature;
    lanes_.state = state_ + feature - span_.feature;
    lanes_.dt = {&one, 0};
    if (scan_.dt.data) lanes_.dt = rows_of<const A>(scan_.dt, run, 0);
    for (int k = 0; k < num_inputs; ++k) lanes_.read[k] = read_input(k, tiles_[k], run, feature, count);
    if (is_backward_) {
      const auto grad_out = rows_of<const T>(scan_.grad_out, run, feature);
      lanes_.read[num_inputs] = tiles_[num_inputs].read(grad_out, run.steps, count);
      if (scan_.has_output_gate) lanes_.read[num_inputs] = gate_backward(lanes_.read[num_inputs], run, feature, count);
      lanes_.read[num_inputs + 1] = previous_states(run, done, feature, count);
      if (scan_.grads_of_dt.data) lanes_.grads_of_dt = rows_of<A>(scan_.grads_of_dt, run, 0);
    }
    for (int k = 0; k < num_written; ++k) {
      lanes_.written[k] = written_tiles_[k].template place<A>(rows_of<T>(written[k], run, feature), count);
    }
    loops_.run[is_backward_](lanes_);
    for (int k = 0; k < num_written; ++k) {
      written_tiles_[k].write(rows_of<T>(written[k], run, feature), run.steps, count);
    }
    if (scan_.has_output_gate && !is_backward_) gate_states(run, feature, count);
  }

  Rows<const A> read_input(int k, Tile<A>& tile, const Run& run, int64_t feature, int64_t count) {
    const A* bias = static_cast<const A*>(scan_.biases[k]);
    if (bias) bias += feature;
    return tile.read(rows_of<const T>(scan_.inputs[k], run, feature), run.steps, count, bias);
  }

  // Writes the states of a run, times silu(gate).
  void gate_states(const Run& run, int64_t feature, int64_t count) {
    const Rows<const A> gate = read_input(loops_.num_inputs, gate_tiles_[0], run, feature, count);
    const Rows<T> gated = rows_of<T>(scan_.gated, run, feature);
    const Rows<A> states = lanes_.written[0], to = gate_tiles_[1].template place<A>(gated, count);
    const int64_t padded = padded_size(count);
    for (int64_t step = 0; step < run.steps; ++step) {
      const A *h = states.data + step * states.stride, *v = gate.data + step * gate.stride;
      A* out = to.data + step * to.stride;
      MINGRU_LANES
      for (int64_t i = 0; i < padded; ++i) out[i] = h[i] * silu(v[i]).value;
    }
    gate_tiles_[1].write(gated, run.steps, count);
  }

  // Returns the gradients of the states of a run from those of the gated states, and writes those of the gate.
  Rows<const A> gate_backward(Rows<const A> grad_out, const Run& run, int64_t feature, int64_t count) {
    const int gate_index = loops_.num_inputs;
    const Rows<const A> gate = read_input(gate_index, gate_tiles_[0], run, feature, count);
    const Rows<const A> states = gate_tiles_[1].read(rows_of<const T>(scan_.out, run, feature), run.steps, count);
    const Rows<T> written = rows_of<T>(scan_.grad_inputs[gate_index], run, feature);
    const Rows<A> grads = gate_tiles_[2].template place<A>(written, count);
    const int64_t padded = padded_size(count);
    const Rows<A> grad_states = {gate_tiles_[3].values(), padded};
    for (int64_t step = 0; step < run.steps; ++step) {
      const A *h = states.data + step * states.stride, *v = gate.data + step * gate.stride;
      const A* grad = grad_out.data + step * grad_out.stride;
      A *of_gate = grads.data + step * grads.stride, *of_state = grad_states.data + step * grad_states.stride;
      MINGRU_LANES
      for (int64_t i = 0; i < padded; ++i) {
        const Value<A> opened = silu(v[i]);
        of_gate[i] = grad[i] * h[i] * opened.slope;
        of_state[i] = grad[i] * opened.value;
      }
    }
    gate_tiles_[2].write(written, run.steps, count);
    return {grad_states.data, grad_states.stride};
  }

  Rows<const A> previous_states(const Run& run, int64_t done, int64_t feature, int64_t count) {
    Tile<A>& tile = tiles_[most_inputs + 1];
    const bool is_reset = is_reset_at(run.position);
    if (!is_reset && !is_first(done)) {
      const Run before = {position_of(done + 1), run.stride, run.steps};
      return tile.read(rows_of<const T>(scan_.out, before, feature), run.steps, count);
    }
    const A* previous = state_of(is_reset ? scan_.initial_state : scan_.h);
    return tile.read(Rows<const A>{previous + feature - span_.feature, 0}, run.steps, count);
  }

  // The state becomes the initial state. Backward, its gradient is a part of that of the initial state.
  void reset() {
    const A* next = state_of(is_backward_ ? nullptr : scan_.initial_state);
    A* gradient = static_cast<A*>(scan_.grad_initial_state);
    if (gradient) gradient += span_.batch * scan_.state_stride + span_.feature;
    for (int64_t i = 0; i < span_.num_features; ++i) {
      if (gradient) gradient[i] += state_[i];
      state_[i] = next[i];
    }
  }

  // Records the state. If `stop_at_match`, returns true if it equals the state that was recorded before.
  bool is_at_match(int64_t done) {
    if (!span_.checkpoints || done % steps_per_checkpoint != 0) return false;
    const int64_t size = padded_size(span_.num_features) * sizeof(A);
    void* recorded = static_cast<char*>(span_.checkpoints) + (done / steps_per_checkpoint - 1) * size;
    if (span_.stop_at_match && std::memcmp(recorded, state_, size) == 0) return true;
    std::memcpy(recorded, state_, size);
    return false;
  }

  const Scan& scan_;
  const Span& span_;
  const bool is_backward_;
  A* const state_;
  const Loops<A> loops_ = loops_of<A>(scan_);
  Lanes<A> lanes_{};
  Tile<A> tiles_[most_inputs + 2], written_tiles_[most_inputs], gate_tiles_[4];
};

template <class A>
static bool run_span(const Scan& scan, const Span& span, void* state, bool is_backward) {
  return with_type<A>(scan.storage, [&](auto type) { return Steps<decltype(type)>(scan, span, state, is_backward)(); });
}

// The files kernels_*.cpp instantiate this function.
template <class A>
Kernels kernels() {
  Kernels all{run_span<A>, multiply_few_rows<A>, normalize<A>, convolve<A>, add_rows<A>, run_diagonal_block<A>, pack_diagonal_block<A>};
#ifdef MINGRU_AVX512
  all.pack_panel = pack_panel, all.multiply_panel = multiply_panel;
  if constexpr (std::is_same_v<A, float>) all.pairs = &pair_products, all.amx = &tiles_of<Amx>;
#endif
  if constexpr (std::is_same_v<A, float>) all.pack_input_weights = pack_input_weights<A>, all.emulated = &tiles_of<Emulated>;
  return all;
}

}  // namespace mingru::MINGRU_ISA
