// The causal depthwise convolution of a residual block. Called by src/mingru/ops/causal_conv.py and inference.cpp. The state of
// the convolution is the h of the call.
#include "linear.h"
#include "operands.h"

namespace {

using namespace mingru;

class ConvOperands : public Operands {
 public:
  const std::vector<double> zeros;
  Convolution of;

  ConvOperands(const Call& call, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, bool adds_x)
      : Operands(call, x, x.size(-1), weight.size(0) - 1), zeros(x.size(-1)), of{scan, weight.size(0), adds_x} {
    const auto fits = [&](const Tensor& given, int64_t rows) {
      return given.is_cpu() && given.scalar_type() == x.scalar_type() && given.numel() == rows * x.size(2);
    };
    STD_TORCH_CHECK(
        x.dim() == 3 && !is_packed() && x.element_size() >= 4 && fits(weight, of.kernel_size) &&
            (!bias || fits(*bias, 1)),
        call.name, ": x must be (B, S, N), weight (K, N) and bias (N), all float32 or float64");
    scan.inputs[0] = readable(x);
    of.weight = contiguous(weight).data_ptr();
    of.zeros = zeros.data();
    of.bias = bias ? contiguous(*bias).data_ptr() : of.zeros;
  }
};

}  // namespace

Outputs mingru::causal_conv(
    const Call& call, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, bool adds_x, Outputs outputs) {
  ConvOperands operands(call, x, weight, bias, adds_x);
  if (!outputs.out) outputs = {empty_as(x), empty_as(operands.h), {}};
  operands.scan.out = operands.sequence(*outputs.out);
  operands.scan.last = operands.state(*outputs.last, "the last state");
  convolve(operands.of, false);
  return outputs;
}

namespace {

std::tuple<Tensor, Tensor> causal_conv_forward(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensors& tensors, int64_t bits, bool adds_x) {
  const Outputs found = causal_conv({"causal_conv_forward", tensors, bits, 0}, x, weight, bias, adds_x);
  return {*found.out, *found.last};
}

// Returns the gradients of x, weight, bias and state.
std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv_backward(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensors& tensors, int64_t bits, bool adds_x,
    const Tensor& grad_out, const Tensor& grad_last) {
  const Subnormals flushed(Subnormals::mode() | Subnormals::none);
  const Call call{"causal_conv_backward", tensors, bits, 0};
  ConvOperands operands(call, x, weight, bias, adds_x);
  const Tensor grad_x = empty_as(x), grad_h = operands.add_gradients(x, grad_out, grad_last)[0];
  operands.scan.grad_inputs[0] = operands.sequence(grad_x);
  Convolution& of = operands.of;
  of.bias = of.zeros;
  Tensor sums = zeros({of.kernel_size + 1, x.size(2)}, x);
  Scratch scratch;
  of.sums = scratch.at_least(of.num_tasks() * sums.numel() * x.element_size());
  convolve(of, true);
  add_rows({operands.scan.storage, of.sums, of.num_tasks(), sums.numel(), sums.data_ptr()});
  const Tensor grad_bias = torch::stable::clone(part_of(sums, of.kernel_size * x.size(2), {x.size(2)}));
  return {grad_x, part_of(sums, 0, {of.kernel_size, x.size(2)}), grad_bias, grad_h};
}

}  // namespace

MINGRU_OPERATOR(
    causal_conv_forward, CPU,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor[] call, int bits, bool adds_x) -> (Tensor, Tensor)")
MINGRU_OPERATOR(
    causal_conv_backward, CPU,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor[] call, int bits, bool adds_x, Tensor grad_out, Tensor grad_last) -> "
    "(Tensor, Tensor, Tensor, Tensor)")
