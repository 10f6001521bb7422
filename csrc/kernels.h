// The loops over the steps, compiled once for each instruction set (kernels_*.cpp).
#pragma once

#include "convert.h"
#include "lanes.h"

namespace mingru::MINGRU_ISA {

MINGRU_INLINE int64_t padded_size(int64_t features) { return (features + group - 1) / group * group; }

// Copies fewer values than a group, without the call that memcpy is for a variable number.
template <int64_t size = group / 2, class T>
MINGRU_INLINE void copy_few(T* to, const T* from, int64_t count) {
  const int64_t copied = count & size;
  if (copied) std::memcpy(to, from, size * sizeof(T));
  if constexpr (size > 1) copy_few<size / 2>(to + copied, from + copied, count);
}

// The values of a step in a tile: whole groups of features, or fewer than a group, which are padded with 0. Whole groups
// that need no conversion are not copied.
template <class A, class T>
MINGRU_NOT_INLINE void load(A* to, Rows<const T> from, int64_t steps, int64_t count) {
  for (int64_t step = 0; step < steps; ++step, from.data += from.stride, to += padded_size(count)) {
    if constexpr (has_conversion<T>) {
      T rest[group] = {};
      if (count < group) copy_few(rest, from.data, count);
      for (int64_t i = 0; i < count; i += group) read(to + i, count < group ? rest : from.data + i);
    } else {
      std::memset(to, 0, group * sizeof(T));
      copy_few(to, from.data, count);
    }
  }
}

template <class A, class T>
MINGRU_NOT_INLINE void store(Rows<T> to, const A* from, int64_t steps, int64_t count) {
  for (int64_t step = 0; step < steps; ++step, to.data += to.stride, from += padded_size(count)) {
    if constexpr (has_conversion<T>) {
      T rest[group];
      for (int64_t i = 0; i < count; i += group) write(count < group ? rest : to.data + i, from + i);
      if (count < group) copy_few(to.data, rest, count);
    } else {
      copy_few(to.data, from, count);
    }
  }
}

// The number of values in a tile, which stays in the first-level cache.
constexpr int64_t tile_size = 512;

// Features of some steps in the accumulation type, copied only if needed.
template <class A>
class Tile {
 public:
  // The bias may be null. If there are no features, they are 0.
  template <class T>
  Rows<const A> read(Rows<const T> from, const A* bias, int64_t steps, int64_t count) {
    const int64_t padded = padded_size(count);
    const Rows<const A> copied = {values_, padded};
    if constexpr (std::is_same_v<T, A>) {
      if (from.data && count >= group) return bias ? add(from, bias, steps, padded) : from;
    }
    if (from.data) {
      load(values_, from, steps, count);
    } else {
      std::memset(values_, 0, steps * padded * sizeof(A));
    }
    return bias ? add(copied, bias, steps, padded) : copied;
  }

  // Where the features are to be written before `write` is called with the same arguments.
  template <class T>
  Rows<A> place(Rows<T> to, int64_t count) {
    if constexpr (std::is_same_v<T, A>) {
      if (count >= group) return to;
    }
    return {values_, padded_size(count)};
  }

  template <class T>
  void write(Rows<T> to, int64_t steps, int64_t count) {
    if (!std::is_same_v<T, A> || count < group) store(to, values_, steps, count);
  }

 private:
  Rows<const A> add(Rows<const A> features, const A* bias, int64_t steps, int64_t padded) {
    for (int64_t step = 0; step < steps; ++step, features.data += features.stride) {
      A* to = values_ + step * padded;
      MINGRU_LANES
      for (int64_t i = 0; i < padded; ++i) to[i] = features.data[i] + bias[i];
    }
    return {values_, padded};
  }

  alignas(64) A values_[tile_size];
};

// Successive steps in the order of the pass, at equal distances in memory.
struct Run {
  int64_t position, stride, steps;
};

// The features of a sequence from `span.feature` on.
template <class T>
struct Features {
  T* data = nullptr;
  int64_t first = 0, stride = 0;

  Features() = default;
  Features(const Sequence& sequence, const Span& span)
      : data(static_cast<T*>(sequence.data)),
        first(
            (sequence.batch_offsets ? sequence.batch_offsets[span.batch] : span.batch * sequence.batch_stride) +
            span.feature - sequence.skipped),
        stride(sequence.step_stride) {}

  // From `feature` after `span.feature` on.
  Rows<T> of(const Run& run, int64_t feature) const {
    return {data + (first + run.position * stride + feature), run.stride * stride};
  }
};

// The steps of a span.
template <class T, class A>
class Steps {
 public:
  Steps(const Scan& scan, const Span& span, const Loops<A>& loops, A* state, bool is_backward)
      : scan_(scan),
        span_(span),
        loops_(loops),
        is_backward_(is_backward),
        padded_(padded_size(span.num_features)),
        state_(state) {
    for (int k = 0; k < loops.num_inputs; ++k) inputs_[k] = {scan.inputs[k], span};
    lanes_.time.log_bound = static_cast<A>(scan.log_bound);
    lanes_.time.log_range = static_cast<A>(scan.log_range);
  }

  bool operator()() { return is_backward_ ? backward() : forward(); }

 private:
  static constexpr const A* no_bias = nullptr;

  bool forward() {
    const A* initial_state = state_at(scan_.initial_state);
    const Features<T> out(scan_.out, span_);
    Tile<A> out_tile;
    for (int64_t done = 0; done < num_steps();) {
      const Run run = run_from(done);
      if (is_reset(run.position)) {
        for (int64_t i = 0; i < span_.num_features; ++i) state_[i] = initial_state ? initial_state[i] : A(0);
      }
      for_each_block(run, [&](int64_t feature, int64_t count) {
        lanes_.out = out_tile.place(out.of(run, feature), count);
        loops_.forward(lanes_);
        out_tile.write(out.of(run, feature), run.steps, count);
      });
      done += run.steps;
      if (is_at_match(done)) return true;
    }
    return false;
  }

  bool backward() {
    const A *initial_state = state_at(scan_.initial_state), *h = state_at(scan_.h);
    A* grad_initial_state = state_at(scan_.grad_initial_state);
    const Features<const T> out(scan_.out, span_), grad_out(scan_.grad_out, span_);
    Features<T> grads[most_inputs];
    for (int k = 0; k < loops_.num_inputs; ++k) grads[k] = {scan_.grad_inputs[k], span_};
    Tile<A> grad_out_tile, previous_tile, grad_tiles[most_inputs];
    A grads_of_dt[tile_size];
    for (int64_t done = 0; done < num_steps();) {
      const Run run = run_from(done);
      const bool reset = is_reset(run.position), is_in_out = !reset && !is_first(done);
      const A* previous = reset ? initial_state : h;
      for_each_block(run, [&](int64_t feature, int64_t count) {
        lanes_.grad_out = grad_out_tile.read(grad_out.of(run, feature), no_bias, run.steps, count);
        if (is_in_out) {
          const Run before = {position_of(done + 1), run.stride, run.steps};
          lanes_.previous = previous_tile.read(out.of(before, feature), no_bias, run.steps, count);
        } else {
          const Rows<const A> given = {previous ? previous + feature : nullptr, 0};
          lanes_.previous = previous_tile.read(given, no_bias, run.steps, count);
        }
        for (int k = 0; k < loops_.num_inputs; ++k) {
          lanes_.grads[k] = grad_tiles[k].place(grads[k].of(run, feature), count);
        }
        lanes_.grads_of_dt = {grads_of_dt, padded_size(count)};
        loops_.backward(lanes_);
        for (int k = 0; k < loops_.num_inputs; ++k) grad_tiles[k].write(grads[k].of(run, feature), run.steps, count);
        if (scan_.grads_of_dt) set_grads_of_dt(run, feature);
      });
      if (reset) {
        for (int64_t i = 0; i < span_.num_features; ++i) {
          if (grad_initial_state) grad_initial_state[i] += state_[i];
          state_[i] = A(0);
        }
      }
      done += run.steps;
      if (is_at_match(done)) return true;
    }
    return false;
  }

  int64_t num_steps() const { return span_.end - span_.begin; }

  // The place in the dimension of time, or in packed data, after a number of steps of the pass.
  int64_t position_of(int64_t done) const {
    const int64_t step = scan_.reverse != is_backward_ ? span_.end - 1 - done : span_.begin + done;
    return scan_.step_offsets ? scan_.step_offsets[step] : step;
  }

  bool is_reset(int64_t position) const {
    return scan_.reset && scan_.reset[span_.batch * scan_.reset_batch_stride + position * scan_.reset_step_stride];
  }

  // Whether the step of a backward pass is the first of the sequence.
  bool is_first(int64_t done) const {
    const int64_t length = scan_.lengths ? scan_.lengths[span_.batch] : scan_.num_steps;
    return scan_.reverse ? span_.begin + done == length - 1 : span_.end - 1 - done == 0;
  }

  // As many steps as the tiles have place for, until the next reset and the next checkpoint. Steps whose previous state is
  // not in `out` are alone.
  Run run_from(int64_t done) const {
    const int64_t widest = span_.num_features < group ? group : span_.num_features / group * group;
    const bool is_copied = !std::is_same_v<T, A> || scan_.biases[0] || (loops_.is_timed && is_backward_);
    int64_t most = tile_size / (is_copied ? widest : group);
    if (span_.checkpoints) most = smaller(most, steps_per_checkpoint - done % steps_per_checkpoint);
    most = smaller(most, num_steps() - done);
    Run run = {position_of(done), 0, 1};
    if (is_backward_ && (is_reset(run.position) || is_first(done))) return run;
    if (most > 1) run.stride = position_of(done + 1) - run.position;
    while (run.steps < most) {
      const int64_t next = done + run.steps, position = position_of(next);
      if (position != run.position + run.steps * run.stride || is_reset(position)) break;
      if (is_backward_ && (is_first(next) || position_of(next + 1) != position + run.stride)) break;
      ++run.steps;
    }
    return run;
  }

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  template <class Pointer>
  auto state_at(Pointer* states) const {
    using Value = std::conditional_t<std::is_const_v<Pointer>, const A, A>;
    return states ? static_cast<Value*>(states) + span_.batch * scan_.num_features + span_.feature : nullptr;
  }

  // Calls `pass` for whole groups, and then for the rest.
  template <class F>
  void for_each_block(const Run& run, const F& pass) {
    static constexpr A one = 1;
    lanes_.steps = run.steps;
    lanes_.dt = {&one, 0};
    if (scan_.dt) {
      const int64_t at = span_.batch * scan_.dt_batch_stride + run.position * scan_.dt_step_stride;
      lanes_.dt = {static_cast<const A*>(scan_.dt) + at, run.stride * scan_.dt_step_stride};
    }
    for (int64_t feature = 0, count; feature < span_.num_features; feature += count) {
      count = span_.num_features - feature;
      if (count >= group) count = count / group * group;
      lanes_.groups = padded_size(count) / group;
      for (int k = 0; k < loops_.num_inputs; ++k) {
        const A* bias = static_cast<const A*>(scan_.biases[k]);
        if (bias) bias += span_.feature + feature;
        lanes_.inputs[k] = input_tiles_[k].read(inputs_[k].of(run, feature), bias, run.steps, count);
      }
      lanes_.state = state_ + feature;
      pass(feature, count);
    }
  }

  // Records the state. If `stop_at_match`, returns true if it equals the state that was recorded before.
  bool is_at_match(int64_t done) {
    if (!span_.checkpoints || done % steps_per_checkpoint != 0) return false;
    A* recorded = static_cast<A*>(span_.checkpoints) + (done / steps_per_checkpoint - 1) * padded_;
    if (span_.stop_at_match && std::memcmp(recorded, state_, padded_ * sizeof(A)) == 0) return true;
    std::memcpy(recorded, state_, padded_ * sizeof(A));
    return false;
  }

  // Sums the gradients of dt over each group.
  void set_grads_of_dt(const Run& run, int64_t feature) const {
    const int64_t size = loops_.is_complex ? group / 2 : group;
    for (int64_t step = 0; step < run.steps; ++step) {
      const A* from = lanes_.grads_of_dt.data + step * lanes_.grads_of_dt.stride;
      const int64_t at = span_.batch * scan_.grads_of_dt_batch_stride +
                         (run.position + step * run.stride) * scan_.grads_of_dt_step_stride;
      A* to = static_cast<A*>(scan_.grads_of_dt) + at + (span_.feature + feature) / group;
      for (int64_t i = 0; i < lanes_.groups; ++i, from += size) {
        A sum = A(0);
        for (int64_t k = 0; k < size; ++k) sum += from[k];
        to[i] = sum;
      }
    }
  }

  const Scan& scan_;
  const Span& span_;
  const Loops<A> loops_;
  const bool is_backward_;
  const int64_t padded_;
  A* const state_;
  Features<const T> inputs_[most_inputs];
  Tile<A> input_tiles_[most_inputs];
  Lanes<A> lanes_;
};

template <class T, class A>
static bool run_steps(const Scan& scan, const Span& span, A* state, bool is_backward) {
  return Steps<T, A>(scan, span, loops_of<A>(scan), state, is_backward)();
}

bool run(const Scan& scan, const Span& span, void* state, bool is_backward) {
  switch (scan.storage) {
    case Storage::float32: return run_steps<float>(scan, span, static_cast<float*>(state), is_backward);
    case Storage::float64: return run_steps<double>(scan, span, static_cast<double*>(state), is_backward);
    case Storage::bfloat16: return run_steps<BFloat16>(scan, span, static_cast<float*>(state), is_backward);
    case Storage::float16: return run_steps<Half>(scan, span, static_cast<float*>(state), is_backward);
  }
  return false;
}

}  // namespace mingru::MINGRU_ISA
