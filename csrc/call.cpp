#include "call.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <iterator>
#include <string>

namespace mingru {
namespace {

#define MINGRU_NAME(name, ...) #name " "
#define MINGRU_COUNT(name, num_inputs, takes_time, type) num_inputs,
#define MINGRU_TAKES_TIME(name, num_inputs, takes_time, type) takes_time,
constexpr const char* all_names = MINGRU_CELLS(MINGRU_NAME) "|positive linear tanh|" MINGRU_INSTRUCTIONS(MINGRU_NAME);
constexpr int64_t cell_inputs[] = {MINGRU_CELLS(MINGRU_COUNT)};
constexpr bool cell_takes_time[] = {MINGRU_CELLS(MINGRU_TAKES_TIME)};
#undef MINGRU_NAME
#undef MINGRU_COUNT
#undef MINGRU_TAKES_TIME

constexpr int64_t num_cells = std::size(cell_inputs), num_activations = 3;

// The names of cells, activations and instructions, in the order of their numbers.
std::string names() { return all_names; }

}  // namespace

int64_t num_inputs_of(Cell cell) { return cell_inputs[static_cast<int>(cell)]; }

bool takes_time(Cell cell) { return cell_takes_time[static_cast<int>(cell)]; }

Call call_of(const char* name, const Tensor& h, const Tensor& initial_state, int64_t how, double min_decay) {
  const int64_t cell = how & 0xff, activation = how >> 8 & 0xff;
  STD_TORCH_CHECK(cell < num_cells && activation < num_activations, name, ": unknown cell ", cell, " or activation");
  const auto known = static_cast<Cell>(cell);
  STD_TORCH_CHECK(takes_time(known) || min_decay == 0, name, ": this cell has no lower bound of its decay");
  return {
      name,
      known,
      static_cast<Activation>(activation),
      min_decay,
      has_flag(how, Flag::reverse),
      has_flag(how, Flag::time_first),
      h.is_contiguous() ? h : torch::stable::contiguous(h),
      initial_state,
      {},
      {},
      {},
      {}};
}

Call call_of(const char* name, const std::vector<MaybeTensor>& tensors, int64_t how, double min_decay) {
  STD_TORCH_CHECK(tensors.size() == 6 && tensors[0] && tensors[1], name, ": a call has 6 tensors, the first two required");
  Call call = call_of(name, *tensors[0], *tensors[1], how, min_decay);
  call.reset = tensors[2];
  call.dt = tensors[3];
  call.batch_sizes = tensors[4];
  call.lengths = tensors[5];
  STD_TORCH_CHECK(takes_time(call.cell) || !call.dt, name, ": this cell takes no elapsed times");
  return call;
}

}  // namespace mingru

STABLE_TORCH_LIBRARY_FRAGMENT(mingru, library) { library.def("names() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(mingru, CompositeExplicitAutograd, library) {
  library.impl("names", TORCH_BOX(&mingru::names));
}
