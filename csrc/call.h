// The call of a recurrence: the one value that all operators take, beside sequences and weights. `Operands` reads it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <iterator>
#include <optional>
#include <vector>

#include "driver.h"

// Hidden like torch's Tensor.
HIDDEN_NAMESPACE_BEGIN(mingru)

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

struct CellTraits {
  int64_t num_inputs;
  bool takes_time;  // whether steps of the cell may have an elapsed time, and its decay a lower bound
};

#define MINGRU_TRAITS(name, num_inputs, takes_time, type) {num_inputs, takes_time},
constexpr CellTraits cells[] = {MINGRU_CELLS(MINGRU_TRAITS)};
#undef MINGRU_TRAITS

// The bits of a call after the cell and the activation.
enum class Flag { reverse, time_first, keep, needs_dt, needs_x, needs_weight, needs_bias };

constexpr auto num_arguments = static_cast<size_t>(Argument::count);

struct Call {
  const char* name;  // of the operator, for errors
  const std::vector<MaybeTensor>& tensors;
  const int64_t how;  // the numbers of cell and activation, a byte each, and the flags
  const double min_decay;

  Call(const char* name, const std::vector<MaybeTensor>& tensors, int64_t how, double min_decay)
      : name(name), tensors(tensors), how(how), min_decay(min_decay) {
    const bool is_known = (how & 0xff) < static_cast<int64_t>(std::size(cells)) && (how >> 8 & 0xff) < 3;
    STD_TORCH_CHECK(is_known, name, ": unknown cell ", how & 0xff, " or activation");
    const bool is_whole = tensors.size() == num_arguments && tensors[0] && tensors[1];
    STD_TORCH_CHECK(is_whole, name, ": a call has ", num_arguments, " tensors, the first two required");
  }

  const MaybeTensor& operator[](Argument argument) const { return tensors[static_cast<size_t>(argument)]; }
  bool has(Flag flag) const { return (how >> (16 + static_cast<int>(flag)) & 1) != 0; }
  Cell cell() const { return static_cast<Cell>(how & 0xff); }
  Activation activation() const { return static_cast<Activation>(how >> 8 & 0xff); }
  const CellTraits& traits() const { return cells[how & 0xff]; }
};

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

HIDDEN_NAMESPACE_END(mingru)
