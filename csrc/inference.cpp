// A whole inference pass of stacked layers or residual blocks, in one call. Called only by src/mingru/modules/plan.py,
// which writes the code of a module: a row for each instruction, (instruction, whether it has a bias, state, cell and
// activation). An instruction changes x, and takes its weights and numbers (the eps of a norm, the lower bound of a
// recurrence's decay) from lists that are in the same order. Code and numbers are tensors, because reading a list of
// numbers takes as long as the arithmetic of a step.
#include "linear.h"

#include <array>
#include <limits>
#include <string>

#include "operands.h"

namespace {

using namespace mingru;

#define MINGRU_INSTRUCTIONS(NAME)                               \
  NAME(keep) NAME(add) NAME(add_linear) NAME(norm) NAME(linear) \
  NAME(linear_gelu) NAME(causal_conv) NAME(scan) NAME(scan_both)

enum class Instruction : int64_t { MINGRU_INSTRUCTIONS(MINGRU_NAME) };

// Larger values of a pass would take the place of all others in the memory that is kept.
constexpr int64_t most_kept_bytes = KeptMemory::most_bytes / 4;

// The largest elapsed time that is usual, as in src/mingru/check/forms.py.
constexpr double most_usual_time = 1e6;

// Thrown if an argument does not fit. The caller then runs the modules one by one, which names the argument.
struct DoesNotFit {};

void require(bool fits) {
  if (!fits) throw DoesNotFit();
}

// The arguments of the operator.
struct Arguments {
  const Tensor& x;
  const Tensors&weights, &states, &initial_states, &resets, &times;
  const Tensor &code, &numbers;
  const bool time_first, bfloat16_products;
};

class InferencePass : Arguments {
 public:
  explicit InferencePass(const Arguments& arguments)
      : Arguments(arguments), x_(x.dim() == 2 ? torch::stable::unsqueeze(x, 1) : x), written_(states.size()) {
    const ScalarType dtype = x.scalar_type();
    require(code.is_cpu() && code.scalar_type() == ScalarType::Long && code.dim() == 2 && code.size(1) == 4);
    require(numbers.is_cpu() && numbers.scalar_type() == ScalarType::Double);
    require(code.is_contiguous() && numbers.is_contiguous());
    require(x.is_cpu() && x_.dim() == 3 && x.numel() > 0 && (dtype == ScalarType::Float || dtype == ScalarType::Double));
    for (const Tensor& each : weights) require(each.is_contiguous());
    for (const Tensor& each : states) {
      require(fits(each) && each.dim() >= 2 && each.dim() <= 4);
      last_.push_back(empty_as(each));
    }
    for (const Tensor& each : initial_states) require(fits(each));
    for (const Tensor& each : resets) require(each.scalar_type() == ScalarType::Bool && has_one_value_per_step(each));
    for (const Tensor& each : times) require(fits(each) && has_one_value_per_step(each) && are_times(each));
    require(times.empty() || times.size() == 2);
    require(resets.empty() || (resets.size() == 2 && initial_states.size() == states.size()));
  }

  std::tuple<Tensor, Tensors> operator()() {
    const auto* row = data_of<const int64_t>(code);
    int64_t output = code.size(0) - 1;
    while (output >= 0 && !makes_x(static_cast<Instruction>(row[4 * output]))) --output;
    require(output >= 0);
    for (int64_t i = 0; i < code.size(0); ++i, row += 4) {
      is_output_ = i == output;
      apply(static_cast<Instruction>(row[0]), row[1] != 0, row[2], row[3]);
    }
    // Every layer of every state has been written.
    for (size_t i = 0; i < states.size(); ++i) require(written_[i] == num_layers(states[i]));
    return {x_, last_};
  }

 private:
  bool fits(const Tensor& each) const { return each.is_cpu() && each.scalar_type() == x_.scalar_type(); }
  bool has_one_value_per_step(const Tensor& each) const {
    return each.is_cpu() && each.dim() == 2 && each.size(0) == x_.size(0) && each.size(1) == x_.size(1);
  }
  // Not if a time is negative or NaN, or if all are so large that the ordinary call warns.
  bool are_times(const Tensor& each) const {
    bool result = true;
    double smallest = std::numeric_limits<double>::infinity();
    with_type([&](auto type) {
      const auto* values = data_of<const decltype(type)>(each);
      for (int64_t i = 0; i < each.size(0); ++i) {
        for (int64_t k = 0; k < each.size(1); ++k) {
          const double time = values[i * each.stride(0) + k * each.stride(1)];
          result &= time >= 0;  // not `< 0`, because NaN is refused too
          if (time > 0) smallest = std::min(smallest, time);
        }
      }
    });
    return result && (smallest <= most_usual_time || std::isinf(smallest));
  }
  int64_t num_batch() const { return x_.size(time_first ? 1 : 0); }
  int64_t num_steps() const { return x_.size(time_first ? 0 : 1); }
  int64_t num_features() const { return x_.size(2); }
  int64_t num_rows() const { return x_.size(0) * x_.size(1); }

  // A vector of a size, or a matrix of so many columns. Another thread may convert it during the pass.
  const Tensor& next_weight(int64_t dims, int64_t size) {
    require(next_weight_ < weights.size());
    const Tensor& weight = weights[next_weight_++];
    require(fits(weight) && weight.dim() == dims && weight.size(dims - 1) == size && weight.numel() > 0);
    return weight;
  }
  MaybeTensor next_bias(bool has_bias, int64_t size) {
    return has_bias ? MaybeTensor(next_weight(1, size)) : std::nullopt;
  }
  double next_number() {
    require(next_number_ < numbers.numel());
    return data_of<const double>(numbers)[next_number_++];
  }

  static bool makes_x(Instruction i) {
    return i != Instruction::keep && i != Instruction::add && i != Instruction::add_linear;
  }

  bool is_kept(const void* memory) const {
    return std::any_of(kept_.begin(), kept_.end(), [&](const Tensor& each) { return each.data_ptr() == memory; });
  }

  // In memory that is kept for later calls, unless x is the output of the pass.
  Tensor new_x(int64_t features) {
    const int64_t bytes = num_rows() * features * x_.element_size();
    const bool is_large = !is_output_ && bytes >= KeptMemory::least_bytes && bytes <= most_kept_bytes;
    for (Scratch& scratch : scratch_) {
      const void* memory = scratch.at_least(0);
      if (!is_large || (memory && (memory == x_.data_ptr() || is_kept(memory)))) continue;
      return view_of(
          scratch.at_least(bytes), {x_.size(0), x_.size(1), features}, {x_.size(1) * features, features, 1}, x_);
    }
    return empty({x_.size(0), x_.size(1), features}, x_);
  }

  template <class F>
  void with_type(const F& f) const {
    x_.scalar_type() == ScalarType::Float ? f(float()) : f(double());
  }

  void apply(Instruction instruction, bool has_bias, int64_t state, int64_t cell) {
    switch (instruction) {
      case Instruction::keep: kept_.push_back(as_contiguous(x_)); return;
      case Instruction::add: add_kept(kept()); return kept_.pop_back();
      case Instruction::add_linear: add_kept(mapped(kept(), has_bias)); return kept_.pop_back();
      case Instruction::norm: return norm(has_bias);
      case Instruction::linear: x_ = mapped(as_contiguous(x_), has_bias); return;
      case Instruction::linear_gelu: return map_and_gelu(has_bias);
      case Instruction::causal_conv: return convolve(has_bias, state);
      case Instruction::scan: return recur(has_bias, false, state, cell);
      case Instruction::scan_both: return recur(has_bias, true, state, cell);
    }
    throw DoesNotFit();
  }

  const Tensor& kept() const {
    require(!kept_.empty());
    return kept_.back();
  }

  // Only after an operation that made a new x, because x is changed in place.
  void add_kept(const Tensor& kept) {
    const int64_t features = num_features();
    require(x_.is_contiguous() && kept.size(2) == features && x_.data_ptr() != x.data_ptr() && !is_kept(x_.data_ptr()));
    with_type([&](auto type) {
      auto* out = data_of<decltype(type)>(x_);
      const auto* in = data_of<const decltype(type)>(kept);
      for_each(num_rows(), features, [&](int64_t row) {
        for (int64_t i = row * features; i < (row + 1) * features; ++i) out[i] += in[i];
      });
    });
  }

  void norm(bool has_bias) {
    const int64_t features = num_features();
    const Tensor x = as_contiguous(x_), out = new_x(features);
    const Tensor& weight = next_weight(1, features);
    const MaybeTensor bias = next_bias(has_bias, features);
    double eps = next_number();
    with_type([&](auto type) {
      using T = decltype(type);
      if (std::isnan(eps)) eps = std::numeric_limits<T>::epsilon();
      void* scales = scales_.at_least(num_rows() * sizeof(T));
      normalize({storage_of(x), has_bias, eps, x.data_ptr(), out.data_ptr(), scales, num_rows(), features}, false);
      const T *w = data_of<const T>(weight), *b = bias ? data_of<const T>(*bias) : nullptr;
      for_each(num_rows(), features, [&](int64_t row) {
        T* to = data_of<T>(out) + row * features;
        for (int64_t i = 0; i < features; ++i) to[i] = to[i] * w[i] + (b ? b[i] : T(0));
      });
    });
    x_ = out;
  }

  // W x or W x + b of contiguous x.
  Tensor mapped(const Tensor& x, bool has_bias) {
    const Tensor& weight = next_weight(2, x.size(2));
    const Tensor out = new_x(weight.size(0));
    map_rows(out.data_ptr(), x.data_ptr(), num_rows(), x, weight, next_bias(has_bias, weight.size(0)));
    return out;
  }

  // gelu(W x + b). Not by aten::gelu: the stable ABI never frees the string that it takes.
  void map_and_gelu(bool has_bias) {
    x_ = mapped(as_contiguous(x_), has_bias);
    const int64_t rows = num_rows(), columns = num_features();
    if (rows <= most_few_rows) {
      return with_type([&](auto type) { gelu_in_place(data_of<decltype(type)>(x_), x_.numel()); });
    }
    // This operator adds a product, which has no depth.
    void* data = x_.data_ptr();
    AtenTensorHandle out;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__addmm_activation(
        matrix(data, rows, columns, x_).get(), matrix(data, rows, 0, x_).get(), matrix(data, 0, columns, x_).get(), 1, 1,
        /*use_gelu=*/1, &out));
    x_ = torch::stable::view(Tensor(out), {x_.size(0), x_.size(1), columns});
  }

  template <class T>
  void gelu_in_place(T* x, int64_t count) const {
    std::vector<T> values(x, x + count);
    for (T& value : values) value *= T(0.70710678118654752440);
    std::array<StableIValue, 1> stack{torch::stable::detail::from(matrix(values.data(), 1, count, x_))};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::erf_", "", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
    for (int64_t i = 0; i < count; ++i) x[i] *= T(0.5) * (T(1) + values[i]);
  }

  // x + conv(x).
  void convolve(bool has_bias, int64_t state) {
    require(!time_first);
    begin_layers(state, 1);
    const Tensor x = x_, &past = states[state], &weight = next_weight(2, num_features());
    require(sizes_of(past) == std::vector<int64_t>{1, num_batch(), weight.size(0) - 1, num_features()});
    Tensors tensors(resets.empty() ? 2 : 3, past);
    if (!resets.empty()) tensors[2] = resets[0];
    const MaybeTensor bias = next_bias(has_bias, num_features());
    x_ = new_x(num_features());
    const Call call{"inference", tensors, bit(Flag::has_reset, !resets.empty()), 0};
    causal_conv(call, x, weight, bias, true, {x_, last_[state], {}});
  }

  // States are (L * D, B, 1, N), (L * D, B, N) of a layer like torch's, or (B, N) of a cell.
  static int64_t num_layers(const Tensor& state) { return state.dim() == 2 ? 1 : state.size(0); }

  // Returns the index of the next layer of a state, of which the caller writes so many.
  int64_t begin_layers(int64_t state, int64_t count) {
    require(state >= 0 && state < static_cast<int64_t>(states.size()));
    const int64_t first = written_[state];
    written_[state] += count;
    require(written_[state] <= num_layers(states[state]));
    return first;
  }

  Tensor layer_of(const Tensor& state, int64_t index) const {
    const int64_t dims = state.dim(), features = state.size(-1);
    require(state.size(dims == 2 ? 0 : 1) == num_batch() && (dims != 4 || state.size(2) == 1));
    if (num_layers(state) == 1) return state;
    char* data = data_of<char>(state) + index * num_batch() * features * state.element_size();
    return view_of(data, {num_batch(), 1, features}, {features, features, 1}, state);
  }

  void recur(bool has_bias, bool both, int64_t state, int64_t bits) {
    // A flag could ask for more than this pass gives.
    require((bits & ~(bit(Flag{}) - 1) & ~bit(Flag::output_gate)) == 0);
    const int64_t directions = both ? 2 : 1, first = begin_layers(state, directions);
    const Tensor x = x_, h = as_contiguous(states[state]);
    const Tensor initial_state = resets.empty() ? h : as_contiguous(initial_states[state]);
    require(resets.empty() || sizes_of(initial_state) == sizes_of(h));
    const double min_decay = next_number();
    const int64_t features = h.size(-1);
    Tensor out = new_x(directions * features);
    for (int64_t direction = 0; direction < directions; ++direction) {
      const int64_t index = first + direction;
      Tensors tensors;
      tensors.reserve(num_arguments);
      tensors.push_back(layer_of(h, index));
      tensors.push_back(layer_of(initial_state, index));
      if (!resets.empty()) tensors.push_back(resets[direction]);
      if (!times.empty()) tensors.push_back(times[direction]);
      const Tensor& weight = next_weight(2, x.size(2));
      const MaybeTensor bias = next_bias(has_bias, weight.size(0));
      const bool is_gru = (bits & 0xff) == static_cast<int64_t>(Cell::gru);
      if (is_gru) {
        require(next_weight_ < weights.size());
        tensors.push_back(next_weight(2, weights[next_weight_].size(-1)));
        if (has_bias) tensors.push_back(next_weight(1, features));
      }
      const int64_t flags = bit(Flag::has_recurrent, is_gru) | bit(Flag::has_recurrent_bias, is_gru && has_bias) |
                            bit(Flag::has_reset, !resets.empty()) | bit(Flag::has_dt, !times.empty()) |
                            bit(Flag::reverse, direction == 1) | bit(Flag::time_first, time_first) |
                            bit(Flag::bfloat16_products, bfloat16_products);
      const Tensor part = both ? torch::stable::narrow(out, 2, direction * features, features) : out;
      const Tensor last = layer_of(last_[state], index);
      const Call call{"inference", tensors, bits | flags, min_decay};
      require(times.empty() || call.traits().takes_time);
      require(weight.size(0) == features * call.num_parts());
      linear_recurrence(call, x, weight, bias, 0, {part, last, {}});
    }
    x_ = out;
  }

  Tensor x_;
  bool is_output_ = false;
  size_t next_weight_ = 0;
  int64_t next_number_ = 0;
  std::array<Scratch, 4> scratch_;
  Scratch scales_;
  Tensors kept_, last_;
  std::vector<int64_t> written_;  // how many layers of each state have been written
};

// The names of cells, activations, flags and instructions, in the order of their numbers, `group`, `first_flag`, and the
// text `built_from`.
std::string names() {
#define MINGRU_TEXT(name, ...) #name " "
  const std::string text = MINGRU_CELLS(MINGRU_TEXT) MINGRU_MIXTURES(MINGRU_TEXT) "|" MINGRU_ACTIVATIONS(MINGRU_TEXT) "|"
      MINGRU_FLAGS(MINGRU_TEXT) "|" MINGRU_INSTRUCTIONS(MINGRU_TEXT);
#undef MINGRU_TEXT
  return text + "|" + std::to_string(group) + "|" + std::to_string(first_flag) + "|" + built_from;
}

// x is (B, S, I), (S, B, I) if `time_first`, or (B, I) for one step, whose output is (B, 1, *). Returns the output and
// the last states, which have the shapes of `states`; an output without elements if an argument does not fit. `resets` and
// `times` are empty, or have a tensor for each direction.
std::tuple<Tensor, Tensors> inference(
    const Tensor& x, const Tensors& weights, const Tensors& states, const Tensors& initial_states,
    const Tensors& resets, const Tensors& times, const Tensor& code, const Tensor& numbers, bool time_first,
    bool bfloat16_products) {
  try {
    return InferencePass(
        {x, weights, states, initial_states, resets, times, code, numbers, time_first, bfloat16_products})();
  } catch (const DoesNotFit&) {
    return {empty({0}, x), {}};
  }
}

}  // namespace

MINGRU_OPERATOR(instruction_sets, CompositeExplicitAutograd, "() -> str")
MINGRU_OPERATOR(names, CompositeExplicitAutograd, "() -> str")
MINGRU_OPERATOR(
    inference, CPU,
    "(Tensor x, Tensor[] weights, Tensor[] states, Tensor[] initial_states, Tensor[] resets, Tensor[] times, "
    "Tensor code, Tensor numbers, bool time_first, bool bfloat16_products) -> (Tensor, Tensor[])")
