// The norm without its weights, the linear map and the recurrence of a cell, in slices whose data stays in the cache. x is
// a matrix with one row for each step of each batch element, in the order of memory. With `lengths`, the rows are the
// valid steps of the first batch element, then those of the next, and so on. Called only by
// src/mingru/ops/backends/native.py.
#include "linear_operands.h"

namespace {

using namespace mingru;

// out = left right + added, where `added` may be `out`, or a vector that is added to each row. The one place that
// multiplies more than a few rows: in tiles of its own, or by torch, whatever is faster on this processor.
void set_product(const Tensor& out, const Tensor& left, const Tensor& right, const MaybeTensor& added = {}) {
  if (out.scalar_type() == ScalarType::Float) {
    const auto matrix_of = [](const Tensor& x) { return Matrix{data_of<const float>(x), x.stride(0), x.stride(1)}; };
    MatrixProduct product{matrix_of(left), matrix_of(right), nullptr, data_of<float>(out)};
    product.rows = left.size(0), product.columns = right.size(1), product.depth = left.size(1);
    product.out_stride = product.columns;
    if (added) product.added = data_of<const float>(*added);
    if (added && added->dim() == 2) product.added_stride = product.columns;
    if (is_faster_in_tiles(product)) {
      Scratch packed;
      return multiply_in_tiles(product, static_cast<float*>(packed.at_least(most_packed * sizeof(float))));
    }
  }
  if (!added) TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
  if (added) TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), added->get(), left.get(), right.get(), 1, 1));
}

// A gradient of a dtype that is a sum over the slices, in that of `like`, float32 or float64.
class SumOfSlices {
 public:
  SumOfSlices(ScalarType dtype, const Tensor& like, const std::vector<int64_t>& sizes)
      : dtype_(dtype), sum_(zeros(sizes, like)) {}

  void add_product(const Tensor& left, const Tensor& right) {
    if (sum_.scalar_type() == dtype_) return set_product(sum_, left, right, sum_);
    if (!part_) part_ = empty(sizes_of(sum_), left);
    set_product(*part_, left, right);
    add_sum(matrix(part_->data_ptr(), 1, part_->numel(), left));
  }

  void add_sum(const Tensor& rows) {
    add_rows({storage_of(rows), rows.data_ptr(), rows.size(0), rows.size(1), sum_.data_ptr()});
  }

  Tensor result() const { return sum_.scalar_type() == dtype_ ? sum_ : torch::stable::to(sum_, dtype_); }

 private:
  const ScalarType dtype_;
  const Tensor sum_;
  MaybeTensor part_;
};

}  // namespace

void mingru::map_rows(
    void* out, const void* x, int64_t rows, const Tensor& like, const Tensor& weight, const MaybeTensor& bias) {
  // Asked again for each product, because another thread may convert the parameters during a call.
  STD_TORCH_CHECK(
      weight.scalar_type() == like.scalar_type() && (!bias || bias->scalar_type() == like.scalar_type()),
      "mingru: weight and bias must have the dtype of x; do not convert a layer while it is called");
  const int64_t columns = weight.size(0), features = weight.size(1);
  if (rows <= most_few_rows && like.element_size() >= 4) {
    const void* added = bias ? bias->data_ptr() : nullptr;
    return multiply_few_rows({storage_of(like), x, weight.data_ptr(), added, out, rows, columns, features, features});
  }
  const Tensor right = view_of(weight.data_ptr(), {features, columns}, {1, features}, like);
  set_product(matrix(out, rows, columns, like), matrix(x, rows, features, like), right, bias);
}

Outputs mingru::linear_recurrence(
    const Call& call, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, double eps, Outputs outputs) {
  LinearOperands operands(call, x, weight, bias, eps);
  if (!outputs.out) {
    // The largest tensor first: glibc's malloc then gives less memory back to the system, whose new pages take long.
    outputs.kept = empty({call.has(Flag::keep) ? operands.num_rows() : 0, operands.num_kept()}, x);
    const std::vector<int64_t> sizes = operands.sizes(operands.scan.num_features);
    outputs.out = empty(sizes, x);
    outputs.states = empty(call.has(Flag::keep_states) ? sizes : std::vector<int64_t>{0}, x);
    outputs.last = empty_as(operands.h);
  }
  char* kept = call.has(Flag::keep) ? data_of<char>(*outputs.kept) : nullptr;
  operands.clear_padding(*outputs.out);
  Scan& scan = operands.scan;
  scan.gated = scan.out = operands.sequence(*outputs.out);
  if (call.has(Flag::keep_states)) scan.out = operands.sequence(*outputs.states);
  scan.last = operands.state(*outputs.last, "the last state");
  const bool is_in_steps = operands.map_in_steps();
  for (const Slice& slice : operands.slices(false)) {
    operands.enter(slice);
    if (slice.num_rows > 0) {
      const void* rows = operands.rows_of(slice);
      char* pre_activations = is_in_steps && !kept ? nullptr : operands.pre_activations_of(slice, kept, rows);
      if (is_in_steps) operands.set_sequences(&scan.x, static_cast<char*>(const_cast<void*>(rows)), slice, operands.num_features);
      if (!is_in_steps && pre_activations != rows) operands.map(pre_activations, rows, slice);
      operands.set_inputs(scan.inputs, pre_activations, slice);
      operands.set_sums(kept, slice);
    }
    operands.run_part(slice.part, false);
  }
  return outputs;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_recurrence_forward(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const Tensors& tensors, int64_t bits,
    double min_decay, double eps) {
  const auto [out, last, kept, states] =
      linear_recurrence({"linear_recurrence_forward", tensors, bits, min_decay}, x, weight, bias, eps);
  return {*out, *last, *kept, *states};
}

// left right + added, for tests and measurements.
Tensor multiply(const Tensor& left, const Tensor& right, const MaybeTensor& added) {
  const auto is_matrix = [&](const Tensor& x) {
    return x.is_cpu() && x.dim() == 2 && x.numel() > 0 && x.scalar_type() == left.scalar_type() &&
           (x.stride(0) == 1 || x.stride(1) == 1);
  };
  STD_TORCH_CHECK(
      is_matrix(left) && is_matrix(right) && left.size(1) == right.size(0) &&
          (!added || (added->is_cpu() && added->is_contiguous() && added->scalar_type() == left.scalar_type() &&
                      sizes_of(*added) == std::vector<int64_t>{right.size(1)})),
      "multiply: left and right must be matrices that fit, not empty, with contiguous rows or columns, and added a vector");
  const Tensor out = empty({left.size(0), right.size(1)}, left);
  set_product(out, left, right, added);
  return out;
}

// Returns the gradients of `add_gradients`, and those that are needed of the recurrent weights and their bias, and of x,
// weight and bias.
Tensors linear_recurrence_backward(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const Tensors& tensors, const Tensor& states,
    const Tensor& pre_activations, const Tensor& grad_out, const Tensor& grad_last, int64_t bits, double min_decay,
    double eps) {
  const Subnormals flushed(Subnormals::mode() | Subnormals::none);
  const Call call{"linear_recurrence_backward", tensors, bits, min_decay};
  LinearOperands operands(call, x, weight, bias, eps);
  const int64_t columns = operands.num_columns, features = operands.num_features;
  STD_TORCH_CHECK(
      pre_activations.numel() == 0 ||
          (pre_activations.is_cpu() && pre_activations.is_contiguous() &&
           pre_activations.scalar_type() == x.scalar_type() &&
           pre_activations.numel() == operands.num_rows() * operands.num_kept()),
      call.name, ": pre_activations must be as the forward pass keeps them, or empty");
  Tensor values = pre_activations;
  // The cells of an LSTM are computed in the order of time only.
  if (call.cell() == Cell::lstm && values.numel() == 0) {
    values = *linear_recurrence({call.name, tensors, bits | bit(Flag::keep), min_decay}, x, weight, bias, eps).kept;
  }
  char* kept = values.numel() > 0 ? data_of<char>(values) : nullptr;
  Tensors found = operands.add_gradients(states, grad_out, grad_last);
  MaybeTensor grad_x;
  std::optional<SumOfSlices> grad_weight, grad_bias;
  if (call.has(Flag::needs_x)) operands.clear_padding(grad_x.emplace(operands.empty_like_x()));
  if (call.has(Flag::needs_weight)) grad_weight.emplace(x.scalar_type(), operands.h, std::vector{columns, features});
  if (call.has(Flag::needs_bias)) grad_bias.emplace(x.scalar_type(), operands.h, std::vector{columns});
  Scan& scan = operands.scan;
  Scratch grads_scratch;
  for (const Slice& slice : operands.slices(true)) {
    operands.enter(slice);
    const int64_t count = slice.num_rows;
    if (count == 0) {
      operands.run_part(slice.part, true);
      continue;
    }
    const void* rows = !kept || grad_weight || operands.has_norm ? operands.rows_of(slice) : nullptr;
    char* pre = operands.pre_activations_of(slice, kept);
    if (!kept) operands.map(pre, rows, slice);
    operands.set_inputs(scan.inputs, pre, slice);
    operands.set_sums(kept, slice);
    const auto run = [&](void* grads) {
      operands.set_inputs(scan.grad_inputs, static_cast<char*>(grads), slice);
      operands.run_part(slice.part, true);
    };
    if (!weight && grad_x) {
      operands.set_grad_rows(slice, *grad_x, run);
      continue;
    }
    void* to = grads_scratch.at_least(operands.bytes_of_columns(count));
    run(to);

    const Tensor grads = matrix(to, count, columns, x);
    if (grad_x) {
      operands.set_grad_rows(slice, *grad_x, [&](void* grad_rows) {
        set_product(matrix(grad_rows, count, features, x), grads, operands.weight);
        operands.undo_norm(slice, grad_rows);
      });
    }
    if (grad_weight) grad_weight->add_product(transposed(grads), matrix(rows, count, features, x));
    if (grad_bias) grad_bias->add_sum(grads);
  }
  operands.add_recurrent(found);
  if (grad_x) found.push_back(*grad_x);
  if (grad_weight) found.push_back(grad_weight->result());
  if (grad_bias) found.push_back(grad_bias->result());
  return found;
}

}  // namespace

MINGRU_OPERATOR(multiply, CPU, "(Tensor left, Tensor right, Tensor? added) -> Tensor")
MINGRU_OPERATOR(
    linear_recurrence_forward, CPU,
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor[] call, int bits, float min_decay, float eps=0) -> "
    "(Tensor, Tensor, Tensor, Tensor)")
MINGRU_OPERATOR(
    linear_recurrence_backward, CPU,
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor[] call, Tensor states, Tensor pre_activations, Tensor grad_out, "
    "Tensor grad_last, int bits, float min_decay, float eps=0) -> Tensor[]")
