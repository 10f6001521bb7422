// The linear map and the recurrence of a cell, in blocks whose data stays in the cache. x is a matrix with one row for
// each step of each batch element, in the order of memory. With `lengths`, the rows are the valid steps of the first
// batch element, then those of the next, and so on. Called only by src/mingru/ops/backends/native.py.
#include "linear.h"

#include "operands.h"

namespace {

using namespace mingru;

// Large enough for the full speed of the matrix multiplication. 2 MB was the best compromise of 0.5 to 4 MB on a
// processor with second-level caches of 512 KB and a third-level cache of 32 MB.
constexpr int64_t block_bytes = 1 << 21;
constexpr int64_t most_block_rows = 2048;
// With fewer bytes to copy, a thread costs more time than it saves.
constexpr int64_t bytes_per_thread = 1 << 17;

struct Block {
  Part part;
  int64_t row, num_rows;
};

// The blocks in the order of the scan. A block has all batch elements of some steps, all steps of some batch elements, or
// some steps of one batch element.
std::vector<Block> blocks_of(const Operands& operands, bool time_major, bool backward, int64_t row_bytes) {
  const Scan& scan = operands.scan;
  const int64_t batch = scan.num_batch, steps = scan.num_steps;
  const int64_t most = std::clamp(block_bytes / row_bytes, int64_t(64), most_block_rows);
  std::vector<Block> blocks;
  if (operands.has_lengths()) {
    int64_t row = 0;
    for (int64_t b = 0; b < batch;) {
      const int64_t length = scan.lengths[b];
      if (length > most) {
        for (int64_t begin = 0; begin < length; begin += most) {
          const bool is_last = begin + most >= length;
          const int64_t rows = is_last ? length - begin : most;
          blocks.push_back({{b, b + 1, begin, is_last ? steps : begin + most}, row, rows});
          row += rows;
        }
        ++b;
        continue;
      }
      int64_t end = b, rows = 0;
      while (end < batch && rows + scan.lengths[end] <= most) rows += scan.lengths[end++];
      blocks.push_back({{b, end, 0, steps}, row, rows});
      row += rows;
      b = end;
    }
  } else if (operands.is_packed() || time_major) {
    const auto row_of = [&](int64_t step) { return operands.is_packed() ? operands.step_offset(step) : step * batch; };
    for (int64_t begin = 0; begin < steps;) {
      const int64_t width = row_of(begin + 1) - row_of(begin);
      if (width > most) {
        for (int64_t b = 0; b < width; b += most) {
          const int64_t count = std::min(most, width - b);
          blocks.push_back({{b, b + count, begin, begin + 1}, row_of(begin) + b, count});
        }
        // A block without rows passes on the states of batch elements whose sequences have ended.
        if (width < batch) blocks.push_back({{width, batch, begin, begin + 1}, row_of(begin + 1), 0});
        ++begin;
        continue;
      }
      int64_t end = begin + 1;
      while (end < steps && row_of(end + 1) - row_of(begin) <= most) ++end;
      blocks.push_back({{0, batch, begin, end}, row_of(begin), row_of(end) - row_of(begin)});
      begin = end;
    }
  } else if (steps <= most) {
    const int64_t stride = most / steps;
    for (int64_t b = 0; b < batch; b += stride) {
      const int64_t end = std::min(batch, b + stride);
      blocks.push_back({{b, end, 0, steps}, b * steps, (end - b) * steps});
    }
  } else {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t begin = 0; begin < steps; begin += most) {
        const int64_t end = std::min(steps, begin + most);
        blocks.push_back({{b, b + 1, begin, end}, b * steps + begin, end - begin});
      }
    }
  }
  if (scan.reverse != backward) std::reverse(blocks.begin(), blocks.end());
  return blocks;
}

thread_local Scratch pre_activations_scratch, grads_scratch, rows_scratch, grad_rows_scratch;

// x as a matrix in the order of memory, copied only if neither x nor its transpose is contiguous.
class InputMatrix {
 public:
  InputMatrix(const Call& call, const Tensor& x, const Tensor& weight)
      : matrix_(call.lengths ? with_contiguous_features(x) : contiguous(call, x, time_major_)),
        batch_dim_(call.time_first ? 1 : 0),
        data_(static_cast<char*>(matrix_.data_ptr())),
        num_features_(x.size(-1)),
        num_columns_(weight.size(0)) {
    STD_TORCH_CHECK(
        x.dim() == (call.batch_sizes ? 2 : 3) && weight.dim() == 2 && weight.is_cpu() && weight.is_contiguous() &&
            weight.scalar_type() == x.scalar_type() && num_columns_ % num_inputs_of(call.cell) == 0 &&
            weight.size(1) == num_features_ && x.numel() > 0,
        call.name, ": x must be (B, S, I), not empty, and weight (num_inputs N, I), contiguous");
  }

  // Only the valid steps are rows.
  void select_valid(const Operands& operands) {
    scan_ = &operands.scan;
    for (int64_t b = 0; b < scan_->num_batch; ++b) {
      offsets_.push_back(num_rows_ * num_columns_);
      num_rows_ += scan_->lengths[b];
    }
  }

  bool time_major() const { return time_major_; }
  // Where the pre-activations of each batch element begin, or null.
  const int64_t* offsets() const { return scan_ ? offsets_.data() : nullptr; }
  int64_t num_features() const { return num_features_; }
  int64_t num_columns() const { return num_columns_; }
  int64_t num_rows() const { return scan_ ? num_rows_ : matrix_.numel() / num_features_; }

  // The rows of a block, next to each other.
  const void* rows_of(const Block& block) const {
    if (!scan_) return data_ + block.row * row_bytes();
    if (is_contiguous(block, matrix_)) return data_ + at(matrix_, block.part.batch_begin, block.part.begin);
    char* rows = static_cast<char*>(rows_scratch.at_least(block.num_rows * row_bytes()));
    each_part_of(block, matrix_, [&](char* steps, int64_t at, int64_t size) { std::memcpy(rows + at, steps, size); });
    return rows;
  }

  // Calls `compute` with the memory of the gradients of a block's rows.
  template <class F>
  void add_grad_rows(const Block& block, const Tensor& grad_x, const F& compute) const {
    char* data = static_cast<char*>(grad_x.data_ptr());
    if (!scan_) return compute(data + block.row * row_bytes());
    if (is_contiguous(block, grad_x)) return compute(data + at(grad_x, block.part.batch_begin, block.part.begin));
    char* rows = static_cast<char*>(grad_rows_scratch.at_least(block.num_rows * row_bytes()));
    compute(rows);
    each_part_of(block, grad_x, [&](char* steps, int64_t at, int64_t size) { std::memcpy(steps, rows + at, size); });
  }

  // Sets the steps after the end of each sequence to 0, in a sequence that is contiguous.
  void clear_padding(const Tensor& sequence) const {
    if (!scan_) return;
    const int64_t size = sequence.size(2) * sequence.element_size();
    parallel_for(scan_->num_batch, scan_->num_steps * size, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        each_run(sequence, b, scan_->lengths[b], scan_->num_steps, size, [](char* steps, int64_t bytes) {
          std::memset(steps, 0, bytes);
        });
      }
    });
  }

  Tensor empty_like_x() const {
    const Tensor result = empty(sizes_of(matrix_), matrix_);
    return transposed_ ? torch::stable::transpose(result, 0, 1) : result;
  }

 private:
  int64_t row_bytes() const { return num_features_ * matrix_.element_size(); }

  // The position of a step, in bytes.
  int64_t at(const Tensor& sequence, int64_t batch, int64_t step) const {
    const int64_t size = sequence.element_size();
    return (batch * sequence.stride(batch_dim_) + step * sequence.stride(1 - batch_dim_)) * size;
  }

  bool is_contiguous(const Block& block, const Tensor& sequence) const {
    const bool is_one = block.part.batch_end == block.part.batch_begin + 1;
    return is_one && (block.num_rows == 1 || sequence.stride(1 - batch_dim_) == num_features_);
  }

  // Calls f with the memory of each run of neighboring steps, and its size in bytes.
  template <class F>
  void each_run(const Tensor& sequence, int64_t batch, int64_t begin, int64_t end, int64_t bytes, const F& f) const {
    char* data = static_cast<char*>(sequence.data_ptr());
    const bool are_neighbors = at(sequence, 0, 1) == bytes;
    const int64_t run = are_neighbors ? end - begin : 1;
    for (int64_t step = begin; step < end; step += run) f(data + at(sequence, batch, step), run * bytes);
  }

  // Calls f, by several threads, with the memory of neighboring steps of a block, their position in the matrix of its
  // rows, and their size, in bytes.
  template <class F>
  void each_part_of(const Block& block, const Tensor& sequence, const F& f) const {
    parallel_for(block.num_rows, row_bytes(), [&](int64_t begin, int64_t end) {
      int64_t first = 0;  // the row of a sequence's first step
      for (int64_t b = block.part.batch_begin; b < block.part.batch_end && first < end; ++b) {
        const int64_t count = std::min(block.part.end, scan_->lengths[b]) - block.part.begin;
        const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, count);
        int64_t at = (first + from) * row_bytes();
        each_run(sequence, b, block.part.begin + from, block.part.begin + to, row_bytes(), [&](char* steps, int64_t size) {
          f(steps, at, size);
          at += size;
        });
        first += count;
      }
    });
  }

  // Calls f with ranges of 0 to `count`, by several threads if there is enough to copy.
  template <class F>
  static void parallel_for(int64_t count, int64_t bytes, const F& f) {
    torch::stable::parallel_for(0, count, std::max(bytes_per_thread / bytes, int64_t(1)), f);
  }

  static Tensor with_contiguous_features(const Tensor& x) {
    return x.dim() == 3 && x.stride(2) == 1 ? x : as_contiguous(x);
  }

  Tensor contiguous(const Call& call, const Tensor& x, bool& time_major) {
    STD_TORCH_CHECK(x.dim() >= 2, call.name, ": x must be (B, S, I)");
    transposed_ = !call.batch_sizes && x.dim() == 3 && !x.is_contiguous() && x.stride(0) < x.stride(1);
    time_major = call.batch_sizes || call.time_first != transposed_;
    return as_contiguous(transposed_ ? torch::stable::transpose(x, 0, 1) : x);
  }

  bool transposed_ = false, time_major_ = false;
  Tensor matrix_;
  int64_t batch_dim_;
  char* data_;
  int64_t num_features_, num_columns_;
  // Only with lengths.
  const Scan* scan_ = nullptr;
  std::vector<int64_t> offsets_;
  int64_t num_rows_ = 0;
};

// Sets `sequences` to the inputs of the cell, which are side by side in the matrix of a block.
void set_sequences(
    Sequence* sequences, const Operands& operands, const InputMatrix& inputs, void* data, int64_t first_row,
    int64_t size) {
  const Scan& scan = operands.scan;
  const int64_t stride = inputs.num_columns();
  for (int64_t k = 0; k < stride / scan.num_features; ++k) {
    sequences[k] = {
        static_cast<char*>(data) + k * scan.num_features * size, inputs.time_major() ? stride : scan.num_steps * stride,
        inputs.time_major() && !operands.is_packed() ? scan.num_batch * stride : stride, first_row * stride,
        inputs.offsets()};
  }
}

// The linear map of a block's rows. The scan adds a bias of float32 or float64, unless the cell is timed.
class LinearMap {
 public:
  LinearMap(Operands& operands, const Tensor& weight, const MaybeTensor& bias, bool is_timed) : weight_(weight) {
    if (bias && (weight.element_size() < 4 || is_timed)) {
      STD_TORCH_CHECK(bias->is_cpu() && bias->numel() == weight.size(0), "mingru: bias must be (num_inputs N)");
      bias_ = bias;
    } else {
      operands.add_biases(bias);
    }
  }

  void operator()(void* out, const void* rows, const Block& block) const {
    map_rows(out, rows, block.num_rows, weight_, bias_);
  }

 private:
  const Tensor& weight_;
  MaybeTensor bias_;
};

// A gradient that is a sum over the blocks, in float32 or float64.
class SumOfBlocks {
 public:
  SumOfBlocks(const Tensor& like, int64_t rows, int64_t columns)
      : dtype_(like.scalar_type()), sum_(torch::stable::new_zeros(like, {rows, columns}, sum_type())) {}

  void add_product(const Tensor& left, const Tensor& right) {
    if (is_wide()) {
      multiply_and_add(sum_, sum_, left, right);
      return;
    }
    if (!part_.defined()) part_ = empty(sizes_of(sum_), left);
    multiply(part_, left, right);
    const Tensor wide = torch::stable::to(part_, ScalarType::Float);
    float* sum = static_cast<float*>(sum_.data_ptr());
    const float* values = static_cast<const float*>(wide.data_ptr());
    torch::stable::parallel_for(0, sum_.numel(), values_per_thread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sum[i] += values[i];
    });
  }

  void add_rows(const Tensor& rows) {
    mingru::add_rows({storage_of(rows), rows.data_ptr(), rows.size(0), rows.size(1)}, sum_.data_ptr());
  }

  Tensor result() { return is_wide() ? sum_ : torch::stable::to(sum_, dtype_); }

 private:
  bool is_wide() const { return dtype_ == ScalarType::Float || dtype_ == ScalarType::Double; }
  ScalarType sum_type() const { return is_wide() ? dtype_ : ScalarType::Float; }

  const ScalarType dtype_;
  Tensor sum_, part_;
};

int64_t num_outputs(const Call& call, const Tensor& weight) { return weight.size(0) / num_inputs_of(call.cell); }

bool is_timed(const Call& call) { return call.dt || call.min_decay != 0; }

}  // namespace

void mingru::map_rows(void* out, const void* x, int64_t rows, const Tensor& weight, const MaybeTensor& bias) {
  const int64_t columns = weight.size(0), features = weight.size(1);
  if (rows <= most_few_rows && weight.element_size() >= 4) {
    const void* added = bias ? bias->data_ptr() : nullptr;
    multiply_few_rows({storage_of(weight), x, weight.data_ptr(), added, out, rows, columns, features});
    return;
  }
  const Tensor result = matrix(out, rows, columns, columns, 1, weight);
  const Tensor left = matrix(x, rows, features, features, 1, weight);
  if (bias) {
    multiply_and_add(result, *bias, left, transposed(weight));
  } else {
    multiply(result, left, transposed(weight));
  }
}

void mingru::linear_recurrence(
    const Call& call, const Tensor& x, const Tensor& any_weight, const MaybeTensor& bias, const Tensor& out,
    const Tensor& last, void* kept) {
  const Tensor weight = as_contiguous(any_weight);
  InputMatrix inputs(call, x, weight);
  const int64_t columns = inputs.num_columns(), size = x.element_size();
  Operands operands(call, x, num_outputs(call, weight));
  if (call.lengths) {
    inputs.select_valid(operands);
    inputs.clear_padding(out);
  }
  const LinearMap linear(operands, weight, bias, is_timed(call));
  Scan& scan = operands.scan;
  scan.out = operands.sequence(out);
  scan.last = operands.state(last, "the last state");

  for (const Block& block : blocks_of(operands, inputs.time_major(), false, columns * size)) {
    if (block.num_rows > 0) {
      void* data = kept ? static_cast<char*>(kept) + block.row * columns * size
                        : pre_activations_scratch.at_least(block.num_rows * columns * size);
      linear(data, inputs.rows_of(block), block);
      set_sequences(scan.inputs, operands, inputs, data, block.row, size);
    }
    run(scan, block.part, false);
  }
}

namespace {

// Returns all states, the last state and, if the call keeps them, the pre-activations, without the bias if the scan adds it.
std::tuple<Tensor, Tensor, Tensor> linear_recurrence_forward(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const std::vector<MaybeTensor>& tensors, int64_t how,
    double min_decay) {
  const Call call = call_of("linear_recurrence_forward", tensors, how, min_decay);
  STD_TORCH_CHECK(
      x.numel() > 0 && x.dim() >= 2 && weight.dim() == 2, call.name,
      ": x must be (B, S, I), not empty, and weight (num_inputs N, I)");
  int64_t num_rows = x.numel() / x.size(-1);
  if (call.lengths) {
    STD_TORCH_CHECK(x.dim() == 3, call.name, ": x must be (B, S, I)");
    num_rows = 0;
    const int64_t num_batch = x.size(call.time_first ? 1 : 0), num_steps = x.size(call.time_first ? 0 : 1);
    for (const int64_t length : checked_lengths(call.name, *call.lengths, num_batch, num_steps)) num_rows += length;
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = num_outputs(call, weight);
  const bool keep = has_flag(how, Flag::keep);
  // The largest tensor first: glibc's malloc then gives less memory back to the system, whose new pages take long.
  Tensor pre_activations = empty({keep ? num_rows : 0, weight.size(0)}, x);
  Tensor out = empty(sizes, x);
  Tensor last = empty(sizes_of(call.h), call.h);
  linear_recurrence(call, x, weight, bias, out, last, keep ? pre_activations.data_ptr() : nullptr);
  return {out, last, pre_activations};
}

// Returns the gradients of x, weight and bias (empty if not needed), h, initial_state and dt (for each group of features).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_recurrence_backward(
    const Tensor& x, const Tensor& any_weight, const MaybeTensor& bias, const std::vector<MaybeTensor>& tensors,
    const Tensor& out, const Tensor& pre_activations, const Tensor& grad_out, const Tensor& grad_last, int64_t how,
    double min_decay) {
  const Call call = call_of("linear_recurrence_backward", tensors, how, min_decay);
  const bool needs_x = has_flag(how, Flag::needs_x), needs_weight = has_flag(how, Flag::needs_weight),
             needs_bias = has_flag(how, Flag::needs_bias);
  const Tensor weight = as_contiguous(any_weight);
  InputMatrix inputs(call, x, weight);
  const int64_t columns = inputs.num_columns(), features = inputs.num_features(), size = x.element_size();
  Operands operands(call, x, num_outputs(call, weight));
  if (call.lengths) inputs.select_valid(operands);
  const LinearMap linear(operands, weight, bias, is_timed(call));
  Scan& scan = operands.scan;
  const bool kept = pre_activations.numel() > 0;
  STD_TORCH_CHECK(
      !kept || (pre_activations.is_contiguous() && pre_activations.scalar_type() == x.scalar_type() &&
                pre_activations.numel() == inputs.num_rows() * columns),
      call.name, ": pre_activations must be (number of steps, num_inputs N), contiguous, or empty");
  auto [grad_h, grad_initial_state, grads_of_dt] =
      operands.add_gradients(call.h, out, grad_out, grad_last, has_flag(how, Flag::needs_dt));

  Tensor grad_x = needs_x ? inputs.empty_like_x() : empty({0}, x);
  if (needs_x) inputs.clear_padding(grad_x);
  SumOfBlocks grad_weight(x, needs_weight ? columns : 0, features), grad_bias(x, needs_bias ? 1 : 0, columns);
  const std::vector<Block> blocks = blocks_of(operands, inputs.time_major(), true, columns * size);
  int64_t most_rows = 0;
  for (const Block& block : blocks) most_rows = std::max(most_rows, block.num_rows);

  for (const Block& block : blocks) {
    const int64_t count = block.num_rows;
    if (count == 0) {
      run(scan, block.part, true);
      continue;
    }
    void* pre = kept ? static_cast<char*>(pre_activations.data_ptr()) + block.row * columns * size
                     : pre_activations_scratch.at_least(most_rows * columns * size);
    const void* rows = !kept || needs_weight ? inputs.rows_of(block) : nullptr;
    if (!kept) linear(pre, rows, block);
    void* to = grads_scratch.at_least(most_rows * columns * size);
    set_sequences(scan.inputs, operands, inputs, pre, block.row, size);
    set_sequences(scan.grad_inputs, operands, inputs, to, block.row, size);
    run(scan, block.part, true);

    const Tensor grads = matrix(to, count, columns, columns, 1, x);
    if (needs_x) {
      inputs.add_grad_rows(block, grad_x, [&](void* grad_rows) {
        multiply(matrix(grad_rows, count, features, features, 1, x), grads, weight);
      });
    }
    if (needs_weight) {
      grad_weight.add_product(
          matrix(to, columns, count, 1, columns, x), matrix(rows, count, features, features, 1, x));
    }
    if (needs_bias) grad_bias.add_rows(grads);
  }
  return {grad_x, grad_weight.result(), grad_bias.result(), grad_h, grad_initial_state, grads_of_dt};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mingru, library) {
  library.def(
      "linear_recurrence_forward(Tensor x, Tensor weight, Tensor? bias, Tensor?[] call, int how, float min_decay) -> "
      "(Tensor, Tensor, Tensor)");
  library.def(
      "linear_recurrence_backward(Tensor x, Tensor weight, Tensor? bias, Tensor?[] call, Tensor out, "
      "Tensor pre_activations, Tensor grad_out, Tensor grad_last, int how, float min_decay) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mingru, CPU, library) {
  library.impl("linear_recurrence_forward", TORCH_BOX(&linear_recurrence_forward));
  library.impl("linear_recurrence_backward", TORCH_BOX(&linear_recurrence_backward));
}
