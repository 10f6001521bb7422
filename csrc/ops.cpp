// The operators that Python sees, on LibTorch's stable ABI. `src/mingru/ops/body_native.py` is their one caller: it hands
// over (B, S, N) sequences, states (B, 1, N) in the type of computation, and what `Scan` needs besides.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

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

// (B, S, N) with the order of batch and time in memory that `like` has.
Tensor empty_sequence(const Tensor& like) {
  const int64_t batch = like.size(0), steps = like.size(1), lanes = like.size(2);
  if (like.stride(0) < like.stride(1) && batch > 1) {
    return torch::stable::transpose(torch::stable::new_empty(like, {steps, batch, lanes}), 0, 1);
  }
  return torch::stable::new_empty(like, {batch, steps, lanes});
}

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
    scan.reset = static_cast<const bool*>(reset->data_ptr());
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
  Tensor out = empty_sequence(like);
  Tensor last = torch::stable::empty_like(h);
  scan.out = sequence(out);
  scan.last = last.data_ptr();
  mingru::run(scan, false);
  return {out, last};
}

// The gradients of both inputs and of h.
std::tuple<Tensor, Tensor, Tensor> backward(
    mingru::Scan& scan, const Tensor& like, const Tensor& h, const Tensor& out, const Tensor& grad_out,
    const Tensor& grad_last) {
  const Tensor out_rows = with_dense_lanes(out), grad_rows = with_dense_lanes(grad_out);
  Tensor grad_first = empty_sequence(like), grad_second = empty_sequence(like);
  Tensor grad_h = torch::stable::empty_like(h);
  scan.out = sequence(out_rows);
  scan.grad_out = sequence(grad_rows);
  scan.grad_last = grad_last.data_ptr();
  scan.grad_inputs[0] = sequence(grad_first);
  scan.grad_inputs[1] = sequence(grad_second);
  scan.grad_h = grad_h.data_ptr();
  mingru::run(scan, true);
  return {grad_first, grad_second, grad_h};
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
  return forward(scan, second, h);
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward(
    const Tensor& a, const Tensor& h, const std::optional<Tensor>& reset, const Tensor& out, const Tensor& grad_out,
    const Tensor& grad_last, bool reverse) {
  const char* name = "linear_scan_backward";
  const Tensor first = with_dense_lanes(a);
  // The gradients don't depend on b.
  auto scan = prepare(name, mingru::CellKind::linear_scan, first, first, h, reset, reverse);
  check_gradients(name, first, h, out, grad_out, grad_last);
  return backward(scan, first, h, out, grad_out, grad_last);
}

std::tuple<Tensor, Tensor> mingru_forward(
    const Tensor& gate, const Tensor& candidate, const Tensor& h, const Tensor& initial,
    const std::optional<Tensor>& reset, int64_t activation, bool reverse) {
  const char* name = "mingru_forward";
  const Tensor first = with_dense_lanes(gate), second = with_dense_lanes(candidate);
  auto scan = prepare(name, cell_of(activation), first, second, h, reset, reverse);
  add_initial(scan, name, initial, h);
  return forward(scan, first, h);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mingru_backward(
    const Tensor& gate, const Tensor& candidate, const Tensor& h, const Tensor& initial,
    const std::optional<Tensor>& reset, const Tensor& out, const Tensor& grad_out, const Tensor& grad_last,
    int64_t activation, bool reverse) {
  const char* name = "mingru_backward";
  const Tensor first = with_dense_lanes(gate), second = with_dense_lanes(candidate);
  auto scan = prepare(name, cell_of(activation), first, second, h, reset, reverse);
  add_initial(scan, name, initial, h);
  check_gradients(name, first, h, out, grad_out, grad_last);
  Tensor grad_initial = torch::stable::empty_like(h);
  torch::stable::zero_(grad_initial);
  scan.grad_initial = grad_initial.data_ptr();
  auto [grad_gate, grad_candidate, grad_h] = backward(scan, first, h, out, grad_out, grad_last);
  return {grad_gate, grad_candidate, grad_h, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY(mingru, library) {
  library.def("linear_scan_forward(Tensor a, Tensor b, Tensor h, Tensor? reset, bool reverse) -> (Tensor, Tensor)");
  library.def(
      "linear_scan_backward(Tensor a, Tensor h, Tensor? reset, Tensor out, Tensor grad_out, Tensor grad_last, "
      "bool reverse) -> (Tensor, Tensor, Tensor)");
  library.def(
      "mingru_forward(Tensor gate, Tensor candidate, Tensor h, Tensor initial, Tensor? reset, int activation, "
      "bool reverse) -> (Tensor, Tensor)");
  library.def(
      "mingru_backward(Tensor gate, Tensor candidate, Tensor h, Tensor initial, Tensor? reset, Tensor out, "
      "Tensor grad_out, Tensor grad_last, int activation, bool reverse) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mingru, CPU, library) {
  library.impl("linear_scan_forward", TORCH_BOX(&linear_scan_forward));
  library.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
  library.impl("mingru_forward", TORCH_BOX(&mingru_forward));
  library.impl("mingru_backward", TORCH_BOX(&mingru_backward));
}
