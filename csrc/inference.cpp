// A whole inference pass of stacked layers or residual blocks, in one call. Called only by src/mingru/ops/inference.py,
// which writes the code of a module: a row for each instruction, (instruction, whether it has a bias, state, cell and
// activation). An instruction changes x, and takes its weights and numbers (the eps of a norm, the lower bound of a
// recurrence's decay) from lists that are in the same order. Code and numbers are tensors, because reading a list of
// numbers takes as long as the arithmetic of a step.
#include "linear.h"

#include <array>
#include <cmath>
#include <limits>

#include "operands.h"

namespace {

using namespace mingru;

#define MINGRU_ENUM(name) name,
enum class Instruction : int64_t { MINGRU_INSTRUCTIONS(MINGRU_ENUM) };
#undef MINGRU_ENUM

// The memory of a pass between its instructions, at most so many bytes for each value. Smaller values are as fast in new
// memory; larger ones would keep too much.
constexpr int64_t least_kept_bytes = 1 << 16, most_kept_bytes = 1 << 25;
thread_local std::array<Scratch, 4> values_scratch;

// Thrown if an argument does not fit. The caller then runs the modules one by one, which names the argument.
struct DoesNotFit {};

void require(bool fits) {
  if (!fits) throw DoesNotFit();
}

template <class F>
void for_each_row(int64_t rows, int64_t features, const F& f) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  };
  if (rows * features <= values_per_thread) {
    range(0, rows);
  } else {
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, values_per_thread / features), range);
  }
}

// In double and in a fixed order, so that the result depends neither on threads nor on the processor.
template <class T, class F>
double sum(int64_t count, const F& term) {
  constexpr int64_t width = 8;
  std::array<double, width> sums{};
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    for (int64_t k = 0; k < width; ++k) sums[k] += term(i + k);
  }
  for (; i < count; ++i) sums[i % width] += term(i);
  double total = 0;
  for (double part : sums) total += part;
  return total;
}

template <class T>
void norm_row(T* out, const T* x, const T* weight, const T* bias, int64_t features, double eps) {
  double mean = 0;
  if (bias) mean = sum<T>(features, [&](int64_t i) { return static_cast<double>(x[i]); }) / features;
  const double squares = sum<T>(features, [&](int64_t i) {
    const double centered = x[i] - mean;
    return centered * centered;
  });
  const double scale = 1 / std::sqrt(squares / features + eps);
  for (int64_t i = 0; i < features; ++i) {
    out[i] = static_cast<T>((x[i] - mean) * scale) * weight[i] + (bias ? bias[i] : T(0));
  }
}

class Pass {
 public:
  Pass(
      const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& states,
      const std::vector<Tensor>& initial_states, const std::vector<Tensor>& resets, const std::vector<Tensor>& times,
      const Tensor& code, const Tensor& numbers, bool time_first)
      : x_(x.dim() == 2 ? torch::stable::unsqueeze(x, 1) : x),
        weights_(weights),
        states_(states),
        initial_states_(initial_states),
        resets_(resets),
        times_(times),
        code_(code),
        numbers_(numbers),
        time_first_(time_first) {
    const ScalarType dtype = x.scalar_type();
    require(code.is_cpu() && code.scalar_type() == ScalarType::Long && code.dim() == 2 && code.size(1) == 4);
    require(numbers.is_cpu() && numbers.scalar_type() == ScalarType::Double);
    require(code.is_contiguous() && numbers.is_contiguous());
    require(x.is_cpu() && x_.dim() == 3 && x.numel() > 0 && (dtype == ScalarType::Float || dtype == ScalarType::Double));
    for (const Tensor& each : weights) require(fits(each) && each.is_contiguous());
    for (const Tensor& each : states) {
      require(fits(each) && each.dim() >= 2 && each.dim() <= 4);
      last_.push_back(empty(sizes_of(each), x));
      written_.push_back(0);
    }
    for (const Tensor& each : initial_states) require(fits(each));
    for (const Tensor& each : resets) require(each.scalar_type() == ScalarType::Bool && has_one_value_per_step(each));
    for (const Tensor& each : times) require(fits(each) && has_one_value_per_step(each) && is_not_negative(each));
    require(times.empty() || times.size() == 2);
    require(resets.empty() || (resets.size() == 2 && initial_states.size() == states.size()));
  }

  std::tuple<Tensor, std::vector<Tensor>> run() {
    const auto* code = static_cast<const int64_t*>(code_.data_ptr());
    int64_t output = code_.size(0) - 1;
    while (output > 0 && !makes_x(static_cast<Instruction>(code[4 * output]))) --output;
    for (int64_t i = 0; i < code_.size(0); ++i, code += 4) {
      is_output_ = i == output;
      apply(static_cast<Instruction>(code[0]), code[1] != 0, code[2], code[3]);
    }
    // Every layer of every state has been written.
    for (size_t i = 0; i < states_.size(); ++i) require(written_[i] == num_layers(states_[i]));
    return {x_, last_};
  }

 private:
  bool fits(const Tensor& each) const { return each.is_cpu() && each.scalar_type() == x_.scalar_type(); }
  bool has_one_value_per_step(const Tensor& each) const {
    return each.is_cpu() && each.dim() == 2 && each.size(0) == x_.size(0) && each.size(1) == x_.size(1);
  }
  bool is_not_negative(const Tensor& each) const {
    bool result = true;
    with_type([&](auto type) {
      const auto* values = static_cast<const decltype(type)*>(each.data_ptr());
      for (int64_t i = 0; i < each.size(0); ++i) {
        // Not `< 0`, because NaN is refused too.
        for (int64_t k = 0; k < each.size(1); ++k) result &= values[i * each.stride(0) + k * each.stride(1)] >= 0;
      }
    });
    return result;
  }
  int64_t num_batch() const { return x_.size(time_first_ ? 1 : 0); }
  int64_t num_steps() const { return x_.size(time_first_ ? 0 : 1); }
  int64_t num_features() const { return x_.size(2); }
  int64_t num_rows() const { return x_.size(0) * x_.size(1); }

  const Tensor& next_weight() {
    require(next_weight_ < weights_.size());
    return weights_[next_weight_++];
  }
  double next_number() {
    require(next_number_ < numbers_.numel());
    return static_cast<const double*>(numbers_.data_ptr())[next_number_++];
  }
  const Tensor& next_matrix(int64_t columns) {
    const Tensor& weight = next_weight();
    require(weight.dim() == 2 && weight.size(1) == columns && weight.size(0) > 0);
    return weight;
  }
  const Tensor& next_vector(int64_t size) {
    const Tensor& weight = next_weight();
    require(weight.dim() == 1 && weight.size(0) == size);
    return weight;
  }

  static bool makes_x(Instruction instruction) {
    return instruction != Instruction::add && instruction != Instruction::add_linear &&
           instruction != Instruction::keep;
  }

  bool is_used(const void* memory) const {
    const auto is_there = [&](const Tensor& each) { return each.data_ptr() == memory; };
    return is_there(x_) || std::any_of(kept_.begin(), kept_.end(), is_there);
  }

  // In memory that the thread keeps, unless x is the output of the pass.
  Tensor new_x(int64_t features) const {
    const int64_t bytes = num_rows() * features * x_.element_size();
    if (!is_output_ && bytes >= least_kept_bytes && bytes <= most_kept_bytes) {
      for (Scratch& scratch : values_scratch) {
        void* memory = scratch.at_least(0);
        if (memory && is_used(memory)) continue;
        return torch::stable::from_blob(
            scratch.at_least(bytes), {x_.size(0), x_.size(1), features}, {x_.size(1) * features, features, 1}, x_.device(),
            x_.scalar_type());
      }
    }
    return empty({x_.size(0), x_.size(1), features}, x_);
  }

  template <class F>
  void with_type(const F& f) const {
    if (x_.scalar_type() == ScalarType::Float) {
      f(float());
    } else {
      f(double());
    }
  }

  void apply(Instruction instruction, bool has_bias, int64_t state, int64_t cell) {
    switch (instruction) {
      case Instruction::keep: kept_.push_back(as_contiguous(x_)); return;
      case Instruction::add: add_kept(kept()); return kept_.pop_back();
      case Instruction::add_linear: add_kept(mapped(kept(), has_bias)); return kept_.pop_back();
      case Instruction::rms_norm: return norm(false);
      case Instruction::layer_norm: return norm(true);
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
    require(x_.is_contiguous() && kept.size(2) == num_features());
    with_type([&](auto type) {
      using T = decltype(type);
      T* out = static_cast<T*>(x_.data_ptr());
      const T* in = static_cast<const T*>(kept.data_ptr());
      const int64_t features = num_features();
      for_each_row(num_rows(), features, [&](int64_t row) {
        for (int64_t i = row * features; i < (row + 1) * features; ++i) out[i] += in[i];
      });
    });
  }

  void norm(bool with_bias) {
    const int64_t features = num_features();
    const Tensor x = as_contiguous(x_), out = new_x(features);
    const Tensor& weight = next_vector(features);
    const void* bias = with_bias ? next_vector(features).data_ptr() : nullptr;
    const double given_eps = next_number();
    with_type([&](auto type) {
      using T = decltype(type);
      const double eps = std::isnan(given_eps) ? std::numeric_limits<T>::epsilon() : given_eps;
      for_each_row(num_rows(), features, [&](int64_t row) {
        norm_row(
            static_cast<T*>(out.data_ptr()) + row * features, static_cast<const T*>(x.data_ptr()) + row * features,
            static_cast<const T*>(weight.data_ptr()), static_cast<const T*>(bias), features, eps);
      });
    });
    x_ = out;
  }

  // W x or W x + b of contiguous x.
  Tensor mapped(const Tensor& x, bool has_bias) {
    const Tensor& weight = next_matrix(x.size(2));
    const Tensor out = new_x(weight.size(0));
    MaybeTensor bias;
    if (has_bias) bias = next_vector(weight.size(0));
    map_rows(out.data_ptr(), x.data_ptr(), num_rows(), weight, bias);
    return out;
  }

  // gelu(W x + b). Not by aten::gelu: the stable ABI never frees the string that it takes.
  void map_and_gelu(bool has_bias) {
    const Tensor x = as_contiguous(x_);
    if (num_rows() <= most_few_rows) {
      x_ = mapped(x, has_bias);
      with_type([&](auto type) { gelu_in_place(static_cast<decltype(type)*>(x_.data_ptr())); });
      return;
    }
    const Tensor& weight = next_matrix(x.size(2));
    const int64_t columns = weight.size(0), features = weight.size(1);
    const Tensor added = has_bias ? next_vector(columns) : matrix(weight.data_ptr(), 1, 1, 1, 1, x);  // times has_bias
    const Tensor rows = matrix(x.data_ptr(), num_rows(), features, features, 1, x);
    AtenTensorHandle out;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__addmm_activation(
        added.get(), rows.get(), transposed(weight).get(), has_bias, 1, /*use_gelu=*/1, &out));
    x_ = torch::stable::view(Tensor(out), {x.size(0), x.size(1), columns});
  }

  template <class T>
  void gelu_in_place(T* x) const {
    const int64_t count = x_.numel();
    std::vector<T> values(x, x + count);
    for (T& value : values) value *= T(0.70710678118654752440);
    std::array<StableIValue, 1> stack{torch::stable::detail::from(matrix(values.data(), 1, count, count, 1, x_))};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::erf_", "", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
    for (int64_t i = 0; i < count; ++i) x[i] *= T(0.5) * (T(1) + values[i]);
  }

  // y_t = x_t + bias + sum_k weight_k x_{t-k}; inputs from before a reset count as 0.
  void convolve(bool with_bias, int64_t state) {
    require(!time_first_);
    begin_layers(state, 1);
    const int64_t features = num_features(), steps = num_steps();
    const Tensor& weight = next_matrix(features);
    const int64_t num_past = weight.size(0) - 1;
    const Tensor x = as_contiguous(x_), past = as_contiguous(states_[state]), out = new_x(features);
    const Tensor& last = last_[state];
    require(past.dim() == 4 && past.size(0) == 1 && past.size(1) == num_batch());
    require(past.size(2) == num_past && past.size(3) == features);
    const void* bias = with_bias ? next_vector(features).data_ptr() : nullptr;
    const Tensor* reset = resets_.empty() ? nullptr : &resets_[0];
    with_type([&](auto type) {
      using T = decltype(type);
      const T* w = static_cast<const T*>(weight.data_ptr());
      const T* b = static_cast<const T*>(bias);
      const auto is_reset = [&](int64_t batch, int64_t step) {
        const int64_t at = batch * reset->stride(0) + step * reset->stride(1);
        return static_cast<const uint8_t*>(reset->data_ptr())[at] != 0;
      };
      // The input of a step, which may be negative; the state holds the inputs before step 0.
      const auto input = [&](int64_t batch, int64_t step) {
        return step < 0 ? static_cast<const T*>(past.data_ptr()) + (batch * num_past + num_past + step) * features
                        : static_cast<const T*>(x.data_ptr()) + (batch * steps + step) * features;
      };
      // Number of inputs before this step, at most num_past, that no reset has removed.
      const auto num_visible = [&](int64_t batch, int64_t step) {
        if (!reset) return num_past;
        int64_t visible = 0;
        while (visible < num_past && (step - visible < 0 || !is_reset(batch, step - visible))) ++visible;
        return visible;
      };
      for_each_row(num_rows(), features * (num_past + 1), [&](int64_t row) {
        const int64_t batch = row / steps, step = row % steps;
        const T* now = input(batch, step);
        T* to = static_cast<T*>(out.data_ptr()) + row * features;
        for (int64_t i = 0; i < features; ++i) to[i] = now[i] * w[i] + (b ? b[i] : T(0));
        const int64_t visible = num_visible(batch, step);
        for (int64_t lag = 1; lag <= visible; ++lag) {
          const T* before = input(batch, step - lag);
          const T* of_lag = w + lag * features;
          for (int64_t i = 0; i < features; ++i) to[i] += before[i] * of_lag[i];
        }
        for (int64_t i = 0; i < features; ++i) to[i] += now[i];
      });
      for (int64_t batch = 0; batch < num_batch(); ++batch) {
        T* to = static_cast<T*>(last.data_ptr()) + batch * num_past * features;
        // The last step itself, and what it sees.
        const int64_t visible = num_visible(batch, steps - 1) + 1;
        for (int64_t lag = 0; lag < num_past; ++lag) {
          T* slot = to + (num_past - 1 - lag) * features;
          if (lag < visible) {
            std::copy_n(input(batch, steps - 1 - lag), features, slot);
          } else {
            std::fill_n(slot, features, T(0));
          }
        }
      }
    });
    x_ = out;
  }

  // States are (L * D, B, 1, N), (L * D, B, N) of a layer like torch's, or (B, N) of a cell.
  static int64_t num_layers(const Tensor& state) { return state.dim() == 2 ? 1 : state.size(0); }

  // Returns the index of the next layer of a state, of which the caller writes so many.
  int64_t begin_layers(int64_t state, int64_t count) {
    require(state >= 0 && state < static_cast<int64_t>(states_.size()));
    const int64_t first = written_[state];
    written_[state] += count;
    require(written_[state] <= num_layers(states_[state]));
    return first;
  }

  Tensor layer_of(const Tensor& state, int64_t index) const {
    const int64_t dims = state.dim(), features = state.size(-1);
    require(state.size(dims == 2 ? 0 : 1) == num_batch() && (dims != 4 || state.size(2) == 1));
    if (num_layers(state) == 1) return state;
    char* data = static_cast<char*>(state.data_ptr()) + index * num_batch() * features * state.element_size();
    return torch::stable::from_blob(
        data, {num_batch(), 1, features}, {features, features, 1}, state.device(), state.scalar_type());
  }

  // The features of one direction.
  static Tensor half_of(const Tensor& x, int64_t direction) {
    const int64_t features = x.size(2) / 2;
    char* data = static_cast<char*>(x.data_ptr()) + direction * features * x.element_size();
    return torch::stable::from_blob(
        data, {x.size(0), x.size(1), features}, {x.stride(0), x.stride(1), 1}, x.device(), x.scalar_type());
  }

  void recur(bool has_bias, bool both, int64_t state, int64_t how) {
    const int64_t directions = both ? 2 : 1, first = begin_layers(state, directions);
    const Tensor x = x_, h = as_contiguous(states_[state]);
    const bool has_reset = !resets_.empty();
    const Tensor initial_state = has_reset ? as_contiguous(initial_states_[state]) : h;
    require(!has_reset || sizes_of(initial_state) == sizes_of(h));
    const double min_decay = next_number();
    const int64_t features = h.size(-1);
    const Tensor out = new_x(directions * features);
    for (int64_t direction = 0; direction < directions; ++direction) {
      const int64_t index = first + direction;
      const Tensor layer_h = layer_of(h, index);
      Call call = call_of("inference", layer_h, has_reset ? layer_of(initial_state, index) : layer_h, how, min_decay);
      require(times_.empty() || takes_time(call.cell));
      if (has_reset) call.reset = resets_[direction];
      if (!times_.empty()) call.dt = times_[direction];
      call.reverse = direction == 1;
      call.time_first = time_first_;
      const Tensor& weight = next_matrix(x.size(2));
      require(weight.size(0) == features * num_inputs_of(call.cell));
      MaybeTensor bias;
      if (has_bias) bias = next_vector(weight.size(0));
      linear_recurrence(
          call, x, weight, bias, both ? half_of(out, direction) : out, layer_of(last_[state], index), nullptr);
    }
    x_ = out;
  }

  Tensor x_;
  const std::vector<Tensor>&weights_, &states_, &initial_states_, &resets_, &times_;
  const Tensor &code_, &numbers_;
  const bool time_first_;
  bool is_output_ = false;
  size_t next_weight_ = 0;
  int64_t next_number_ = 0;
  std::vector<Tensor> kept_, last_;
  std::vector<int64_t> written_;  // how many layers of each state have been written
};

// x is (B, S, I), (S, B, I) if `time_first`, or (B, I) for one step, whose output is (B, 1, *). Returns the output and
// the last states, which have the shapes of `states`; an output without elements if an argument does not fit. `resets` and
// `times` are empty, or have a tensor for each direction.
std::tuple<Tensor, std::vector<Tensor>> inference(
    const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& states,
    const std::vector<Tensor>& initial_states, const std::vector<Tensor>& resets, const std::vector<Tensor>& times,
    const Tensor& code, const Tensor& numbers, bool time_first) {
  try {
    return Pass(x, weights, states, initial_states, resets, times, code, numbers, time_first).run();
  } catch (const DoesNotFit&) {
    return {empty({0}, x), {}};
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mingru, library) {
  library.def(
      "inference(Tensor x, Tensor[] weights, Tensor[] states, Tensor[] initial_states, Tensor[] resets, "
      "Tensor[] times, Tensor code, Tensor numbers, bool time_first) -> (Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(mingru, CPU, library) { library.impl("inference", TORCH_BOX(&inference)); }
