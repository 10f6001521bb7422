// The operators that Python sees, on LibTorch's stable ABI. `src/mingru/ops/body_native.py` is their one caller: it hands
// over (B, S, N) sequences, states (B, 1, N) in the type of computation, and what `Scan` needs besides.
//
// With `batch_sizes` (S), int64, sequences are packed: (1, rows, N), where row after row lies step 0 of all batch elements,
// step 1 of those that have one, and so on, batch_sizes[t] of them at step t, the longest first.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "driver.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

mingru::Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return mingru::Storage::float32;
    case ScalarType::Double: return mingru::Storage::float64;
    case ScalarType::BFloat16: return mingru::Storage::bfloat16;
    case ScalarType::Half: return mingru::Storage::float16;
    default: STD_TORCH_CHECK(false, "mingru: dtype must be float32, float64, bfloat16 or float16");
  }
}

// Lanes must lie side by side. (`Prepared` refuses what is not (B, S, N).)
Tensor with_dense_lanes(const Tensor& x) {
  return x.dim() != 3 || x.size(2) == 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

Tensor slice(Tensor x, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(x, dim, start, length);
}

bool time_first(const Tensor& x) { return x.size(0) > 1 && x.stride(0) < x.stride(1); }

// (B, S, N) with the order of batch and time in memory that `like` has.
Tensor empty_sequence(const Tensor& like, int64_t lanes) {
  const int64_t batch = like.size(0), steps = like.size(1);
  if (!time_first(like)) return torch::stable::new_empty(like, {batch, steps, lanes});
  return torch::stable::transpose(torch::stable::new_empty(like, {steps, batch, lanes}), 0, 1);
}

mingru::CellKind cell_of(int64_t cell) {
  STD_TORCH_CHECK(
      cell >= static_cast<int64_t>(mingru::CellKind::mingru_positive) &&
          cell <= static_cast<int64_t>(mingru::CellKind::minlstm_tanh),
      "mingru: no cell has the number ", cell);
  return static_cast<mingru::CellKind>(cell);
}

int64_t num_inputs_of(mingru::CellKind cell) { return cell >= mingru::CellKind::minlstm_positive ? 3 : 2; }

// A scan, checked so that memory is safe, and what it points to. `name` is the operator.
class Prepared {
 public:
  mingru::Scan scan{};

  // `shape` has the first two dimensions of the sequences, and their dtype.
  Prepared(
      const char* name, mingru::CellKind cell, const Tensor& shape, int64_t num_lanes, const Tensor& h,
      const MaybeTensor& reset, const MaybeTensor& batch_sizes, bool reverse)
      : name_(name), rows_(shape.size(1)) {
    STD_TORCH_CHECK(shape.dim() == 3 && shape.is_cpu(), name, ": sequences must be (B, S, N) on the CPU");
    scan.cell = cell;
    scan.storage = storage_of(shape);
    scan.num_batch = shape.size(0);
    scan.num_steps = shape.size(1);
    scan.num_lanes = num_lanes;
    scan.reverse = reverse;
    if (batch_sizes) pack(*batch_sizes);
    STD_TORCH_CHECK(
        scan.num_batch > 0 && scan.num_steps > 0 && num_lanes > 0, name, ": sequences must not be empty");
    scan.h = state(h, "h");
    if (reset) {
      STD_TORCH_CHECK(
          reset->is_cpu() && reset->dim() == 2 && reset->scalar_type() == ScalarType::Bool &&
              reset->size(0) == shape.size(0) && reset->size(1) == shape.size(1),
          name, ": reset must be (B, S) bool");
      scan.reset = static_cast<const uint8_t*>(reset->data_ptr());
      scan.reset_step_stride = reset->stride(1);
      scan.reset_batch_stride = packed() ? reset->stride(1) : reset->stride(0);
    }
  }

  Prepared(const Prepared&) = delete;  // `scan` points into this object

  bool packed() const { return !step_rows_.empty(); }

  mingru::Part whole() const { return {0, scan.num_batch, 0, scan.num_steps}; }

  mingru::Sequence sequence(const Tensor& x) const {
    STD_TORCH_CHECK(
        x.is_cpu() && x.dim() == 3 && storage_of(x) == scan.storage && x.size(0) == (packed() ? 1 : scan.num_batch) &&
            x.size(1) == rows_ && x.size(2) == scan.num_lanes && (x.size(2) == 1 || x.stride(2) == 1),
        name_, ": sequences must be (B, S, N) on the CPU, of one shape and dtype, with dense lanes");
    return {x.data_ptr(), packed() ? x.stride(1) : x.stride(0), x.stride(1)};
  }

  void* state(const Tensor& x, const char* what) const {
    const auto computed = scan.storage == mingru::Storage::float64 ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(
        x.is_cpu() && x.is_contiguous() && x.scalar_type() == computed && x.numel() == scan.num_batch * scan.num_lanes,
        name_, ": ", what, " must be (B, 1, N), dense, in the type of computation");
    return x.data_ptr();
  }

  // (num_inputs N); each input's is filled up to whole groups.
  void add_biases(const MaybeTensor& bias) {
    if (!bias) return;
    const int64_t count = num_inputs_of(scan.cell), lanes = scan.num_lanes;
    STD_TORCH_CHECK(
        bias->is_cpu() && bias->is_contiguous() && storage_of(*bias) == scan.storage && bias->numel() == count * lanes,
        name_, ": bias must be (num_inputs N), dense, with the dtype of the sequences");
    STD_TORCH_CHECK(bias->element_size() >= 4, name_, ": half-width sequences take no bias here");
    const int64_t size = bias->element_size();
    const int64_t padded = (lanes + mingru::group - 1) / mingru::group * mingru::group;
    const char* data = static_cast<const char*>(bias->data_ptr());
    if (padded != lanes) {
      biases_.assign(count * padded * size, 0);
      for (int64_t k = 0; k < count; ++k) {
        std::copy_n(data + k * lanes * size, lanes * size, biases_.data() + k * padded * size);
      }
      data = biases_.data();
    }
    for (int64_t k = 0; k < count; ++k) scan.biases[k] = data + k * padded * size;
  }

  // Row numbers at which a step begins; for packed sequences alone.
  int64_t first_row(int64_t step) const { return step < scan.num_steps ? scan.step_rows[step] : rows_; }

 private:
  void pack(const Tensor& batch_sizes) {
    STD_TORCH_CHECK(
        scan.num_batch == 1 && batch_sizes.is_cpu() && batch_sizes.dim() == 1 && batch_sizes.is_contiguous() &&
            batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.numel() > 0,
        name_, ": packed sequences must be (1, rows, N), with int64 batch_sizes (S) on the CPU");
    const auto* sizes = static_cast<const int64_t*>(batch_sizes.data_ptr());
    const int64_t steps = batch_sizes.numel();
    int64_t row = 0;
    for (int64_t t = 0; t < steps; ++t) {
      STD_TORCH_CHECK(
          sizes[t] > 0 && (t == 0 || sizes[t] <= sizes[t - 1]), name_, ": batch_sizes must be above 0 and never grow");
      step_rows_.push_back(row);
      row += sizes[t];
    }
    STD_TORCH_CHECK(row == rows_, name_, ": batch_sizes must sum up to the number of rows");
    lengths_.resize(sizes[0]);
    for (int64_t t = 0; t < steps; ++t) {
      // Those that are not there at the next step end here.
      for (int64_t b = t + 1 < steps ? sizes[t + 1] : 0; b < sizes[t]; ++b) lengths_[b] = t + 1;
    }
    scan.num_batch = sizes[0];
    scan.num_steps = steps;
    scan.step_rows = step_rows_.data();
    scan.lengths = lengths_.data();
  }

  const char* name_;
  int64_t rows_;
  std::vector<int64_t> step_rows_, lengths_;
  std::vector<char> biases_;
};

// All inputs with dense lanes; kept while the scan points into them.
class Inputs {
 public:
  explicit Inputs(const std::vector<Tensor>& inputs) {
    for (const Tensor& x : inputs) tensors_.push_back(with_dense_lanes(x));
  }

  const Tensor& first() const { return tensors_.front(); }

  void add_to(Prepared& prepared) const {
    for (size_t k = 0; k < tensors_.size(); ++k) prepared.scan.inputs[k] = prepared.sequence(tensors_[k]);
  }

 private:
  std::vector<Tensor> tensors_;
};

std::tuple<Tensor, Tensor> forward(Prepared& prepared, const Tensor& like, const Tensor& h) {
  mingru::Scan& scan = prepared.scan;
  Tensor out = empty_sequence(like, scan.num_lanes);
  Tensor last = torch::stable::empty_like(h);
  scan.out = prepared.sequence(out);
  scan.last = last.data_ptr();
  mingru::run(scan, prepared.whole(), false);
  return {out, last};
}

// The gradients of all inputs, side by side in (B, S, num_inputs N), and of h.
std::tuple<Tensor, Tensor> backward(
    Prepared& prepared, const Tensor& like, const Tensor& h, const Tensor& out, const Tensor& grad_out,
    const Tensor& grad_last, int64_t num_inputs) {
  mingru::Scan& scan = prepared.scan;
  const Tensor out_rows = with_dense_lanes(out), grad_rows = with_dense_lanes(grad_out);
  Tensor grads = empty_sequence(like, num_inputs * scan.num_lanes);
  Tensor grad_h = torch::stable::empty_like(h);
  scan.out = prepared.sequence(out_rows);
  scan.grad_out = prepared.sequence(grad_rows);
  scan.grad_last = prepared.state(grad_last, "the last state's gradient");
  for (int64_t k = 0; k < num_inputs; ++k) {
    scan.grad_inputs[k] = prepared.sequence(slice(grads, 2, k * scan.num_lanes, scan.num_lanes));
  }
  scan.grad_h = grad_h.data_ptr();
  mingru::run(scan, prepared.whole(), true);
  return {grads, grad_h};
}

std::tuple<Tensor, Tensor> linear_scan_forward(
    const Tensor& a, const Tensor& b, const Tensor& h, const MaybeTensor& reset, bool reverse) {
  const Inputs inputs({a, b});
  Prepared prepared("linear_scan_forward", mingru::CellKind::linear_scan, a, a.size(-1), h, reset, {}, reverse);
  inputs.add_to(prepared);
  return forward(prepared, b, h);
}

std::tuple<Tensor, Tensor> linear_scan_backward(
    const Tensor& a, const Tensor& h, const MaybeTensor& reset, const Tensor& out, const Tensor& grad_out,
    const Tensor& grad_last, bool reverse) {
  // The gradients don't depend on b.
  const Inputs inputs({a, a});
  Prepared prepared("linear_scan_backward", mingru::CellKind::linear_scan, a, a.size(-1), h, reset, {}, reverse);
  inputs.add_to(prepared);
  return backward(prepared, a, h, out, grad_out, grad_last, 2);
}

void check_count(const char* name, const std::vector<Tensor>& inputs, int64_t cell) {
  STD_TORCH_CHECK(
      static_cast<int64_t>(inputs.size()) == num_inputs_of(cell_of(cell)), name, ": the cell ", cell, " takes ",
      num_inputs_of(cell_of(cell)), " inputs, got ", inputs.size());
}

std::tuple<Tensor, Tensor> recurrence_forward(
    const std::vector<Tensor>& inputs, const MaybeTensor& bias, const Tensor& h, const Tensor& initial,
    const MaybeTensor& reset, const MaybeTensor& batch_sizes, int64_t cell, bool reverse) {
  const char* name = "recurrence_forward";
  check_count(name, inputs, cell);
  const Tensor& first = inputs.front();
  const Inputs dense(inputs);
  Prepared prepared(name, cell_of(cell), first, first.size(-1), h, reset, batch_sizes, reverse);
  dense.add_to(prepared);
  prepared.add_biases(bias);
  prepared.scan.initial = prepared.state(initial, "initial");
  return forward(prepared, first, h);
}

std::tuple<Tensor, Tensor, Tensor> recurrence_backward(
    const std::vector<Tensor>& inputs, const MaybeTensor& bias, const Tensor& h, const Tensor& initial,
    const MaybeTensor& reset, const MaybeTensor& batch_sizes, const Tensor& out, const Tensor& grad_out,
    const Tensor& grad_last, int64_t cell, bool reverse) {
  const char* name = "recurrence_backward";
  check_count(name, inputs, cell);
  const Tensor& first = inputs.front();
  const Inputs dense(inputs);
  Prepared prepared(name, cell_of(cell), first, first.size(-1), h, reset, batch_sizes, reverse);
  dense.add_to(prepared);
  prepared.add_biases(bias);
  prepared.scan.initial = prepared.state(initial, "initial");
  Tensor grad_initial = torch::stable::empty_like(h);
  torch::stable::zero_(grad_initial);
  prepared.scan.grad_initial = grad_initial.data_ptr();
  auto [grads, grad_h] = backward(prepared, first, h, out, grad_out, grad_last, num_inputs_of(prepared.scan.cell));
  return {grads, grad_h, grad_initial};
}

// The layer, linear map and recurrence, block of rows after block of rows: what one block takes stays in the cache, and
// nothing as large as all pre-activations is made. Big enough for the matrix product to run at full speed.
constexpr int64_t block_values = 1 << 20;
constexpr int64_t most_block_rows = 2048;

struct Block {
  mingru::Part part;
  int64_t row, num_rows;
};

// Blocks of rows in the order of memory, each of them whole steps of all batch elements, whole batch elements, or a stretch
// of one; turned round where time is gone through from its end.
std::vector<Block> blocks_of(const Prepared& prepared, bool transposed, bool backward, int64_t num_columns) {
  const mingru::Scan& scan = prepared.scan;
  const int64_t batch = scan.num_batch, steps = scan.num_steps;
  const int64_t most = std::clamp(block_values / num_columns, int64_t(64), most_block_rows);
  std::vector<Block> blocks;
  if (prepared.packed() || transposed) {
    const auto row_of = [&](int64_t step) { return prepared.packed() ? prepared.first_row(step) : step * batch; };
    for (int64_t begin = 0; begin < steps;) {
      const int64_t width = row_of(begin + 1) - row_of(begin);
      if (width > most) {
        for (int64_t b = 0; b < width; b += most) {
          const int64_t count = std::min(most, width - b);
          blocks.push_back({{b, b + count, begin, begin + 1}, row_of(begin) + b, count});
        }
        // Elements whose sequences have ended hand on their states.
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

// Memory that a thread keeps from call to call: fresh pages cost more than what is computed in them.
class Scratch {
 public:
  void* at_least(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      // Whole cache lines, for the matrix products.
      memory_.reset(new Line[(bytes + sizeof(Line) - 1) / sizeof(Line)]);
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::unique_ptr<Line[]> memory_;
  int64_t size_ = 0;
};

thread_local Scratch product_scratch, grads_scratch;

// A view (rows, columns) of memory that somebody else keeps.
Tensor matrix(const void* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, const Tensor& like) {
  return torch::stable::from_blob(
      const_cast<void*>(data), {rows, columns}, {row_stride, column_stride}, like.device(), like.scalar_type());
}

void multiply(const Tensor& out, const Tensor& left, const Tensor& right) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

void multiply_and_add(const Tensor& out, const Tensor& left, const Tensor& right) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), 1, 1));
}

// x (B, S, I) dense, or the transpose of a dense (S, B, I), or packed; and its rows, in the order of memory.
class Rows {
 public:
  Rows(const char* name, const Tensor& x, const Tensor& weight, int64_t num_inputs)
      : transposed_(x.dim() == 3 && time_first(x)),
        dense_(dense(transposed_ ? torch::stable::transpose(x, 0, 1) : x)),
        data_(static_cast<char*>(dense_.data_ptr())),
        num_features_(x.size(-1)),
        num_columns_(weight.size(0)) {
    STD_TORCH_CHECK(
        x.dim() == 3 && weight.dim() == 2 && weight.is_cpu() && weight.is_contiguous() &&
            weight.scalar_type() == x.scalar_type() && num_columns_ % num_inputs == 0 &&
            weight.size(1) == num_features_ && x.numel() > 0,
        name, ": x must be (B, S, I), not empty, and weight (num_inputs N, I), dense");
  }

  bool transposed() const { return transposed_; }
  int64_t num_features() const { return num_features_; }
  int64_t num_columns() const { return num_columns_; }
  int64_t count() const { return dense_.numel() / num_features_; }

  Tensor of(const Block& block) const {
    return matrix(
        data_ + block.row * num_features_ * dense_.element_size(), block.num_rows, num_features_, num_features_, 1,
        dense_);
  }

 private:
  static Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

  bool transposed_;
  Tensor dense_;
  char* data_;
  int64_t num_features_, num_columns_;
};

// Sets `sequences`, one for each input, side by side in the rows of a block (or of all blocks).
void set_rows(mingru::Sequence* sequences, const Prepared& prepared, const Rows& rows, void* data, int64_t first_row, int64_t size) {
  const mingru::Scan& scan = prepared.scan;
  const int64_t stride = rows.num_columns();
  const bool steps_are_rows = !prepared.packed() && !rows.transposed();
  for (int64_t k = 0; k < stride / scan.num_lanes; ++k) {
    sequences[k] = {
        static_cast<char*>(data) + k * scan.num_lanes * size, steps_are_rows ? scan.num_steps * stride : stride,
        rows.transposed() ? scan.num_batch * stride : stride, first_row * stride};
  }
}

// Also the products x W^T of all rows, or nothing if they are not to be kept.
std::tuple<Tensor, Tensor, Tensor> linear_recurrence_forward(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& h, const Tensor& initial,
    const MaybeTensor& reset, const MaybeTensor& batch_sizes, int64_t cell, bool reverse, bool keep) {
  const char* name = "linear_recurrence_forward";
  const Rows rows(name, x, weight, num_inputs_of(cell_of(cell)));
  const int64_t columns = rows.num_columns(), size = x.element_size();
  Prepared prepared(name, cell_of(cell), x, columns / num_inputs_of(cell_of(cell)), h, reset, batch_sizes, reverse);
  prepared.add_biases(bias);
  mingru::Scan& scan = prepared.scan;
  scan.initial = prepared.state(initial, "initial");
  Tensor out = empty_sequence(x, scan.num_lanes);
  Tensor last = torch::stable::empty_like(h);
  scan.out = prepared.sequence(out);
  scan.last = last.data_ptr();
  Tensor product = torch::stable::new_empty(x, {keep ? rows.count() : 0, columns});

  const Tensor weight_transposed = matrix(weight.data_ptr(), rows.num_features(), columns, 1, rows.num_features(), x);
  for (const Block& block : blocks_of(prepared, rows.transposed(), false, columns)) {
    if (block.num_rows > 0) {
      void* data = keep ? static_cast<char*>(product.data_ptr()) + block.row * columns * size
                        : product_scratch.at_least(block.num_rows * columns * size);
      multiply(matrix(data, block.num_rows, columns, columns, 1, x), rows.of(block), weight_transposed);
      set_rows(scan.inputs, prepared, rows, data, block.row, size);
    }
    mingru::run(scan, block.part, false);
  }
  return {out, last, product};
}

// The gradients of x, weight, bias (where asked for, else nothing), h and initial. `product` may be empty: then it is
// computed again.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_recurrence_backward(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& h, const Tensor& initial,
    const MaybeTensor& reset, const MaybeTensor& batch_sizes, const Tensor& out, const Tensor& product,
    const Tensor& grad_out, const Tensor& grad_last, int64_t cell, bool reverse, bool needs_x, bool needs_weight,
    bool needs_bias) {
  const char* name = "linear_recurrence_backward";
  const Rows rows(name, x, weight, num_inputs_of(cell_of(cell)));
  const int64_t columns = rows.num_columns(), features = rows.num_features(), size = x.element_size();
  Prepared prepared(name, cell_of(cell), x, columns / num_inputs_of(cell_of(cell)), h, reset, batch_sizes, reverse);
  prepared.add_biases(bias);
  mingru::Scan& scan = prepared.scan;
  scan.initial = prepared.state(initial, "initial");
  const bool kept = product.numel() > 0;
  STD_TORCH_CHECK(
      !kept || (product.is_contiguous() && product.scalar_type() == x.scalar_type() &&
                product.numel() == rows.count() * columns),
      name, ": product must be (rows, num_inputs N), dense, or empty");
  const Tensor out_rows = with_dense_lanes(out), grad_rows = with_dense_lanes(grad_out);
  scan.out = prepared.sequence(out_rows);
  scan.grad_out = prepared.sequence(grad_rows);
  scan.grad_last = prepared.state(grad_last, "the last state's gradient");
  Tensor grad_h = torch::stable::empty_like(h), grad_initial = torch::stable::empty_like(h);
  torch::stable::zero_(grad_initial);
  scan.grad_h = grad_h.data_ptr();
  scan.grad_initial = grad_initial.data_ptr();

  Tensor grad_x = needs_x ? empty_sequence(x, features) : torch::stable::new_empty(x, {0});
  Tensor grad_weight = torch::stable::new_empty(x, {needs_weight ? columns : 0, features});
  Tensor grad_bias = torch::stable::new_empty(x, {needs_bias ? 1 : 0, columns});
  if (needs_weight) torch::stable::zero_(grad_weight);
  if (needs_bias) torch::stable::zero_(grad_bias);
  const std::vector<Block> blocks = blocks_of(prepared, rows.transposed(), true, columns);
  int64_t most_rows = 0;
  for (const Block& block : blocks) most_rows = std::max(most_rows, block.num_rows);
  Tensor ones = torch::stable::new_empty(x, {1, needs_bias ? most_rows : 0});
  if (needs_bias) torch::stable::fill_(ones, 1.0);

  const Tensor weight_transposed = matrix(weight.data_ptr(), features, columns, 1, features, x);
  for (const Block& block : blocks) {
    const int64_t count = block.num_rows;
    if (count == 0) {
      mingru::run(scan, block.part, true);
      continue;
    }
    void* pre = kept ? static_cast<char*>(product.data_ptr()) + block.row * columns * size
                     : product_scratch.at_least(most_rows * columns * size);
    if (!kept) multiply(matrix(pre, count, columns, columns, 1, x), rows.of(block), weight_transposed);
    void* to = grads_scratch.at_least(most_rows * columns * size);
    set_rows(scan.inputs, prepared, rows, pre, block.row, size);
    set_rows(scan.grad_inputs, prepared, rows, to, block.row, size);
    mingru::run(scan, block.part, true);

    const Tensor grads = matrix(to, count, columns, columns, 1, x);
    if (needs_x) {
      char* data = static_cast<char*>(grad_x.data_ptr()) + block.row * features * size;
      multiply(matrix(data, count, features, features, 1, x), grads, weight);
    }
    if (needs_weight) multiply_and_add(grad_weight, matrix(to, columns, count, 1, columns, x), rows.of(block));
    if (needs_bias) multiply_and_add(grad_bias, matrix(ones.data_ptr(), 1, count, count, 1, x), grads);
  }
  return {grad_x, grad_weight, grad_bias, grad_h, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY(mingru, library) {
  library.def("linear_scan_forward(Tensor a, Tensor b, Tensor h, Tensor? reset, bool reverse) -> (Tensor, Tensor)");
  library.def(
      "linear_scan_backward(Tensor a, Tensor h, Tensor? reset, Tensor out, Tensor grad_out, Tensor grad_last, "
      "bool reverse) -> (Tensor, Tensor)");
  library.def(
      "recurrence_forward(Tensor[] inputs, Tensor? bias, Tensor h, Tensor initial, Tensor? reset, "
      "Tensor? batch_sizes, int cell, bool reverse) -> (Tensor, Tensor)");
  library.def(
      "recurrence_backward(Tensor[] inputs, Tensor? bias, Tensor h, Tensor initial, Tensor? reset, "
      "Tensor? batch_sizes, Tensor out, Tensor grad_out, Tensor grad_last, int cell, bool reverse) -> "
      "(Tensor, Tensor, Tensor)");
  library.def(
      "linear_recurrence_forward(Tensor x, Tensor weight, Tensor? bias, Tensor h, Tensor initial, Tensor? reset, "
      "Tensor? batch_sizes, int cell, bool reverse, bool keep) -> (Tensor, Tensor, Tensor)");
  library.def(
      "linear_recurrence_backward(Tensor x, Tensor weight, Tensor? bias, Tensor h, Tensor initial, Tensor? reset, "
      "Tensor? batch_sizes, Tensor out, Tensor product, Tensor grad_out, Tensor grad_last, int cell, bool reverse, "
      "bool needs_x, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mingru, CPU, library) {
  library.impl("linear_scan_forward", TORCH_BOX(&linear_scan_forward));
  library.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
  library.impl("recurrence_forward", TORCH_BOX(&recurrence_forward));
  library.impl("recurrence_backward", TORCH_BOX(&recurrence_backward));
  library.impl("linear_recurrence_forward", TORCH_BOX(&linear_recurrence_forward));
  library.impl("linear_recurrence_backward", TORCH_BOX(&linear_recurrence_backward));
}
