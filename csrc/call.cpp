#include "call.h"

#include <torch/csrc/stable/library.h>

#include <iterator>
#include <string>

namespace mingru {
namespace {

// The names of cells, activations and instructions, in the order of their numbers.
std::string names() {
#define MINGRU_NAME(name, ...) #name " "
  return MINGRU_CELLS(MINGRU_NAME) "|positive linear tanh|" MINGRU_INSTRUCTIONS(MINGRU_NAME);
#undef MINGRU_NAME
}

}  // namespace

Call call_of(const char* name, MaybeTensors tensors, int64_t how, double min_decay) {
  constexpr int64_t num_cells = std::size(cells), num_activations = 3;
  const int64_t number = how & 0xff, activation = how >> 8 & 0xff;
  const bool is_known = number < num_cells && activation < num_activations;
  STD_TORCH_CHECK(is_known, name, ": unknown cell ", number, " or activation");
  STD_TORCH_CHECK(tensors.size() == 6 && tensors[0] && tensors[1], name, ": a call has 6 tensors, the first two required");
  const auto cell = static_cast<Cell>(number);
  const auto flag = [&](int bit) { return (how >> (16 + bit) & 1) != 0; };
  STD_TORCH_CHECK(traits_of(cell).takes_time || !tensors[3], name, ": this cell takes no elapsed times");
  STD_TORCH_CHECK(
      traits_of(cell).takes_time || min_decay == 0, name, ": this cell has no lower bound of its decay");
  return {
      name, cell, static_cast<Activation>(activation), min_decay,
      flag(0), flag(1), flag(2), flag(3), flag(4), flag(5), flag(6),
      as_contiguous(*tensors[0]), *tensors[1], tensors[2], tensors[3], tensors[4], tensors[5]};
}

}  // namespace mingru

STABLE_TORCH_LIBRARY_FRAGMENT(mingru, library) { library.def("names() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(mingru, CompositeExplicitAutograd, library) {
  library.impl("names", TORCH_BOX(&mingru::names));
}
