// Makes a `Scan` from tensors: checks them for memory safety, and keeps them alive while the scan points into them.
// A sequence is (B, S, *), (S, B, *) if `time_first`, or packed, (P, *), if there are `batch_sizes` (S); see
// src/mingru/ops/layout.py. N is the product of the trailing sizes *.
#pragma once

#include <torch/csrc/stable/library.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "call.h"

// Registers a function as the operator of its name, for this key of the dispatcher.
#define MINGRU_OPERATOR(function, key, schema)                                       \
  STABLE_TORCH_LIBRARY_FRAGMENT(mingru, library) { library.def(#function schema); } \
  STABLE_TORCH_LIBRARY_IMPL(mingru, key, library) { library.impl(#function, TORCH_BOX(&function)); }

namespace mingru {
namespace {

using torch::headeronly::ScalarType;

Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::Double: return Storage::float64;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    default: STD_TORCH_CHECK(false, "mingru: dtype must be float32, float64, bfloat16 or float16");
  }
}

// Advises large pages for a large tensor. glibc's malloc takes its memory from the system in each call, and to fill small
// pages may take longer than to compute. Nothing depends on whether the system follows.
Tensor in_large_pages(Tensor x, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr int64_t page = 1 << 21;
  if (bytes < 16 * page) return x;
  const int64_t skipped = -reinterpret_cast<intptr_t>(x.data_ptr()) & (page - 1);
  madvise(static_cast<char*>(x.data_ptr()) + skipped, (bytes - skipped) & -page, MADV_HUGEPAGE);
#endif
  return x;
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * std::max<int64_t>(1, sizes[dim]);
  return strides;
}

// Contiguous, on the CPU, with the dtype of `like`. torch::stable::new_empty takes 0.5 µs more.
Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like) {
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  int32_t dtype;
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  const auto error = aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &result);
  const int64_t bytes = sizes.empty() ? 1 : sizes[0] * strides[0] * like.element_size();
  check_allocated(error == 0, bytes);
  return in_large_pages(Tensor(result), bytes);
}

std::vector<int64_t> sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

Tensor empty_as(const Tensor& x) { return empty(sizes_of(x), x); }

// torch::stable::new_zeros takes 2 µs more.
Tensor zeros(const std::vector<int64_t>& sizes, const Tensor& like) {
  const Tensor result = empty(sizes, like);
  if (result.numel() > 0) std::memset(result.data_ptr(), 0, result.numel() * result.element_size());
  return result;
}

// A part of the memory of x, which it keeps alive. torch::stable::narrow takes 2 µs more.
inline Tensor part_of(const Tensor& x, int64_t first, const std::vector<int64_t>& sizes) {
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      x.get(), static_cast<int64_t>(sizes.size()), sizes.data(), contiguous_strides(sizes).data(), first, &result));
  return Tensor(result);
}

template <class T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// The recurrence of some of the features by a cell; `group_index` is the number of groups before them.
Scan of_features(Scan scan, Cell cell, int64_t first, int64_t count, int64_t group_index) {
  const int64_t wide = scan.storage == Storage::float64 ? 8 : 4;
  const int64_t size = scan.storage == Storage::bfloat16 || scan.storage == Storage::float16 ? 2 : wide;
  const auto move = [](auto& data, int64_t bytes) {
    if (data) data = const_cast<char*>(static_cast<const char*>(data)) + bytes;
  };
  scan.cell = cell;
  scan.num_features = count;
  for (int k = 0; k < most_parts; ++k) {
    move(scan.inputs[k].data, first * size);
    move(scan.biases[k], first * wide);
    move(scan.grad_inputs[k].data, first * size);
  }
  for (Sequence* each : {&scan.out, &scan.gated, &scan.grad_out}) move(each->data, first * size);
  for (const void** each : {&scan.h, &scan.initial_state, &scan.grad_last}) move(*each, first * wide);
  for (void** each : {&scan.last, &scan.grad_h, &scan.grad_initial_state}) move(*each, first * wide);
  move(scan.grads_of_dt.data, group_index * wide);
  return scan;
}

class Operands {
 public:
  Scan scan{};
  const Tensor h;

  // `like` has the leading dimensions and the dtype of all sequences. A state has `state_steps` steps.
  Operands(const Call& call, const Tensor& like, int64_t num_features, int64_t state_steps = 1)
      : h(as_contiguous(*call[Argument::h])),
        call_(call),
        batch_dim_(call.has(Flag::time_first) ? 1 : 0),
        step_dim_(1 - batch_dim_),
        state_steps_(state_steps) {
    STD_TORCH_CHECK(like.is_cpu(), call.name, ": sequences must be on the CPU");
    scan.cell = call.cell();
    scan.activation = call.activation();
    scan.storage = storage_of(like);
    scan.num_features = scan.state_stride = num_features;
    scan.reverse = call.has(Flag::reverse);
    scan.has_output_gate = call.has(Flag::output_gate);
    const Tensor *lengths = call[Argument::lengths], *dt = call[Argument::dt], *reset = call[Argument::reset];
    if (const Tensor* batch_sizes = call[Argument::batch_sizes]) {
      STD_TORCH_CHECK(!lengths, call.name, ": lengths must be of sequences that are not packed");
      batch_dim_ = step_dim_ = 0;
      set_packed(*batch_sizes, like);
    } else {
      STD_TORCH_CHECK(like.dim() >= 2, call.name, ": sequences must be (B, S, *)");
      scan.num_batch = like.size(batch_dim_);
      scan.num_steps = like.size(step_dim_);
      if (lengths) set_lengths(*lengths);
    }
    leading_.assign(like.sizes().begin(), like.sizes().begin() + (is_packed() ? 1 : 2));
    STD_TORCH_CHECK(
        scan.num_batch > 0 && scan.num_steps > 0 && num_features > 0, call.name, ": sequences must not be empty");
    scan.h = state(h, "h");
    if (dt) {
      STD_TORCH_CHECK(call.traits().takes_time, call.name, ": this cell takes no elapsed times");
      const char* expected = ": dt must have the leading dimensions of the sequences, in the accumulation dtype";
      scan.dt = one_per_step(*dt, accumulation_dtype(), expected);
    }
    if (call.min_decay != 0) {
      STD_TORCH_CHECK(call.traits().takes_time, call.name, ": this cell has no lower bound of its decay");
      STD_TORCH_CHECK(call.min_decay > 0 && call.min_decay < 1, call.name, ": min_decay must be in [0, 1)");
      scan.log_bound = std::log(call.min_decay);
      scan.log_range = std::log1p(-call.min_decay);
    }
    if (reset) {
      const char* expected = ": reset must be bool, with the leading dimensions of the sequences";
      scan.reset = one_per_step(*reset, ScalarType::Bool, expected);
      // A linear scan has no initial state: a reset sets the state to 0.
      if (scan.cell > Cell::quaternion_linear_scan) {
        scan.initial_state = state(contiguous(*call[Argument::initial_state]), "initial_state");
      }
    }
  }

  Operands(const Operands&) = delete;  // `scan` points into this object

  // Runs the recurrence, of a mixture that of each half of the features.
  void run_part(const Part& part, bool is_backward) const {
    if (!call_.is_mixture()) return run_scan(scan, part, is_backward);
    const int64_t half = scan.num_features / 2;
    for (int i = 0; i < 2; ++i) {
      const Scan own = of_features(scan, call_.cell(i), i * half, half, i * call_.num_groups(2 * half) / 2);
      run_scan(own, part, is_backward);
    }
  }

  bool is_packed() const { return scan.step_offsets != nullptr; }
  bool has_lengths() const { return !is_packed() && scan.lengths; }
  Part whole() const { return {0, scan.num_batch, 0, scan.num_steps}; }

  std::vector<int64_t> sizes(int64_t trailing) const {
    std::vector<int64_t> sizes = leading_;
    sizes.push_back(trailing);
    return sizes;
  }

  Tensor contiguous(const Tensor& x) {
    kept_.push_back(as_contiguous(x));
    return kept_.back();
  }

  bool has_contiguous_features(const Tensor& x) const {
    int64_t expected = 1;
    for (int64_t dim = x.dim() - 1; dim >= num_leading(); --dim) {
      if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
      expected *= x.size(dim);
    }
    return true;
  }

  // Returns x, or a copy with contiguous features, as a sequence. If x is expanded, as the gradient of a sum is, the copy
  // has one of the equal batch elements or steps.
  Sequence readable(const Tensor& x) {
    if (has_contiguous_features(x)) {
      kept_.push_back(x);
      return sequence(x);
    }
    std::vector<int64_t> sizes = sizes_of(x), strides = {x.strides().begin(), x.strides().end()};
    for (int64_t dim = 0; dim < num_leading(); ++dim) sizes[dim] = strides[dim] == 0 ? 1 : sizes[dim];
    const Tensor part = contiguous(view_of(x.data_ptr(), sizes, strides, x));
    for (int64_t dim = 0; dim < x.dim(); ++dim) strides[dim] = sizes[dim] == x.size(dim) ? part.stride(dim) : 0;
    return sequence(view_of(part.data_ptr(), x.sizes(), strides, x));
  }

  Sequence sequence(const Tensor& x) const {
    int64_t num_elements = scan.num_features;
    for (const int64_t size : leading_) num_elements *= size;
    STD_TORCH_CHECK(
        x.is_cpu() && has_leading_sizes(x) && storage_of(x) == scan.storage && x.numel() == num_elements &&
            has_contiguous_features(x),
        call_.name, ": sequences must be on the CPU, of one shape and dtype, with contiguous features");
    return {x.data_ptr(), x.stride(batch_dim_), x.stride(step_dim_)};
  }

  void* state(const Tensor& x, const char* what) const {
    STD_TORCH_CHECK(
        x.is_cpu() && x.is_contiguous() && x.scalar_type() == accumulation_dtype() &&
            x.numel() == scan.num_batch * state_steps_ * scan.num_features,
        call_.name, ": ", what, " must be (B, ", state_steps_, ", *), contiguous, in the accumulation dtype");
    return x.data_ptr();
  }

  // The bias is (num_parts N).
  void add_biases(const MaybeTensor& given) {
    if (!given) return;
    const Tensor bias = contiguous(*given);
    const int64_t count = call_.num_parts(), features = scan.num_features, size = bias.element_size();
    STD_TORCH_CHECK(
        bias.is_cpu() && storage_of(bias) == scan.storage && bias.numel() == count * features && size >= 4, call_.name,
        ": bias must be (num_parts N), float32 or float64, with the dtype of the sequences");
    for (int64_t k = 0; k < count; ++k) scan.biases[k] = data_of<char>(bias) + k * features * size;
  }

  // Returns the gradients of h, with resets of initial_state, and if it is needed of dt, for each group of features.
  Tensors add_gradients(const Tensor& out, const Tensor& grad_out, const Tensor& grad_last) {
    scan.out = readable(out);
    scan.grad_out = readable(grad_out);
    scan.grad_last = state(contiguous(grad_last), "the gradient of the last state");
    Tensors grads = {empty_as(h)};
    scan.grad_h = grads[0].data_ptr();
    if (scan.reset.data) {
      grads.push_back(zeros(sizes_of(h), h));
      if (scan.initial_state) scan.grad_initial_state = grads.back().data_ptr();
    }
    if (call_.has(Flag::needs_dt) && scan.dt.data) {
      grads.push_back(zeros(sizes(call_.num_groups(scan.num_features)), h));
      scan.grads_of_dt = {grads.back().data_ptr(), grads.back().stride(batch_dim_), grads.back().stride(step_dim_)};
    }
    return grads;
  }

 protected:
  const Call& call_;
  int64_t batch_dim_, step_dim_;  // of sequences; both 0 if packed
  // Where the steps of each batch element, or if packed the batch elements of each step, begin in a matrix of all valid
  // steps; at the end, the number of all. Empty without lengths.
  std::vector<int64_t> row_offsets_;

 private:
  int64_t num_leading() const { return static_cast<int64_t>(leading_.size()); }

  bool has_leading_sizes(const Tensor& x) const {
    return x.dim() >= num_leading() && std::equal(leading_.begin(), leading_.end(), x.sizes().begin());
  }

  // A number for each step.
  Sequence one_per_step(const Tensor& x, ScalarType dtype, const char* expected) const {
    const bool fits = x.is_cpu() && x.scalar_type() == dtype && x.dim() == num_leading() && has_leading_sizes(x);
    STD_TORCH_CHECK(fits, call_.name, expected);
    return {x.data_ptr(), x.stride(batch_dim_), x.stride(step_dim_)};
  }

  ScalarType accumulation_dtype() const {
    return scan.storage == Storage::float64 ? ScalarType::Double : ScalarType::Float;
  }

  std::vector<int64_t> numbers(const Tensor& x, int64_t count, const char* expected) const {
    const bool is_vector = x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Long && x.dim() == 1;
    STD_TORCH_CHECK(is_vector && x.numel() == count, call_.name, expected);
    return {data_of<int64_t>(x), data_of<int64_t>(x) + count};
  }

  void set_lengths(const Tensor& lengths) {
    lengths_ = numbers(lengths, scan.num_batch, ": lengths must be (B), int64, contiguous, on the CPU");
    row_offsets_.push_back(0);
    for (const int64_t length : lengths_) {
      STD_TORCH_CHECK(length >= 0 && length <= scan.num_steps, call_.name, ": lengths must be from 0 to S");
      row_offsets_.push_back(row_offsets_.back() + length);
    }
    scan.lengths = lengths_.data();
  }

  void set_packed(const Tensor& batch_sizes, const Tensor& like) {
    const char* expected = ": packed sequences must be (number of steps, *), with int64 batch_sizes (S) on the CPU";
    const std::vector<int64_t> sizes = numbers(batch_sizes, batch_sizes.numel(), expected);
    STD_TORCH_CHECK(like.dim() >= 1 && !sizes.empty(), call_.name, expected);
    row_offsets_.push_back(0);
    for (size_t t = 0; t < sizes.size(); ++t) {
      STD_TORCH_CHECK(
          sizes[t] > 0 && (t == 0 || sizes[t] <= sizes[t - 1]), call_.name,
          ": batch_sizes must be positive and must not increase");
      row_offsets_.push_back(row_offsets_.back() + sizes[t]);
    }
    STD_TORCH_CHECK(
        row_offsets_.back() == like.size(0), call_.name, ": the sum of batch_sizes must be the number of packed steps");
    // Sequences without a next step end with the step.
    for (size_t t = sizes.size(); t > 0; --t) lengths_.resize(sizes[t - 1], static_cast<int64_t>(t));
    scan.num_batch = sizes[0];
    scan.num_steps = static_cast<int64_t>(sizes.size());
    scan.step_offsets = row_offsets_.data();
    scan.lengths = lengths_.data();
  }

  const int64_t state_steps_;
  std::vector<int64_t> leading_, lengths_;
  Tensors kept_;
};

}  // namespace
}  // namespace mingru
