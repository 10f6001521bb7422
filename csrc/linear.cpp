// The norm without its weights, the linear map and the recurrence of a cell, in blocks whose data stays in the cache. x is
// a matrix with one row for each step of each batch element, in the order of memory. With `lengths`, the rows are the
// valid steps of the first batch element, then those of the next, and so on. Called only by
// src/mingru/ops/backends/native.py.
#include "linear.h"

#include "recurrent_blocks.h"

namespace {

using namespace mingru;

// Large enough for the full speed of the matrix multiplication. 2 MB was the best compromise of 0.5 to 4 MB on a
// processor with second-level caches of 512 KB and a third-level cache of 32 MB. In tiles, a product copies its weights
// first, for each block, which takes 2 % of its time for 1024 rows.
constexpr int64_t block_bytes = 1 << 21;
constexpr int64_t least_block_rows = 64, least_rows_in_tiles = 1024, most_block_rows = 2048;
// With fewer bytes to copy, a thread costs more time than it saves.
constexpr int64_t bytes_per_thread = 1 << 17;

struct Block {
  Part part;
  int64_t row, num_rows;
};

// The number of features of the states.
int64_t num_outputs(const Call& call, const Tensor& x, const Tensor& weight) {
  const int64_t num_parts = call.num_parts(), factor = num_parts * (call.is_mixture() ? 2 : 1);
  STD_TORCH_CHECK(
      x.dim() == (call[Argument::batch_sizes] ? 2 : 3) && weight.dim() == 2 && weight.is_cpu() &&
          weight.scalar_type() == x.scalar_type() && weight.size(0) % factor == 0 && weight.size(1) == x.size(-1) &&
          x.numel() > 0,
      call.name, ": x must be (B, S, I), not empty, and weight (num_parts N, I), of the same dtype");
  return weight.size(0) / num_parts;
}

// The operands of the recurrence and of its linear map. x is a matrix in the order of memory, copied only if neither x
// nor its transpose is contiguous. With lengths, x is not copied here, because only the valid steps are rows.
class LinearOperands : public Operands {
 public:
  const Tensor weight;
  const int64_t num_features, num_columns;
  const bool has_norm;

  LinearOperands(const Call& call, const Tensor& x, const Tensor& any_weight, const MaybeTensor& bias, double eps)
      : Operands(call, x, num_outputs(call, x, any_weight)),
        weight(as_contiguous(any_weight)),
        num_features(weight.size(1)),
        num_columns(weight.size(0)),
        has_norm(call.has(Flag::rms_norm) || call.has(Flag::layer_norm)),
        is_given_transposed_(!has_lengths() && !is_packed() && !x.is_contiguous() && x.stride(0) < x.stride(1)),
        is_transposed_(has_wide_blocks(call) ? !call.has(Flag::time_first) : is_given_transposed_),
        time_major_(is_packed() || (!has_lengths() && call.has(Flag::time_first) != is_transposed_)),
        is_centered_(call.has(Flag::layer_norm)),
        eps_(eps),
        x_(in_memory_order(x)) {
    if (call.cell() == Cell::blockgru) recurrent_.emplace(call, h, scan.num_features);
    // The scan adds a bias of float32 or float64, unless the cell is timed or has blocks, or the product adds it at no cost.
    if (bias && (weight.element_size() < 4 || recurrent_ || scan.dt.data || scan.log_bound < 0 || is_in_tiles())) {
      STD_TORCH_CHECK(
          bias->is_cpu() && bias->numel() == num_columns && bias->scalar_type() == weight.scalar_type(), call.name,
          ": bias must be (num_parts N), of the dtype of weight");
      bias_ = as_contiguous(*bias);
    } else {
      add_biases(bias);
    }
  }

  void run(const Part& part, bool is_backward) {
    recurrent_ ? recurrent_->run(scan, part, is_backward) : Operands::run(part, is_backward);
  }

  // The gradients of the recurrent weights and their bias; empty without them.
  std::tuple<Tensor, Tensor> grads_of_recurrent() const {
    return recurrent_ ? recurrent_->gradients() : std::tuple{empty({0}, h), empty({0}, h)};
  }

  int64_t num_rows() const { return row_offsets_.empty() ? x_.numel() / num_features : row_offsets_.back(); }
  int64_t bytes_of_columns(int64_t rows) const { return rows * num_columns * x_.element_size(); }

  // The blocks in the order of the scan. A block has all batch elements of some steps, all steps of some batch
  // elements, or a part of one step or batch element.
  std::vector<Block> blocks(bool backward) const {
    const int64_t least = is_in_tiles() ? least_rows_in_tiles : least_block_rows;
    const int64_t most = std::clamp(block_bytes / bytes_of_columns(1), least, most_block_rows);
    const int64_t outer = time_major_ ? scan.num_steps : scan.num_batch;
    const int64_t inner = time_major_ ? scan.num_batch : scan.num_steps;
    const auto row_of = [&](int64_t i) { return row_offsets_.empty() ? i * inner : row_offsets_[i]; };
    std::vector<Block> blocks;
    const auto add = [&](int64_t begin, int64_t end, int64_t from, int64_t to, int64_t row, int64_t num_rows) {
      const Part part = time_major_ ? Part{from, to, begin, end} : Part{begin, end, from, to};
      blocks.push_back({part, row, num_rows});
    };
    for (int64_t begin = 0; begin < outer;) {
      const int64_t row = row_of(begin), width = row_of(begin + 1) - row;
      int64_t end = begin + 1;
      while (end < outer && row_of(end + 1) - row <= most) ++end;
      if (width <= most) add(begin, end, 0, inner, row, row_of(end) - row);
      // The last part also has the batch elements or steps after the last row, whose states it passes on.
      for (int64_t from = 0; width > most && from < width; from += most) {
        const bool is_last = from + most >= width;
        add(begin, end, from, is_last ? inner : from + most, row + from, is_last ? width - from : most);
      }
      begin = end;
    }
    if (scan.reverse != backward) std::reverse(blocks.begin(), blocks.end());
    return blocks;
  }

  // The pre-activations of a block: those that are kept, or memory for them.
  char* pre_activations_of(const Block& block, char* kept) const {
    if (kept) return kept + bytes_of_columns(block.row);
    return static_cast<char*>(pre_activations_scratch_.at_least(bytes_of_columns(block.num_rows)));
  }

  // The linear map of a block's rows.
  void map(void* out, const void* rows, const Block& block) const {
    map_rows(out, rows, block.num_rows, x_, weight, bias_);
  }

  // Sets `sequences` to the inputs of the cell, which are side by side in the matrix of a block.
  void set_sequences(Sequence* sequences, char* data, const Block& block) const {
    const int64_t stride = num_columns, part = scan.num_features * x_.element_size();
    const int64_t batch_stride = time_major_ || has_lengths() ? stride : scan.num_steps * stride;
    const int64_t step_stride = time_major_ && !is_packed() ? scan.num_batch * stride : stride;
    const int64_t* batch_offsets = has_lengths() ? row_offsets_.data() : nullptr;
    for (int64_t k = 0; k < stride / scan.num_features; ++k) {
      sequences[k] = {data + k * part, batch_stride, step_stride, block.row * stride, batch_offsets};
    }
  }

  // The rows of a block, next to each other, after the norm.
  const void* rows_of(const Block& block) const {
    if (!has_norm) return rows_of_x(block);
    void* rows = normalized_scratch_.at_least(block.num_rows * row_bytes());
    normalize(normalization(block, rows_of_x(block), rows), false);
    return rows;
  }

  // Replaces the gradients of a block's rows after the norm by those of x; `rows_of` was called before.
  void undo_norm(const Block& block, void* grad_rows) const {
    if (has_norm) normalize(normalization(block, normalized_scratch_.at_least(0), grad_rows), true);
  }


  // Calls `compute` with the memory of the gradients of a block's rows.
  template <class F>
  void set_grad_rows(const Block& block, const Tensor& grad_x, const F& compute) const {
    if (void* rows = rows_in(grad_x, block)) return compute(rows);
    char* rows = static_cast<char*>(grad_rows_scratch_.at_least(block.num_rows * row_bytes()));
    compute(rows);
    each_part_of(block, grad_x, rows, [](char* steps, char* part, int64_t size) { std::memcpy(steps, part, size); });
  }

  // Sets the steps after the end of each sequence to 0, in a sequence that is contiguous.
  void clear_padding(const Tensor& sequence) const {
    if (!has_lengths()) return;
    const int64_t size = sequence.size(2) * sequence.element_size();
    parallel_for(0, scan.num_batch, scan.num_steps * size, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        each_run(sequence, b, scan.lengths[b], scan.num_steps, size, [](char* steps, int64_t bytes) {
          std::memset(steps, 0, bytes);
        });
      }
    });
  }

  Tensor empty_like_x() const {
    const Tensor result = empty_as(x_);
    return is_transposed_ ? torch::stable::transpose(result, 0, 1) : result;
  }

  // Returns such a tensor in the memory order of the given x.
  Tensor in_given_order(const Tensor& x) const {
    if (is_transposed_ == is_given_transposed_ || x.dim() < 3) return x;
    if (!is_given_transposed_) return as_contiguous(x);
    return torch::stable::transpose(as_contiguous(torch::stable::transpose(x, 0, 1)), 0, 1);
  }

 private:
  // Their sequences are computed together, so all of a step are next to each other.
  bool has_wide_blocks(const Call& call) const {
    const Tensor* weight = call[Argument::recurrent];
    return weight && weight->size(-1) >= Blocks::least_wide && !has_lengths() && !is_packed();
  }

  const void* rows_of_x(const Block& block) const {
    if (const void* rows = rows_in(x_, block)) return rows;
    char* rows = static_cast<char*>(rows_scratch_.at_least(block.num_rows * row_bytes()));
    each_part_of(block, x_, rows, [](char* steps, char* part, int64_t size) { std::memcpy(part, steps, size); });
    return rows;
  }

  Normalization normalization(const Block& block, const void* x, void* out) const {
    void* scales = scales_scratch_.at_least(block.num_rows * h.element_size());
    return {scan.storage, is_centered_, eps_, x, out, scales, block.num_rows, num_features};
  }

  Tensor in_memory_order(const Tensor& x) const {
    if (has_lengths() && has_contiguous_features(x)) return x;
    return as_contiguous(is_transposed_ ? torch::stable::transpose(x, 0, 1) : x);
  }

  // By the rows of the whole call, not by the size of each product, so that backward passes agree with the forward pass.
  bool is_in_tiles() const {
    return scan.storage == Storage::float32 && multiplies_in_tiles() && num_rows() >= least_tiled_rows;
  }

  int64_t row_bytes() const { return num_features * x_.element_size(); }

  // How far steps are from each other, in bytes.
  int64_t step_bytes(const Tensor& sequence) const { return sequence.stride(step_dim_) * sequence.element_size(); }

  char* step_of(const Tensor& sequence, int64_t batch, int64_t step) const {
    const int64_t first = batch * sequence.stride(batch_dim_) * sequence.element_size();
    return data_of<char>(sequence) + first + step * step_bytes(sequence);
  }

  // The rows of a block in a sequence, or null if they are not next to each other.
  char* rows_in(const Tensor& sequence, const Block& block) const {
    const Part& part = block.part;
    if (!has_lengths()) return data_of<char>(sequence) + block.row * row_bytes();
    const bool are_neighbors = block.num_rows == 1 || step_bytes(sequence) == row_bytes();
    const bool is_one = part.batch_end == part.batch_begin + 1 && are_neighbors;
    return is_one ? step_of(sequence, part.batch_begin, part.begin) : nullptr;
  }

  // Calls f with the memory of each run of neighboring steps, and its size in bytes.
  template <class F>
  void each_run(const Tensor& sequence, int64_t batch, int64_t begin, int64_t end, int64_t size, const F& f) const {
    const int64_t run = step_bytes(sequence) == size ? end - begin : 1;
    for (int64_t step = begin; step < end; step += run) f(step_of(sequence, batch, step), run * size);
  }

  // Calls f, by several threads, with the memory of neighboring steps of a block in a sequence, their memory in the
  // matrix of the block's rows, and their size, in bytes.
  template <class F>
  void each_part_of(const Block& block, const Tensor& sequence, char* rows, const F& f) const {
    parallel_for(block.row, block.row + block.num_rows, row_bytes(), [&](int64_t begin, int64_t end) {
      for (int64_t b = block.part.batch_begin; b < block.part.batch_end; ++b) {
        const int64_t first = row_offsets_[b], from = std::max(begin, first), to = std::min(end, row_offsets_[b + 1]);
        char* part = rows + (from - block.row) * row_bytes();
        each_run(sequence, b, from - first, to - first, row_bytes(), [&](char* steps, int64_t size) {
          f(steps, part, size);
          part += size;
        });
      }
    });
  }

  // Calls f with ranges, by several threads if there is enough to copy.
  template <class F>
  static void parallel_for(int64_t begin, int64_t end, int64_t bytes, const F& f) {
    torch::stable::parallel_for(begin, end, std::max(bytes_per_thread / bytes, int64_t(1)), f);
  }

  const bool is_given_transposed_, is_transposed_, time_major_, is_centered_;
  const double eps_;
  const Tensor x_;
  MaybeTensor bias_;
  std::optional<RecurrentBlocks> recurrent_;
  mutable Scratch pre_activations_scratch_, rows_scratch_, normalized_scratch_, scales_scratch_, grad_rows_scratch_;
};

// out = left right + added, where `added` may be `out`, or a vector that is added to each row. The one place that
// multiplies more than a few rows: in tiles of its own, or by torch, whatever is faster on this processor.
void multiply(const Tensor& out, const Tensor& left, const Tensor& right, const MaybeTensor& added = {}) {
  if (out.scalar_type() == ScalarType::Float) {
    const auto matrix_of = [](const Tensor& x) { return Matrix{data_of<const float>(x), x.stride(0), x.stride(1)}; };
    MatrixProduct product{matrix_of(left), matrix_of(right), nullptr, data_of<float>(out)};
    product.rows = left.size(0), product.columns = right.size(1), product.depth = left.size(1);
    product.out_stride = product.columns;
    if (added) product.added = data_of<const float>(*added);
    if (added && added->dim() == 2) product.added_stride = product.columns;
    if (is_faster_in_tiles(product)) {
      Scratch packed;
      return multiply_in_tiles(product, static_cast<float*>(packed.at_least(most_packed * sizeof(float))));
    }
  }
  if (!added) TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
  if (added) TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), added->get(), left.get(), right.get(), 1, 1));
}

// A gradient that is a sum over the blocks, in float32 or float64.
class SumOfBlocks {
 public:
  SumOfBlocks(const Tensor& like, int64_t rows, int64_t columns)
      : dtype_(like.scalar_type()),
        is_narrow_(like.element_size() < 4),
        sum_(torch::stable::new_zeros(like, {rows, columns}, is_narrow_ ? ScalarType::Float : dtype_)) {}

  void add_product(const Tensor& left, const Tensor& right) {
    if (!is_narrow_) return multiply(sum_, left, right, sum_);
    if (!part_) part_ = empty(sizes_of(sum_), left);
    multiply(*part_, left, right);
    AtenTensorHandle sum;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_add_Tensor(sum_.get(), part_->get(), 1, &sum));
    sum_ = Tensor(sum);
  }

  void add_rows(const Tensor& rows) {
    mingru::add_rows({storage_of(rows), rows.data_ptr(), rows.size(0), rows.size(1), sum_.data_ptr()});
  }

  Tensor result() const { return is_narrow_ ? torch::stable::to(sum_, dtype_) : sum_; }

 private:
  const ScalarType dtype_;
  const bool is_narrow_;
  Tensor sum_;
  MaybeTensor part_;
};

}  // namespace

void mingru::map_rows(
    void* out, const void* x, int64_t rows, const Tensor& like, const Tensor& weight, const MaybeTensor& bias) {
  // Asked again for each product, because another thread may convert the parameters during a call.
  STD_TORCH_CHECK(
      weight.scalar_type() == like.scalar_type() && (!bias || bias->scalar_type() == like.scalar_type()),
      "mingru: weight and bias must have the dtype of x; do not convert a layer while it is called");
  const int64_t columns = weight.size(0), features = weight.size(1);
  if (rows <= most_few_rows && like.element_size() >= 4) {
    const void* added = bias ? bias->data_ptr() : nullptr;
    return multiply_few_rows({storage_of(like), x, weight.data_ptr(), added, out, rows, columns, features});
  }
  const Tensor right = view_of(weight.data_ptr(), {features, columns}, {1, features}, like);
  multiply(matrix(out, rows, columns, like), matrix(x, rows, features, like), right, bias);
}

Outputs mingru::linear_recurrence(
    const Call& call, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, double eps, Outputs outputs) {
  LinearOperands operands(call, x, weight, bias, eps);
  if (!outputs.out) {
    // The largest tensor first: glibc's malloc then gives less memory back to the system, whose new pages take long.
    outputs.kept = empty({call.has(Flag::keep) ? operands.num_rows() : 0, operands.num_columns}, x);
    const std::vector<int64_t> sizes = operands.sizes(operands.scan.num_features);
    outputs.out = empty(sizes, x);
    outputs.states = empty(call.has(Flag::keep_states) ? sizes : std::vector<int64_t>{0}, x);
    outputs.last = empty_as(operands.h);
  }
  char* kept = call.has(Flag::keep) ? data_of<char>(*outputs.kept) : nullptr;
  operands.clear_padding(*outputs.out);
  Scan& scan = operands.scan;
  scan.gated = scan.out = operands.sequence(*outputs.out);
  if (call.has(Flag::keep_states)) scan.out = operands.sequence(*outputs.states);
  scan.last = operands.state(*outputs.last, "the last state");
  for (const Block& block : operands.blocks(false)) {
    if (block.num_rows > 0) {
      char* pre_activations = operands.pre_activations_of(block, kept);
      operands.map(pre_activations, operands.rows_of(block), block);
      operands.set_sequences(scan.inputs, pre_activations, block);
    }
    operands.run(block.part, false);
  }
  return outputs;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_recurrence_forward(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensors& tensors, int64_t how,
    double min_decay, double eps) {
  const auto [out, last, kept, states] =
      linear_recurrence({"linear_recurrence_forward", tensors, how, min_decay}, x, weight, bias, eps);
  return {*out, *last, *kept, *states};
}

// left right + added, for tests and measurements.
Tensor multiply_matrices(const Tensor& left, const Tensor& right, const MaybeTensor& added) {
  const auto is_matrix = [&](const Tensor& x) {
    return x.is_cpu() && x.dim() == 2 && x.numel() > 0 && x.scalar_type() == left.scalar_type() &&
           (x.stride(0) == 1 || x.stride(1) == 1);
  };
  STD_TORCH_CHECK(
      is_matrix(left) && is_matrix(right) && left.size(1) == right.size(0) &&
          (!added || (added->is_cpu() && added->is_contiguous() && added->scalar_type() == left.scalar_type() &&
                      sizes_of(*added) == std::vector<int64_t>{right.size(1)})),
      "multiply: left and right must be matrices that fit, not empty, with contiguous rows or columns, and added a vector");
  const Tensor out = empty({left.size(0), right.size(1)}, left);
  multiply(out, left, right, added);
  return out;
}

// Returns the gradients of x, weight and bias (empty if not needed), h, initial_state, dt (for each group of features), and
// of the recurrent weights and their bias.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_recurrence_backward(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensors& tensors, const Tensor& states,
    const Tensor& pre_activations, const Tensor& grad_out, const Tensor& grad_last, int64_t how, double min_decay,
    double eps) {
  const Call call{"linear_recurrence_backward", tensors, how, min_decay};
  const bool needs_x = call.has(Flag::needs_x), needs_weight = call.has(Flag::needs_weight);
  const bool needs_bias = call.has(Flag::needs_bias);
  LinearOperands operands(call, x, weight, bias, eps);
  const int64_t columns = operands.num_columns, features = operands.num_features;
  STD_TORCH_CHECK(
      pre_activations.numel() == 0 ||
          (pre_activations.is_cpu() && pre_activations.is_contiguous() &&
           pre_activations.scalar_type() == x.scalar_type() &&
           pre_activations.numel() == operands.num_rows() * columns),
      call.name, ": pre_activations must be (number of steps, num_parts N), contiguous, or empty");
  char* kept = pre_activations.numel() > 0 ? data_of<char>(pre_activations) : nullptr;
  auto [grad_h, grad_initial_state, grads_of_dt] = operands.add_gradients(states, grad_out, grad_last);
  Tensor grad_x = needs_x ? operands.empty_like_x() : empty({0}, x);
  if (needs_x) operands.clear_padding(grad_x);
  SumOfBlocks grad_weight(x, needs_weight ? columns : 0, features), grad_bias(x, needs_bias ? 1 : 0, columns);
  Scan& scan = operands.scan;
  Scratch grads_scratch;
  for (const Block& block : operands.blocks(true)) {
    const int64_t count = block.num_rows;
    if (count == 0) {
      operands.run(block.part, true);
      continue;
    }
    const void* rows = !kept || needs_weight || operands.has_norm ? operands.rows_of(block) : nullptr;
    char* pre = operands.pre_activations_of(block, kept);
    if (!kept) operands.map(pre, rows, block);
    char* to = static_cast<char*>(grads_scratch.at_least(operands.bytes_of_columns(count)));
    operands.set_sequences(scan.inputs, pre, block);
    operands.set_sequences(scan.grad_inputs, to, block);
    operands.run(block.part, true);

    const Tensor grads = matrix(to, count, columns, x);
    if (needs_x) {
      operands.set_grad_rows(block, grad_x, [&](void* grad_rows) {
        multiply(matrix(grad_rows, count, features, x), grads, operands.weight);
        operands.undo_norm(block, grad_rows);
      });
    }
    if (needs_weight) grad_weight.add_product(transposed(grads), matrix(rows, count, features, x));
    if (needs_bias) grad_bias.add_rows(grads);
  }
  auto [grad_recurrent, grad_recurrent_bias] = operands.grads_of_recurrent();
  return {operands.in_given_order(grad_x), grad_weight.result(), grad_bias.result(), grad_h, grad_initial_state,
          grads_of_dt, grad_recurrent, grad_recurrent_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mingru, library) {
  library.def("multiply(Tensor left, Tensor right, Tensor? added) -> Tensor");
  library.def(
      "linear_recurrence_forward(Tensor x, Tensor weight, Tensor? bias, Tensor[] call, int how, float min_decay, "
      "float eps=0) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "linear_recurrence_backward(Tensor x, Tensor weight, Tensor? bias, Tensor[] call, Tensor states, "
      "Tensor pre_activations, Tensor grad_out, Tensor grad_last, int how, float min_decay, float eps=0) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mingru, CPU, library) {
  library.impl("multiply", TORCH_BOX(&multiply_matrices));
  library.impl("linear_recurrence_forward", TORCH_BOX(&linear_recurrence_forward));
  library.impl("linear_recurrence_backward", TORCH_BOX(&linear_recurrence_backward));
}
