// The call of a recurrence: the one value that all operators take, beside sequences and weights. To add an option, add it
// here, to `Operands` and the cells, and to `_call` in src/mingru/ops/backends/native.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "driver.h"

// Hidden like torch's Tensor.
HIDDEN_NAMESPACE_BEGIN(mingru)

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The bits of `how` above the cell and the activation, in this order.
enum class Flag { reverse, time_first, keep, needs_dt, needs_x, needs_weight, needs_bias };

struct Call {
  const char* name;  // of the operator, for errors
  Cell cell;
  Activation activation;
  double min_decay;
  bool reverse, time_first;
  Tensor h;              // the state before the first step, contiguous
  Tensor initial_state;  // the state after a reset
  MaybeTensor reset, dt, batch_sizes, lengths;
};

// A call without its optional tensors.
Call call_of(const char* name, const Tensor& h, const Tensor& initial_state, int64_t how, double min_decay);

// `tensors` are the six tensors of a call, in the order of its fields; the first two are not optional.
Call call_of(const char* name, const std::vector<MaybeTensor>& tensors, int64_t how, double min_decay);

inline bool has_flag(int64_t how, Flag flag) { return how >> (16 + static_cast<int>(flag)) & 1; }

int64_t num_inputs_of(Cell cell);

// The instructions of an inference pass; see inference.cpp.
#define MINGRU_INSTRUCTIONS(INSTRUCTION)                                                                                \
  INSTRUCTION(keep)                                                                                                     \
  INSTRUCTION(add)                                                                                                      \
  INSTRUCTION(add_linear)                                                                                               \
  INSTRUCTION(rms_norm)                                                                                                 \
  INSTRUCTION(layer_norm)                                                                                               \
  INSTRUCTION(linear)                                                                                                   \
  INSTRUCTION(linear_gelu)                                                                                              \
  INSTRUCTION(causal_conv)                                                                                              \
  INSTRUCTION(scan)                                                                                                     \
  INSTRUCTION(scan_both)

// Whether steps of the cell may have an elapsed time, and its decay a lower bound.
bool takes_time(Cell cell);

HIDDEN_NAMESPACE_END(mingru)
