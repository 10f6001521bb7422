// The recurrence of a cell from its pre-activations. Called only by src/mingru/ops/backends/native.py.
#include "operands.h"

namespace {

using namespace mingru;

int64_t num_features(const Call& call, const Tensors& inputs) {
  const int64_t count = call.traits().num_inputs;
  STD_TORCH_CHECK(
      static_cast<int64_t>(inputs.size()) == count, call.name, ": the cell takes ", count, " inputs, got ", inputs.size());
  STD_TORCH_CHECK(
      !call[Argument::lengths] && !call.has(Flag::output_gate) && !call.is_mixture() && call.cell() < Cell::gru,
      call.name, ": lengths, output gates, mixtures, GRUs and LSTMs need the linear map");
  int64_t features = 1;
  for (int64_t dim = call[Argument::batch_sizes] ? 1 : 2; dim < inputs[0].dim(); ++dim) features *= inputs[0].size(dim);
  return features;
}

std::tuple<Tensor, Tensor> recurrence_forward(
    const Tensors& inputs, const Tensors& tensors, int64_t bits, double min_decay) {
  const Call call{"recurrence_forward", tensors, bits, min_decay};
  const int64_t features = num_features(call, inputs);
  Operands operands(call, inputs[0], features);
  for (size_t k = 0; k < inputs.size(); ++k) operands.scan.inputs[k] = operands.readable(inputs[k]);
  Tensor out = empty_as(inputs[0]), last = empty_as(operands.h);
  operands.scan.out = operands.sequence(out);
  operands.scan.last = last.data_ptr();
  run_scan(operands.scan, operands.whole(), false);
  return {out, last};
}

// Returns the gradients of `add_gradients`, and those of the inputs, concatenated to num_inputs N features.
Tensors recurrence_backward(
    const Tensors& inputs, const Tensors& tensors, const Tensor& out, const Tensor& grad_out, const Tensor& grad_last,
    int64_t bits, double min_decay) {
  const Subnormals flushed(Subnormals::mode() | Subnormals::none);
  const Call call{"recurrence_backward", tensors, bits, min_decay};
  const int64_t features = num_features(call, inputs), count = static_cast<int64_t>(inputs.size());
  Operands operands(call, inputs[0], features);
  Tensors grads = operands.add_gradients(out, grad_out, grad_last);
  grads.push_back(empty(operands.sizes(count * features), inputs[0]));
  for (int64_t k = 0; k < count; ++k) {
    operands.scan.inputs[k] = operands.readable(inputs[k]);
    operands.scan.grad_inputs[k] = operands.sequence(torch::stable::narrow(grads.back(), -1, k * features, features));
  }
  run_scan(operands.scan, operands.whole(), true);
  return grads;
}

}  // namespace

MINGRU_OPERATOR(
    recurrence_forward, CPU, "(Tensor[] inputs, Tensor[] call, int bits, float min_decay) -> (Tensor, Tensor)")
MINGRU_OPERATOR(
    recurrence_backward, CPU,
    "(Tensor[] inputs, Tensor[] call, Tensor out, Tensor grad_out, Tensor grad_last, int bits, float min_decay) -> "
    "Tensor[]")
