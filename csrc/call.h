// The call of a recurrence: the one value that all operators take, beside sequences and weights. `Operands` reads it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <iterator>
#include <optional>
#include <vector>

#include "driver.h"

// Hidden like torch's Tensor.
HIDDEN_NAMESPACE_BEGIN(mingru)

using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

struct CellTraits {
  int64_t num_inputs;
  bool takes_time;  // whether steps of the cell may have an elapsed time, and its decay a lower bound
};

#define MINGRU_TRAITS(name, num_inputs, takes_time, type) {num_inputs, takes_time},
constexpr CellTraits cells[] = {MINGRU_CELLS(MINGRU_TRAITS)};
#undef MINGRU_TRAITS
#define MINGRU_PAIR(name, first, second) {Cell::first, Cell::second},
constexpr Cell mixtures[][2] = {MINGRU_MIXTURES(MINGRU_PAIR)};
#undef MINGRU_PAIR
constexpr auto num_cells = static_cast<int64_t>(std::size(cells));

// The flags of a call, its bits after the cell and the activation. The first say which of the optional tensors there are.
#define MINGRU_FLAGS(FLAG)                                                                                       \
  FLAG(has_reset) FLAG(has_dt) FLAG(has_recurrent) FLAG(has_recurrent_bias) FLAG(has_batch_sizes)                  \
  FLAG(has_lengths) FLAG(reverse) FLAG(time_first) FLAG(keep)                                                    \
  FLAG(rms_norm) FLAG(layer_norm) FLAG(output_gate) FLAG(keep_states)                                            \
  FLAG(needs_dt) FLAG(needs_recurrent) FLAG(needs_x) FLAG(needs_weight) FLAG(needs_bias)                          \
  FLAG(bfloat16_products)
enum class Flag { MINGRU_FLAGS(MINGRU_NAME) count };

constexpr auto num_arguments = static_cast<size_t>(Argument::count);
constexpr size_t num_required = 2;
constexpr int first_flag = 16;

constexpr int64_t bit(Flag flag, bool value = true) { return int64_t(value) << (first_flag + static_cast<int>(flag)); }

// The tensors are a list without gaps, because PyTorch resolves negative bits and the like in Tensor[], but not in
// Tensor?[].
struct Call {
  const char* name;  // of the operator, for errors
  const int64_t bits;  // the numbers of cell and activation, a byte each, and the flags
  const double min_decay;

  Call(const char* name, const Tensors& given, int64_t bits, double min_decay)
      : name(name), bits(bits), min_decay(min_decay) {
    const int64_t num_known = num_cells + static_cast<int64_t>(std::size(mixtures));
    const bool is_known = (bits & 0xff) < num_known && (bits >> 8 & 0xff) < static_cast<int64_t>(Activation::count);
    STD_TORCH_CHECK(is_known, name, ": unknown cell ", bits & 0xff, " or activation");
    STD_TORCH_CHECK(bits >= 0 && bits < bit(Flag::count), name, ": unknown flags");
    size_t next = 0;
    for (size_t i = 0; i < num_arguments; ++i) {
      if (i >= num_required && (bits >> (first_flag + i - num_required) & 1) == 0) continue;
      if (next < given.size()) tensors_[i] = &given[next];
      ++next;
    }
    STD_TORCH_CHECK(next == given.size(), name, ": the flags are of ", next, " tensors, got ", given.size());
  }

  // Null if absent.
  const Tensor* operator[](Argument argument) const { return tensors_[static_cast<size_t>(argument)]; }
  bool has(Flag flag) const { return (bits & bit(flag)) != 0; }
  bool is_mixture() const { return (bits & 0xff) >= num_cells; }
  // The cell, or a cell of the mixture.
  Cell cell(int index = 0) const {
    return is_mixture() ? mixtures[(bits & 0xff) - num_cells][index] : static_cast<Cell>(bits & 0xff);
  }
  Activation activation() const { return static_cast<Activation>(bits >> 8 & 0xff); }
  const CellTraits& traits() const { return cells[static_cast<size_t>(cell())]; }
  // Of features, for the gradients of the elapsed times. Each cell of a mixture has its own.
  int64_t num_groups(int64_t features) const {
    return is_mixture() ? 2 * ceil_div(features / 2, group) : ceil_div(features, group);
  }
  // The inputs of the cell, and the output gate.
  int64_t num_parts() const { return traits().num_inputs + has(Flag::output_gate); }

 private:
  std::array<const Tensor*, num_arguments> tensors_{};
};

// The message has the words of torch's allocator.
inline void check_allocated(bool is_allocated, int64_t bytes) {
  STD_TORCH_CHECK(is_allocated, "mingru: can't allocate memory: you tried to allocate ", bytes, " bytes");
}

// It does not keep the data alive.
inline Tensor view_of(const void* data, Sizes sizes, Sizes strides, const Tensor& like) {
  return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, like.device(), like.scalar_type());
}

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

HIDDEN_NAMESPACE_END(mingru)
