// What the inference pass calls: the linear map of a cell, alone and together with its recurrence, and the convolution.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "scratch.h"

HIDDEN_NAMESPACE_BEGIN(mingru)

// Rows that are next to each other.
inline Tensor matrix(const void* data, int64_t rows, int64_t columns, const Tensor& like) {
  return view_of(data, {rows, columns}, {columns, 1}, like);
}

// A view of a contiguous matrix.
inline Tensor transposed(const Tensor& weight) {
  return view_of(weight.data_ptr(), {weight.size(1), weight.size(0)}, {1, weight.size(1)}, weight);
}

// out = x weight^T + bias for contiguous rows x; all have the dtype of `like`, and the weight is contiguous. bfloat16 and
// float16 are rounded once, after the bias, as in torch.nn.Linear.
void map_rows(
    void* out, const void* x, int64_t rows, const Tensor& like, const Tensor& weight, const MaybeTensor& bias);

// The results of a linear map and recurrence: all states, the last state and, if the call keeps them, the
// pre-activations in the memory order of x, without the bias if the scan adds it. With an output gate, `out` is gated, and
// the states are apart if the call keeps them.
struct Outputs {
  MaybeTensor out, last, kept, states;
};

// Without a weight, x has the pre-activations. The bias may be absent. `eps` is that of the norm, if the call has one. The
// outputs are allocated unless `out` and `last` are given.
Outputs linear_recurrence(
    const Call& call, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, double eps = 0,
    Outputs outputs = {});

// Returns the output and the last state of a causal convolution of x (B, S, N), with x added if it `adds_x`. Both are
// allocated unless given.
Outputs causal_conv(
    const Call& call, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, bool adds_x, Outputs outputs = {});

HIDDEN_NAMESPACE_END(mingru)
