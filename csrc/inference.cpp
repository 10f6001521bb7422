// A whole inference pass of stacked layers or residual blocks, in one call. Called only by src/mingru/ops/inference.py,
// which writes the code of a module: a row for each instruction, (operation, state, layer, cell). An instruction
// changes x, and takes its weights and numbers (the eps of a norm, the lower bound of a recurrence's decay) from lists that
// are in the same order. `cells` has the names of the cells, separated by spaces. Code and numbers are tensors, because
// reading a list of numbers takes as long as the arithmetic of a step.
#include "linear.h"

#include <array>
#include <cmath>
#include <limits>

#include "operands.h"

namespace {

using namespace mingru;

enum Operation : int64_t {
  keep,              // remember x
  add,               // x + what was remembered last
  add_linear,        // x + W (what was remembered last)
  rms_norm,          // with weight
  layer_norm,        // with weight and bias
  linear,            // W x
  linear_with_bias,  // W x + b
  gelu,
  causal_conv,            // x + a causal depthwise convolution of x
  causal_conv_with_bias,  //
  scan,                   // a recurrence with its linear map
  scan_with_bias,
  scan_both,  // in both directions: two weights
  scan_both_with_bias,
};

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
      const Tensor& code, const Tensor& numbers, const std::string& cells, bool time_first)
      : x_(x.dim() == 2 ? torch::stable::unsqueeze(x, 1) : x),
        weights_(weights),
        states_(states),
        initial_states_(initial_states),
        resets_(resets),
        times_(times),
        code_(code),
        numbers_(numbers),
        time_first_(time_first) {
    for (size_t begin = 0; begin < cells.size();) {
      const size_t end = std::min(cells.find(' ', begin), cells.size());
      cells_.push_back(cells.substr(begin, end - begin));
      begin = end + 1;
    }
    const ScalarType dtype = x.scalar_type();
    require(code.is_cpu() && code.scalar_type() == ScalarType::Long && code.dim() == 2 && code.size(1) == 4);
    require(numbers.is_cpu() && numbers.scalar_type() == ScalarType::Double);
    require(code.is_contiguous() && numbers.is_contiguous());
    require(x.is_cpu() && x_.dim() == 3 && x.numel() > 0 && (dtype == ScalarType::Float || dtype == ScalarType::Double));
    for (const Tensor& each : weights) require(fits(each) && each.is_contiguous());
    for (const Tensor& each : states) {
      require(fits(each));
      last_.push_back(empty(sizes_of(each), x));
    }
    for (const Tensor& each : initial_states) require(fits(each));
    for (const Tensor& each : resets) require(each.scalar_type() == ScalarType::Bool && has_one_value_per_step(each));
    for (const Tensor& each : times) require(fits(each) && has_one_value_per_step(each) && is_not_negative(each));
    require(times.empty() || times.size() == 2);
    require(resets.empty() || (resets.size() == 2 && initial_states.size() == states.size()));
  }

  std::tuple<Tensor, std::vector<Tensor>> run() {
    const auto* code = static_cast<const int64_t*>(code_.data_ptr());
    for (int64_t i = 0; i < code_.size(0); ++i, code += 4) {
      apply(static_cast<Operation>(code[0]), code[1], code[2], code[3]);
    }
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

  Tensor new_x(int64_t features) const { return empty({x_.size(0), x_.size(1), features}, x_); }

  template <class F>
  void with_type(const F& f) const {
    if (x_.scalar_type() == ScalarType::Float) {
      f(float());
    } else {
      f(double());
    }
  }

  void apply(Operation operation, int64_t state, int64_t layer, int64_t cell) {
    switch (operation) {
      case keep: kept_.push_back(as_contiguous(x_)); return;
      case add: add_kept(pop_kept()); return;
      case add_linear: {
        const Tensor kept = pop_kept();
        const Tensor mapped = new_x(num_features());
        const Tensor& weight = next_matrix(kept.size(2));
        require(weight.size(0) == num_features());
        map_rows(mapped.data_ptr(), kept.data_ptr(), num_rows(), weight, std::nullopt);
        return add_kept(mapped);
      }
      case rms_norm: return norm(false);
      case layer_norm: return norm(true);
      case linear: return multiply_by_weight(false);
      case linear_with_bias: return multiply_by_weight(true);
      case gelu: return apply_gelu();
      case causal_conv: return convolve(false, state);
      case causal_conv_with_bias: return convolve(true, state);
      case scan: return recur(false, false, state, layer, cell);
      case scan_with_bias: return recur(true, false, state, layer, cell);
      case scan_both: return recur(false, true, state, layer, cell);
      case scan_both_with_bias: return recur(true, true, state, layer, cell);
    }
    throw DoesNotFit();
  }

  Tensor pop_kept() {
    require(!kept_.empty());
    const Tensor kept = kept_.back();
    kept_.pop_back();
    return kept;
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
      const double eps = given_eps < 0 ? std::numeric_limits<T>::epsilon() : given_eps;
      for_each_row(num_rows(), features, [&](int64_t row) {
        norm_row(
            static_cast<T*>(out.data_ptr()) + row * features, static_cast<const T*>(x.data_ptr()) + row * features,
            static_cast<const T*>(weight.data_ptr()), static_cast<const T*>(bias), features, eps);
      });
    });
    x_ = out;
  }

  void multiply_by_weight(bool with_bias) {
    const Tensor x = as_contiguous(x_);
    const Tensor& weight = next_matrix(num_features());
    const Tensor out = new_x(weight.size(0));
    const MaybeTensor bias = with_bias ? MaybeTensor(next_vector(weight.size(0))) : std::nullopt;
    map_rows(out.data_ptr(), x.data_ptr(), num_rows(), weight, bias);
    x_ = out;
  }

  void apply_gelu() {
    std::array<StableIValue, 2> stack{torch::stable::detail::from(x_), torch::stable::detail::from(std::string("none"))};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::gelu", "", stack.data(), TORCH_ABI_VERSION));
    x_ = torch::stable::detail::to<Tensor>(stack[0]);
  }

  // y_t = x_t + bias + sum_k weight_k x_{t-k}; inputs from before a reset count as 0.
  void convolve(bool with_bias, int64_t state) {
    require(!time_first_ && state >= 0 && state < static_cast<int64_t>(states_.size()));
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

  // One layer of a state (L * D, B, 1, N), (L * D, B, N) of a layer like torch's, or (B, N) of a cell.
  Tensor layer_of(const Tensor& state, int64_t index) const {
    const int64_t dims = state.dim(), layers = dims == 2 ? 1 : state.size(0), features = state.size(-1);
    require(index < layers && state.size(dims == 2 ? 0 : 1) == num_batch() && (dims != 4 || state.size(2) == 1));
    if (layers == 1) return state;
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

  void recur(bool with_bias, bool both, int64_t state, int64_t layer, int64_t cell_index) {
    require(state >= 0 && state < static_cast<int64_t>(states_.size()) && layer >= 0);
    require(cell_index >= 0 && cell_index < static_cast<int64_t>(cells_.size()));
    const std::string& cell = cells_[cell_index];
    const double min_decay = next_number();
    const bool is_timed = min_decay != 0 || !times_.empty();
    require(find_cell(is_timed ? cell + "_timed" : cell) != std::end(cell_names));
    const int64_t directions = both ? 2 : 1;
    const Tensor x = x_, h = as_contiguous(states_[state]);
    const bool has_reset = !resets_.empty();
    const MaybeTensor initial_state = has_reset ? MaybeTensor(as_contiguous(initial_states_[state])) : std::nullopt;
    require(h.dim() >= 2 && h.dim() <= 4);
    const int64_t features = h.size(-1);
    const Tensor out = new_x(directions * features);
    for (int64_t direction = 0; direction < directions; ++direction) {
      const Tensor& weight = next_matrix(x.size(2));
      require(weight.size(0) == features * num_inputs_of(cell_of(cell)));
      const MaybeTensor bias = with_bias ? MaybeTensor(next_vector(weight.size(0))) : std::nullopt;
      const int64_t index = layer * directions + direction;
      const Tensor layer_h = layer_of(h, index);
      linear_recurrence(
          x, weight, bias, layer_h, has_reset ? layer_of(*initial_state, index) : layer_h,
          has_reset ? MaybeTensor(resets_[direction]) : std::nullopt,
          times_.empty() ? std::nullopt : MaybeTensor(times_[direction]), std::nullopt, std::nullopt, cell, min_decay,
          direction == 1, time_first_, both ? half_of(out, direction) : out, layer_of(last_[state], index), nullptr);
    }
    x_ = out;
  }

  Tensor x_;
  const std::vector<Tensor>&weights_, &states_, &initial_states_, &resets_, &times_;
  const Tensor &code_, &numbers_;
  std::vector<std::string> cells_;
  const bool time_first_;
  size_t next_weight_ = 0;
  int64_t next_number_ = 0;
  std::vector<Tensor> kept_, last_;
};

// x is (B, S, I), (S, B, I) if `time_first`, or (B, I) for one step, whose output is (B, 1, *). Returns the output and
// the last states, which have the shapes of `states`; an output without elements if an argument does not fit. `resets` and
// `times` are empty, or have a tensor for each direction.
std::tuple<Tensor, std::vector<Tensor>> inference(
    const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& states,
    const std::vector<Tensor>& initial_states, const std::vector<Tensor>& resets, const std::vector<Tensor>& times,
    const Tensor& code, const Tensor& numbers, const std::string& cells, bool time_first) {
  try {
    return Pass(x, weights, states, initial_states, resets, times, code, numbers, cells, time_first).run();
  } catch (const DoesNotFit&) {
    return {empty({0}, x), {}};
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mingru, library) {
  library.def(
      "inference(Tensor x, Tensor[] weights, Tensor[] states, Tensor[] initial_states, Tensor[] resets, "
      "Tensor[] times, Tensor code, Tensor numbers, str cells, bool time_first) -> (Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(mingru, CPU, library) { library.impl("inference", TORCH_BOX(&inference)); }
