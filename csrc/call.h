// The call of a recurrence: the one value that all operators take, beside sequences and weights. To add an option, add it
// here, to `Operands` and the cells, and to `_call` in src/mingru/ops/backends/native.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "driver.h"

// Hidden like torch's Tensor.
HIDDEN_NAMESPACE_BEGIN(mingru)

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using MaybeTensors = torch::headeronly::HeaderOnlyArrayRef<MaybeTensor>;

struct Call {
  const char* name;  // of the operator, for errors
  Cell cell;
  Activation activation;
  double min_decay;
  bool reverse, time_first, keep, needs_dt, needs_x, needs_weight, needs_bias;
  Tensor h;              // the state before the first step, contiguous
  Tensor initial_state;  // the state after a reset
  MaybeTensor reset, dt, batch_sizes, lengths;
};

// `how` has the numbers of the cell and the activation in a byte each, and then the flags, in the order of a call.
// `tensors` are its six tensors; the first two are not optional.
Call call_of(const char* name, MaybeTensors tensors, int64_t how, double min_decay);

struct CellTraits {
  int64_t num_inputs;
  bool takes_time;  // whether steps of the cell may have an elapsed time, and its decay a lower bound
};

#define MINGRU_TRAITS(name, num_inputs, takes_time, type) {num_inputs, takes_time},
constexpr CellTraits cells[] = {MINGRU_CELLS(MINGRU_TRAITS)};
#undef MINGRU_TRAITS

constexpr CellTraits traits_of(Cell cell) { return cells[static_cast<int>(cell)]; }

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// The instructions of an inference pass; see inference.cpp.
#define MINGRU_INSTRUCTIONS(INSTRUCTION) \
  INSTRUCTION(keep)                      \
  INSTRUCTION(add)                       \
  INSTRUCTION(add_linear)                \
  INSTRUCTION(rms_norm)                  \
  INSTRUCTION(layer_norm)                \
  INSTRUCTION(linear)                    \
  INSTRUCTION(linear_gelu)               \
  INSTRUCTION(causal_conv)               \
  INSTRUCTION(scan)                      \
  INSTRUCTION(scan_both)

HIDDEN_NAMESPACE_END(mingru)
