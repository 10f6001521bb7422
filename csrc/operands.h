// Makes a `Scan` from tensors: checks them for memory safety, and keeps them alive while the scan points into them.
// A sequence is (B, S, *), (S, B, *) if `time_first`, or packed, (P, *), if there are `batch_sizes` (S); see
// src/mingru/ops/layout.py. N is the product of the trailing sizes *.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "call.h"

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

// Contiguous, on the CPU, with the dtype of `like`. torch::stable::new_empty takes 0.5 µs more.
Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * std::max<int64_t>(1, sizes[dim]);
  int32_t dtype;
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &result));
  return Tensor(result);
}

std::vector<int64_t> sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

std::vector<int64_t> checked_lengths(const char* name, const Tensor& lengths, int64_t num_batch, int64_t num_steps) {
  STD_TORCH_CHECK(
      lengths.is_cpu() && lengths.is_contiguous() && lengths.scalar_type() == ScalarType::Long && lengths.dim() == 1 &&
          lengths.numel() == num_batch,
      name, ": lengths must be (B), int64, contiguous, on the CPU");
  const auto* data = static_cast<const int64_t*>(lengths.data_ptr());
  const std::vector<int64_t> result(data, data + num_batch);
  for (const int64_t length : result) {
    STD_TORCH_CHECK(length >= 0 && length <= num_steps, name, ": lengths must be from 0 to S");
  }
  return result;
}

class Operands {
 public:
  Scan scan{};

  // `like` has the leading dimensions and the dtype of all sequences.
  Operands(const Call& call, const Tensor& like, int64_t num_features)
      : name_(call.name), batch_dim_(call.time_first ? 1 : 0), step_dim_(call.time_first ? 0 : 1) {
    STD_TORCH_CHECK(like.is_cpu(), name_, ": sequences must be on the CPU");
    scan.cell = call.cell;
    scan.activation = call.activation;
    scan.storage = storage_of(like);
    scan.num_features = num_features;
    scan.reverse = call.reverse;
    if (call.batch_sizes) {
      set_packed(*call.batch_sizes, like);
    } else {
      STD_TORCH_CHECK(like.dim() >= 2, name_, ": sequences must be (B, S, *)");
      scan.num_batch = like.size(batch_dim_);
      scan.num_steps = like.size(step_dim_);
    }
    if (call.lengths) {
      STD_TORCH_CHECK(!is_packed(), name_, ": lengths must be of sequences that are not packed");
      lengths_ = checked_lengths(name_, *call.lengths, scan.num_batch, scan.num_steps);
      scan.lengths = lengths_.data();
    }
    leading_.assign(like.sizes().begin(), like.sizes().begin() + num_leading());
    STD_TORCH_CHECK(
        scan.num_batch > 0 && scan.num_steps > 0 && num_features > 0, name_, ": sequences must not be empty");
    scan.h = state(call.h, "h");
    if (call.dt) add_dt(*call.dt);
    if (call.min_decay != 0) {
      STD_TORCH_CHECK(call.min_decay > 0 && call.min_decay < 1, name_, ": min_decay must be in [0, 1)");
      scan.is_bounded = true;
      scan.log_bound = std::log(call.min_decay);
      scan.log_range = std::log1p(-call.min_decay);
    }
    if (call.reset) {
      add_reset(*call.reset);
      // A linear scan has no initial state: a reset sets the state to 0.
      if (scan.cell != Cell::linear_scan && scan.cell != Cell::complex_linear_scan) {
        scan.initial_state = state(contiguous(call.initial_state), "initial_state");
      }
    }
  }

  Operands(const Operands&) = delete;  // `scan` points into this object

  bool is_packed() const { return !step_offsets_.empty(); }
  bool has_lengths() const { return !is_packed() && scan.lengths; }
  Part whole() const { return {0, scan.num_batch, 0, scan.num_steps}; }

  int64_t step_offset(int64_t step) const { return step < scan.num_steps ? scan.step_offsets[step] : leading_[0]; }

  std::vector<int64_t> sizes(int64_t trailing) const {
    std::vector<int64_t> sizes = leading_;
    sizes.push_back(trailing);
    return sizes;
  }

  Tensor contiguous(const Tensor& x) {
    kept_.push_back(as_contiguous(x));
    return kept_.back();
  }

  // Returns x, or a copy with contiguous features, as a sequence.
  Sequence readable(const Tensor& x) {
    kept_.push_back(has_contiguous_features(x) ? x : torch::stable::contiguous(x));
    return sequence(kept_.back());
  }

  Sequence sequence(const Tensor& x) const {
    const bool fits = x.is_cpu() && x.dim() >= num_leading() && storage_of(x) == scan.storage &&
                      std::equal(leading_.begin(), leading_.end(), x.sizes().begin()) &&
                      x.numel() == num_leading_elements() * scan.num_features && has_contiguous_features(x);
    STD_TORCH_CHECK(fits, name_, ": sequences must be on the CPU, of one shape and dtype, with contiguous features");
    if (is_packed()) return {x.data_ptr(), x.stride(0), x.stride(0)};
    return {x.data_ptr(), x.stride(batch_dim_), x.stride(step_dim_)};
  }

  void* state(const Tensor& x, const char* what) const {
    STD_TORCH_CHECK(
        x.is_cpu() && x.is_contiguous() && x.scalar_type() == accumulation_dtype() &&
            x.numel() == scan.num_batch * scan.num_features,
        name_, ": ", what, " must be (B, 1, *), contiguous, in the accumulation dtype");
    return x.data_ptr();
  }

  // The bias is (num_inputs N). The part of each input is padded to a multiple of `group`.
  void add_biases(const MaybeTensor& given) {
    if (!given) return;
    const Tensor bias = contiguous(*given);
    const int64_t count = num_inputs_of(scan.cell), features = scan.num_features;
    STD_TORCH_CHECK(
        bias.is_cpu() && bias.is_contiguous() && storage_of(bias) == scan.storage &&
            bias.numel() == count * features,
        name_, ": bias must be (num_inputs N), contiguous, with the dtype of the sequences");
    STD_TORCH_CHECK(bias.element_size() >= 4, name_, ": a bias requires float32 or float64");
    const int64_t size = bias.element_size();
    const int64_t padded = (features + group - 1) / group * group;
    const char* data = static_cast<const char*>(bias.data_ptr());
    if (padded != features) {
      biases_.assign(count * padded * size, 0);
      for (int64_t k = 0; k < count; ++k) {
        std::copy_n(data + k * features * size, features * size, biases_.data() + k * padded * size);
      }
      data = biases_.data();
    }
    for (int64_t k = 0; k < count; ++k) scan.biases[k] = data + k * padded * size;
  }

  // Returns the gradients of h, of initial_state and of dt, the latter for each group of features; empty if not needed.
  std::tuple<Tensor, Tensor, Tensor> add_gradients(
      const Tensor& h, const Tensor& out, const Tensor& grad_out, const Tensor& grad_last, bool needs_dt) {
    scan.out = readable(out);
    scan.grad_out = readable(grad_out);
    scan.grad_last = state(contiguous(grad_last), "the gradient of the last state");
    Tensor grad_h = empty(sizes_of(h), h);
    scan.grad_h = grad_h.data_ptr();
    Tensor grads_of_dt = empty({0}, h);
    if (needs_dt && scan.dt) {
      grads_of_dt = empty(sizes((scan.num_features + group - 1) / group), h);
      torch::stable::zero_(grads_of_dt);
      scan.grads_of_dt = grads_of_dt.data_ptr();
      scan.grads_of_dt_batch_stride = grads_of_dt.stride(is_packed() ? 0 : batch_dim_);
      scan.grads_of_dt_step_stride = grads_of_dt.stride(is_packed() ? 0 : step_dim_);
    }
    if (!scan.reset) return {grad_h, empty({0}, h), grads_of_dt};
    Tensor grad_initial_state = empty(sizes_of(h), h);
    torch::stable::zero_(grad_initial_state);
    if (scan.initial_state) scan.grad_initial_state = grad_initial_state.data_ptr();
    return {grad_h, grad_initial_state, grads_of_dt};
  }

 private:
  int64_t num_leading() const { return is_packed() ? 1 : 2; }
  int64_t num_leading_elements() const { return is_packed() ? leading_[0] : leading_[0] * leading_[1]; }

  bool has_contiguous_features(const Tensor& x) const {
    int64_t expected = 1;
    for (int64_t dim = x.dim() - 1; dim >= num_leading(); --dim) {
      if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
      expected *= x.size(dim);
    }
    return true;
  }

  void add_reset(const Tensor& reset) {
    STD_TORCH_CHECK(
        reset.is_cpu() && reset.scalar_type() == ScalarType::Bool && reset.dim() == num_leading() &&
            std::equal(leading_.begin(), leading_.end(), reset.sizes().begin()),
        name_, ": reset must be bool, with the leading dimensions of the sequences");
    scan.reset = static_cast<const uint8_t*>(reset.data_ptr());
    scan.reset_batch_stride = reset.stride(is_packed() ? 0 : batch_dim_);
    scan.reset_step_stride = reset.stride(is_packed() ? 0 : step_dim_);
  }

  void add_dt(const Tensor& dt) {
    STD_TORCH_CHECK(
        dt.is_cpu() && dt.scalar_type() == accumulation_dtype() && dt.dim() == num_leading() &&
            std::equal(leading_.begin(), leading_.end(), dt.sizes().begin()),
        name_, ": dt must have the leading dimensions of the sequences, in the accumulation dtype");
    scan.dt = dt.data_ptr();
    scan.dt_batch_stride = dt.stride(is_packed() ? 0 : batch_dim_);
    scan.dt_step_stride = dt.stride(is_packed() ? 0 : step_dim_);
  }

  ScalarType accumulation_dtype() const {
    return scan.storage == Storage::float64 ? ScalarType::Double : ScalarType::Float;
  }

  void set_packed(const Tensor& batch_sizes, const Tensor& like) {
    STD_TORCH_CHECK(
        like.dim() >= 1 && batch_sizes.is_cpu() && batch_sizes.dim() == 1 && batch_sizes.is_contiguous() &&
            batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.numel() > 0,
        name_, ": packed sequences must be (number of steps, *), with int64 batch_sizes (S) on the CPU");
    const auto* sizes = static_cast<const int64_t*>(batch_sizes.data_ptr());
    const int64_t steps = batch_sizes.numel();
    int64_t offset = 0;
    for (int64_t t = 0; t < steps; ++t) {
      STD_TORCH_CHECK(
          sizes[t] > 0 && (t == 0 || sizes[t] <= sizes[t - 1]), name_,
          ": batch_sizes must be positive and must not increase");
      step_offsets_.push_back(offset);
      offset += sizes[t];
    }
    STD_TORCH_CHECK(offset == like.size(0), name_, ": the sum of batch_sizes must be the number of packed steps");
    lengths_.resize(sizes[0]);
    for (int64_t t = 0; t < steps; ++t) {
      // Sequences without a next step end here.
      for (int64_t b = t + 1 < steps ? sizes[t + 1] : 0; b < sizes[t]; ++b) lengths_[b] = t + 1;
    }
    scan.num_batch = sizes[0];
    scan.num_steps = steps;
    scan.step_offsets = step_offsets_.data();
    scan.lengths = lengths_.data();
  }

  const char* name_;
  int64_t batch_dim_, step_dim_;
  std::vector<int64_t> leading_, step_offsets_, lengths_;
  std::vector<Tensor> kept_;
  std::vector<char> biases_;
};

}  // namespace
}  // namespace mingru
