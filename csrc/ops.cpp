// The operators that Python sees, on LibTorch's stable ABI. `src/mingru/ops/body_native.py` is their one caller: it hands
// over (B, S, N) sequences, states (B, 1, N) in the type of computation, and what `Scan` needs besides.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "driver.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

mingru::Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return mingru::Storage::float32;
    case ScalarType::Double: return mingru::Storage::float64;
    case ScalarType::BFloat16: return mingru::Storage::bfloat16;
    case ScalarType::Half: return mingru::Storage::float16;
    default: STD_TORCH_CHECK(false, "mingru: dtype must be float32, float64, bfloat16 or float16");
  }
}

// Lanes must lie side by side. (`prepare` refuses what is not (B, S, N).)
Tensor with_dense_lanes(const Tensor& x) {
  return x.dim() != 3 || x.size(2) == 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

mingru::Sequence sequence(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

Tensor slice(Tensor x, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(x, dim, start, length);
}

bool time_first(const Tensor& x) { return x.size(0) > 1 && x.stride(0) < x.stride(1); }

// (B, S, N) with the order of batch and time in memory that `like` has.
Tensor empty_sequence(const Tensor& like, int64_t lanes) {
  const int64_t batch = like.size(0), steps = like.size(1);
  if (!time_first(like)) return torch::stable::new_empty(like, {batch, steps, lanes});
  return torch::stable::transpose(torch::stable::new_empty(like, {steps, batch, lanes}), 0, 1);
}

// The biases of two inputs, (2 N), each filled up to whole groups.
class Biases {
 public:
  Biases(const char* name, const std::optional<Tensor>& bias, ScalarType dtype, int64_t lanes) {
    if (!bias) return;
    STD_TORCH_CHECK(
        bias->is_cpu() && bias->is_contiguous() && bias->scalar_type() == dtype && bias->numel() == 2 * lanes, name,
        ": bias must be (2 N), dense, with the dtype of the sequences");
    padded_ = (lanes + mingru::group - 1) / mingru::group * mingru::group;
    if (dtype == ScalarType::Double) {
      fill(doubles_, static_cast<const double*>(bias->data_ptr()), lanes);
    } else {
      STD_TORCH_CHECK(dtype == ScalarType::Float, name, ": half-width sequences take no bias here");
      fill(floats_, static_cast<const float*>(bias->data_ptr()), lanes);
    }
  }

  void add_to(mingru::Scan& scan) const {
    for (int k = 0; k < 2; ++k) {
      if (!floats_.empty()) scan.biases[k] = floats_.data() + k * padded_;
      if (!doubles_.empty()) scan.biases[k] = doubles_.data() + k * padded_;
    }
  }

 private:
  template <class A>
  void fill(std::vector<A>& to, const A* from, int64_t lanes) {
    to.assign(2 * padded_, A(0));
    for (int64_t k = 0; k < 2; ++k) std::copy_n(from + k * lanes, lanes, to.begin() + k * padded_);
  }

  int64_t padded_ = 0;
  std::vector<float> floats_;
  std::vector<double> doubles_;
};

// What must hold for memory to be safe; `name` is the operator.
mingru::Scan prepare(
    const char* name, mingru::CellKind cell, const Tensor& first, const Tensor& second, const Tensor& h,
    const std::optional<Tensor>& reset, bool reverse) {
  const auto storage = storage_of(first);
  const auto computed = storage == mingru::Storage::float64 ? ScalarType::Double : ScalarType::Float;
  for (const Tensor& x : {first, second}) {
    STD_TORCH_CHECK(
        x.is_cpu() && x.dim() == 3 && x.scalar_type() == first.scalar_type() && x.size(0) == first.size(0) &&
            x.size(1) == first.size(1) && x.size(2) == first.size(2),
        name, ": sequences must be (B, S, N) on the CPU, of one shape and dtype");
  }
  STD_TORCH_CHECK(first.numel() > 0, name, ": sequences must not be empty");
  STD_TORCH_CHECK(
      h.is_cpu() && h.is_contiguous() && h.scalar_type() == computed && h.numel() == first.size(0) * first.size(2),
      name, ": a state must be (B, 1, N), dense, in the type of computation");
  mingru::Scan scan{};
  scan.cell = cell;
  scan.storage = storage;
  scan.num_batch = first.size(0);
  scan.num_steps = first.size(1);
  scan.num_lanes = first.size(2);
  scan.reverse = reverse;
  scan.inputs[0] = sequence(first);
  scan.inputs[1] = sequence(second);
  scan.h = h.data_ptr();
  if (reset) {
    STD_TORCH_CHECK(
        reset->is_cpu() && reset->dim() == 2 && reset->scalar_type() == ScalarType::Bool &&
            reset->size(0) == scan.num_batch && reset->size(1) == scan.num_steps,
        name, ": reset must be (B, S) bool");
    scan.reset = static_cast<const uint8_t*>(reset->data_ptr());
    scan.reset_batch_stride = reset->stride(0);
    scan.reset_step_stride = reset->stride(1);
  }
  return scan;
}

void add_initial(mingru::Scan& scan, const char* name, const Tensor& initial, const Tensor& h) {
  STD_TORCH_CHECK(
      initial.is_contiguous() && initial.scalar_type() == h.scalar_type() && initial.numel() == h.numel(), name,
      ": initial must be as h is");
  scan.initial = initial.data_ptr();
}

std::tuple<Tensor, Tensor> forward(mingru::Scan& scan, const Tensor& like, const Tensor& h) {
  Tensor out = empty_sequence(like, scan.num_lanes);
  Tensor last = torch::stable::empty_like(h);
  scan.out = sequence(out);
  scan.last = last.data_ptr();
  mingru::run(scan, false);
  return {out, last};
}

// The gradients of both inputs, side by side in (B, S, 2 N), and of h.
std::tuple<Tensor, Tensor> backward(
    mingru::Scan& scan, const Tensor& like, const Tensor& h, const Tensor& out, const Tensor& grad_out,
    const Tensor& grad_last) {
  const Tensor out_rows = with_dense_lanes(out), grad_rows = with_dense_lanes(grad_out);
  Tensor grads = empty_sequence(like, 2 * scan.num_lanes);
  Tensor grad_h = torch::stable::empty_like(h);
  scan.out = sequence(out_rows);
  scan.grad_out = sequence(grad_rows);
  scan.grad_last = grad_last.data_ptr();
  for (int k = 0; k < 2; ++k) {
    scan.grad_inputs[k] = sequence(slice(grads, 2, k * scan.num_lanes, scan.num_lanes));
  }
  scan.grad_h = grad_h.data_ptr();
  mingru::run(scan, true);
  return {grads, grad_h};
}

void check_gradients(
    const char* name, const Tensor& first, const Tensor& h, const Tensor& out, const Tensor& grad_out,
    const Tensor& grad_last) {
  for (const Tensor& x : {out, grad_out}) {
    STD_TORCH_CHECK(
        x.is_cpu() && x.dim() == 3 && x.scalar_type() == first.scalar_type() && x.size(0) == first.size(0) &&
            x.size(1) == first.size(1) && x.size(2) == first.size(2),
        name, ": out and its gradient must be as the inputs are");
  }
  STD_TORCH_CHECK(
      grad_last.is_contiguous() && grad_last.scalar_type() == h.scalar_type() && grad_last.numel() == h.numel(), name,
      ": the last state's gradient must be as h is");
}

mingru::CellKind cell_of(int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "mingru: no activation has the number ", activation);
  return static_cast<mingru::CellKind>(static_cast<int64_t>(mingru::CellKind::mingru_positive) + activation);
}

std::tuple<Tensor, Tensor> linear_scan_forward(
    const Tensor& a, const Tensor& b, const Tensor& h, const std::optional<Tensor>& reset, bool reverse) {
  const Tensor first = with_dense_lanes(a), second = with_dense_lanes(b);
  auto scan = prepare("linear_scan_forward", mingru::CellKind::linear_scan, first, second, h, reset, reverse);
  return forward(scan, b, h);
}

std::tuple<Tensor, Tensor> linear_scan_backward(
    const Tensor& a, const Tensor& h, const std::optional<Tensor>& reset, const Tensor& out, const Tensor& grad_out,
    const Tensor& grad_last, bool reverse) {
  const char* name = "linear_scan_backward";
  const Tensor first = with_dense_lanes(a);
  // The gradients don't depend on b.
  auto scan = prepare(name, mingru::CellKind::linear_scan, first, first, h, reset, reverse);
  check_gradients(name, first, h, out, grad_out, grad_last);
  return backward(scan, a, h, out, grad_out, grad_last);
}

std::tuple<Tensor, Tensor> mingru_forward(
    const Tensor& gate, const Tensor& candidate, const std::optional<Tensor>& bias, const Tensor& h,
    const Tensor& initial, const std::optional<Tensor>& reset, int64_t activation, bool reverse) {
  const char* name = "mingru_forward";
  const Tensor first = with_dense_lanes(gate), second = with_dense_lanes(candidate);
  auto scan = prepare(name, cell_of(activation), first, second, h, reset, reverse);
  add_initial(scan, name, initial, h);
  const Biases biases(name, bias, first.scalar_type(), scan.num_lanes);
  biases.add_to(scan);
  return forward(scan, gate, h);
}

std::tuple<Tensor, Tensor, Tensor> mingru_backward(
    const Tensor& gate, const Tensor& candidate, const std::optional<Tensor>& bias, const Tensor& h,
    const Tensor& initial, const std::optional<Tensor>& reset, const Tensor& out, const Tensor& grad_out,
    const Tensor& grad_last, int64_t activation, bool reverse) {
  const char* name = "mingru_backward";
  const Tensor first = with_dense_lanes(gate), second = with_dense_lanes(candidate);
  auto scan = prepare(name, cell_of(activation), first, second, h, reset, reverse);
  add_initial(scan, name, initial, h);
  check_gradients(name, first, h, out, grad_out, grad_last);
  const Biases biases(name, bias, first.scalar_type(), scan.num_lanes);
  biases.add_to(scan);
  Tensor grad_initial = torch::stable::empty_like(h);
  torch::stable::zero_(grad_initial);
  scan.grad_initial = grad_initial.data_ptr();
  auto [grads, grad_h] = backward(scan, gate, h, out, grad_out, grad_last);
  return {grads, grad_h, grad_initial};
}

// Pre-activations of a block of rows; big enough for the matrix product to run at full speed, small enough to be still in
// the cache when the scan reads them.
constexpr int64_t block_values = 1 << 20;
constexpr int64_t most_block_rows = 2048;

void matrix_product_into(const Tensor& rows, const Tensor& weight_transposed, const Tensor& out) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(rows), torch::stable::detail::from(weight_transposed),
      torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  // What comes back is `out` once more.
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

// The layer without a tensor of all pre-activations: block by block, matrix product and scan. For inference.
// x is (B, S, I) and dense, or the transpose of a dense (S, B, I).
std::tuple<Tensor, Tensor> mingru_linear_forward(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& h, const Tensor& initial,
    const std::optional<Tensor>& reset, int64_t activation, bool reverse) {
  const char* name = "mingru_linear_forward";
  STD_TORCH_CHECK(
      x.dim() == 3 && weight.dim() == 2 && weight.size(0) % 2 == 0 && weight.size(1) == x.size(2) && x.numel() > 0,
      name, ": x must be (B, S, I), not empty, and weight (2 H, I)");
  const bool transposed = time_first(x);
  const Tensor dense = torch::stable::contiguous(transposed ? torch::stable::transpose(x, 0, 1) : x);
  const int64_t batch = x.size(0), steps = x.size(1), lanes = weight.size(0) / 2;
  // Rows lie by (outer, inner): a block is whole outer indices, or a stretch of one.
  const int64_t outer = transposed ? steps : batch, inner = transposed ? batch : steps;
  const int64_t block_rows = std::clamp(block_values / (2 * lanes), int64_t(64), most_block_rows);
  const int64_t outer_step = std::min(outer, std::max(int64_t(1), block_rows / inner));
  const int64_t inner_step = transposed || outer_step > 1 ? inner : std::min(inner, block_rows);

  const Tensor rows = torch::stable::view(dense, {batch * steps, x.size(2)});
  const Tensor weight_transposed = torch::stable::transpose(weight, 0, 1);
  const Tensor scratch = torch::stable::new_empty(x, {outer_step * inner_step, 2 * lanes});
  Tensor out = empty_sequence(x, lanes);
  Tensor last = torch::stable::empty_like(h);

  // The scan as a whole, with `out` in place of inputs that are never there as a whole.
  auto whole = prepare(name, cell_of(activation), out, out, h, reset, reverse);
  add_initial(whole, name, initial, h);
  const Biases biases(name, bias, x.scalar_type(), lanes);
  biases.add_to(whole);
  whole.out = sequence(out);
  whole.last = last.data_ptr();
  const int64_t size = static_cast<int64_t>(x.element_size());
  const auto shifted = [](auto* data, int64_t bytes) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(data)>>, const char, char>;
    return static_cast<decltype(data)>(static_cast<Byte*>(data) + bytes);
  };

  const int64_t num_outer = (outer + outer_step - 1) / outer_step, num_inner = (inner + inner_step - 1) / inner_step;
  for (int64_t o = 0; o < num_outer; ++o) {
    const int64_t outer_begin = (reverse ? num_outer - 1 - o : o) * outer_step;
    const int64_t outer_count = std::min(outer_step, outer - outer_begin);
    for (int64_t i = 0; i < num_inner; ++i) {
      const int64_t inner_begin = (reverse ? num_inner - 1 - i : i) * inner_step;
      const int64_t inner_count = std::min(inner_step, inner - inner_begin);
      const int64_t row = outer_begin * inner + inner_begin, count = outer_count * inner_count;
      const bool only = count == batch * steps;
      matrix_product_into(
          only ? rows : slice(rows, 0, row, count), weight_transposed, only ? scratch : slice(scratch, 0, 0, count));

      mingru::Scan scan = whole;
      const int64_t batch_begin = transposed ? 0 : outer_begin, step_begin = transposed ? outer_begin : inner_begin;
      scan.num_batch = transposed ? batch : outer_count;
      scan.num_steps = transposed ? outer_count : inner_count;
      const int64_t outer_stride = 2 * lanes * inner_count, inner_stride = 2 * lanes;
      for (int k = 0; k < 2; ++k) {
        scan.inputs[k] = {
            shifted(scratch.data_ptr(), k * lanes * size), transposed ? inner_stride : outer_stride,
            transposed ? outer_stride : inner_stride};
      }
      scan.out.data = shifted(
          whole.out.data, (batch_begin * whole.out.batch_stride + step_begin * whole.out.step_stride) * size);
      if (reset) scan.reset += batch_begin * whole.reset_batch_stride + step_begin * whole.reset_step_stride;
      const int64_t state_bytes = batch_begin * lanes * size;
      const bool is_first = transposed ? o == 0 : i == 0;
      scan.last = shifted(whole.last, state_bytes);
      // From the second stretch on, the state is where the one before left it; a task reads it before it writes it.
      scan.h = is_first ? shifted(whole.h, state_bytes) : scan.last;
      scan.initial = shifted(whole.initial, state_bytes);
      mingru::run(scan, false);
    }
  }
  return {out, last};
}

}  // namespace

STABLE_TORCH_LIBRARY(mingru, library) {
  library.def("linear_scan_forward(Tensor a, Tensor b, Tensor h, Tensor? reset, bool reverse) -> (Tensor, Tensor)");
  library.def(
      "linear_scan_backward(Tensor a, Tensor h, Tensor? reset, Tensor out, Tensor grad_out, Tensor grad_last, "
      "bool reverse) -> (Tensor, Tensor)");
  library.def(
      "mingru_forward(Tensor gate, Tensor candidate, Tensor? bias, Tensor h, Tensor initial, Tensor? reset, "
      "int activation, bool reverse) -> (Tensor, Tensor)");
  library.def(
      "mingru_backward(Tensor gate, Tensor candidate, Tensor? bias, Tensor h, Tensor initial, Tensor? reset, "
      "Tensor out, Tensor grad_out, Tensor grad_last, int activation, bool reverse) -> (Tensor, Tensor, Tensor)");
  library.def(
      "mingru_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor h, Tensor initial, Tensor? reset, "
      "int activation, bool reverse) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mingru, CPU, library) {
  library.impl("linear_scan_forward", TORCH_BOX(&linear_scan_forward));
  library.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
  library.impl("mingru_forward", TORCH_BOX(&mingru_forward));
  library.impl("mingru_backward", TORCH_BOX(&mingru_backward));
  library.impl("mingru_linear_forward", TORCH_BOX(&mingru_linear_forward));
}
