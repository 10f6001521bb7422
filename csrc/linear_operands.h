// The operands of a norm, a linear map and a recurrence, and the slices in which they are computed, one after the other: rows
// whose data stays in the cache.
#pragma once

#include "linear.h"
#include "recurrent_weights.h"

namespace mingru {
namespace {

// Large enough for the full speed of the matrix multiplication. 2 MB was the best compromise of 0.5 to 4 MB on a
// processor with second-level caches of 512 KB and a third-level cache of 32 MB. In tiles, a product copies its weights
// first, for each slice, which takes 2 % of its time for 1024 rows.
constexpr int64_t slice_bytes = 1 << 21;
constexpr int64_t least_slice_rows = 64, least_rows_in_tiles = 1024, most_slice_rows = 2048;
// With fewer bytes to copy, a thread costs more time than it saves.
constexpr int64_t bytes_per_thread = 1 << 17;

// Rows of the matrix x, and the batch elements and steps whose rows they are.
struct Slice {
  Part part;
  int64_t row, num_rows;
};

// The number of features of the states. Without a weight, x has the pre-activations.
int64_t num_outputs(const Call& call, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias) {
  const int64_t num_parts = call.num_parts(), factor = num_parts * (call.is_mixture() ? 2 : 1);
  const bool is_map = weight && weight->dim() == 2 && weight->is_cpu() && weight->scalar_type() == x.scalar_type() &&
                      weight->size(1) == x.size(-1);
  const int64_t columns = is_map ? weight->size(0) : x.size(-1);
  STD_TORCH_CHECK(
      x.dim() == (call[Argument::batch_sizes] ? 2 : 3) && (is_map || (!weight && !bias)) &&
          columns % factor == 0 && x.numel() > 0,
      call.name, ": x must be (B, S, I), not empty, and weight (num_parts N, I), of the same dtype");
  return columns / num_parts;
}

// The operands of the recurrence and of its linear map. x is a matrix in the order of memory, copied only if neither x
// nor its transpose is contiguous. With lengths, x is not copied here, because only the valid steps are rows.
class LinearOperands : public Operands {
 public:
  const Tensor weight;
  const int64_t num_features, num_columns;
  const bool has_map, has_norm;

  LinearOperands(const Call& call, const Tensor& x, const MaybeTensor& any_weight, const MaybeTensor& bias, double eps)
      : Operands(call, x, num_outputs(call, x, any_weight, bias), call.cell() == Cell::lstm ? 2 : 1),
        weight(any_weight ? as_contiguous(*any_weight) : x),
        num_features(x.size(-1)),
        num_columns(any_weight ? weight.size(0) : num_features),
        has_map(any_weight),
        has_norm(call.has(Flag::rms_norm) || call.has(Flag::layer_norm)),
        is_transposed_(!has_lengths() && !is_packed() && !x.is_contiguous() && x.stride(0) < x.stride(1)),
        time_major_(is_packed() || (!has_lengths() && call.has(Flag::time_first) != is_transposed_)),
        eps_(eps),
        x_(in_memory_order(x)) {
    if (call.cell() >= Cell::gru) recurrent_.emplace(call, h, scan);
    // The scan adds a bias of float32 or float64, unless the cell is timed or has recurrent weights, or the product adds
    // it at no cost.
    if (bias && (weight.element_size() < 4 || recurrent_ || scan.dt.data || scan.log_bound < 0 || is_in_tiles())) {
      STD_TORCH_CHECK(
          bias->is_cpu() && bias->numel() == num_columns && bias->scalar_type() == weight.scalar_type(), call.name,
          ": bias must be (num_parts N), of the dtype of weight");
      bias_ = as_contiguous(*bias);
    } else {
      add_biases(bias);
    }
  }

  void run_part(const Part& part, bool is_backward) {
    recurrent_ ? recurrent_->run_blocks(scan, part, is_backward) : Operands::run_part(part, is_backward);
  }

  // Lets the steps of a forward pass compute the linear map, if that takes less time. Returns whether they do.
  bool map_in_steps() {
    if (!has_map || !recurrent_ || !recurrent_->is_rounded()) return false;
    scan.num_x = num_features;
    recurrent_->add_map({scan.storage, weight.data_ptr(), num_features}, bias_);
    return true;
  }

  // Appends the gradients of the recurrent weights and their bias, if they are needed.
  void add_recurrent(Tensors& grads) const {
    if (recurrent_) recurrent_->add_gradients(grads);
  }

  int64_t num_rows() const { return row_offsets_.empty() ? x_.numel() / num_features : row_offsets_.back(); }
  int64_t bytes_of_columns(int64_t rows) const { return rows * num_columns * x_.element_size(); }

  // The slices in the order of the scan. A slice has all batch elements of some steps, all steps of some batch elements, or a
  // part of one step or batch element. Of a GRU, whose batch elements are computed together, it may have some steps of
  // some batch elements, whose rows it copies.
  std::vector<Slice> slices(bool backward) const {
    const int64_t least = is_in_tiles() ? least_rows_in_tiles : least_slice_rows;
    const int64_t most = std::clamp(slice_bytes / bytes_of_columns(1), least, most_slice_rows);
    const int64_t outer = time_major_ ? scan.num_steps : scan.num_batch;
    const int64_t inner = time_major_ ? scan.num_batch : scan.num_steps;
    const auto row_of = [&](int64_t i) { return row_offsets_.empty() ? i * inner : row_offsets_[i]; };
    std::vector<Slice> slices;
    const auto add = [&](int64_t begin, int64_t end, int64_t from, int64_t to, int64_t row, int64_t num_rows) {
      const Part part = time_major_ ? Part{from, to, begin, end} : Part{begin, end, from, to};
      slices.push_back({part, row, num_rows});
    };
    const int64_t together = std::min(scan.num_batch, DiagonalBlocks::most_together);
    const bool is_divided = recurrent_ && !time_major_ && together * scan.num_steps > most;
    for (int64_t begin = 0, row = 0; is_divided && begin < outer; begin += together) {
      const int64_t end = std::min(begin + together, outer), steps = std::max<int64_t>(1, most / (end - begin));
      for (int64_t from = 0; from < inner; from += steps, row += slices.back().num_rows) {
        add(begin, end, from, std::min(from + steps, inner), row, 0);
        for (int64_t b = begin; b < end; ++b) slices.back().num_rows += steps_of(slices.back(), b);
      }
    }
    for (int64_t begin = is_divided ? outer : 0; begin < outer;) {
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
    if (scan.reverse != backward) std::reverse(slices.begin(), slices.end());
    return slices;
  }

  // Sets where the rows of each batch element are in a slice, before all that follows.
  void enter(const Slice& slice) {
    if (time_major_) return;
    row_of_.resize(scan.num_batch);
    int64_t row = 0;
    for (int64_t b = slice.part.batch_begin; b < slice.part.batch_end; row += steps_of(slice, b++)) {
      row_of_[b] = row - slice.part.begin;
    }
  }

  // The pre-activations of a slice: those that are kept, its rows if there is no map and they are only read, or memory.
  char* pre_activations_of(const Slice& slice, char* kept, const void* read_rows = nullptr) const {
    if (kept) return kept + bytes_of_columns(slice.row);
    if (!has_map && read_rows) return static_cast<char*>(const_cast<void*>(read_rows));
    return static_cast<char*>(pre_activations_scratch_.at_least(bytes_of_columns(slice.num_rows)));
  }

  // Sets the inputs of the cell, or their gradients.
  void set_inputs(Sequence* inputs, char* data, const Slice& slice) const {
    set_sequences(inputs, data, slice, num_columns, num_columns / scan.num_features);
  }

  // The linear map of a slice's rows, or a copy, because backward writes into it.
  void map(void* out, const void* rows, const Slice& slice) const {
    if (!has_map) return static_cast<void>(std::memcpy(out, rows, slice.num_rows * row_bytes()));
    map_rows(out, rows, slice.num_rows, x_, weight, bias_);
  }

  // What a forward pass keeps of each row: its pre-activations, or of a GRU what its steps replace them by, and a sum.
  int64_t num_kept() const { return num_columns + (recurrent_ ? scan.num_features : 0); }

  // Sets the sums that are kept after all else.
  void set_sums(char* kept, const Slice& slice) {
    if (!recurrent_ || !kept) return;
    const int64_t bytes = scan.num_features * x_.element_size();
    set_sequences(&scan.sums, kept + bytes_of_columns(num_rows()) + slice.row * bytes, slice, scan.num_features);
  }

  // Sets so many sequences, which are side by side in the matrix of a slice, of `stride` columns.
  void set_sequences(Sequence* sequences, char* data, const Slice& slice, int64_t stride, int64_t count = 1) const {
    const int64_t part = scan.num_features * x_.element_size();
    const int64_t step_stride = time_major_ && !is_packed() ? scan.num_batch * stride : stride;
    const int64_t skipped = time_major_ ? slice.row * stride : 0;
    for (int64_t k = 0; k < count; ++k) {
      sequences[k] = {data + k * part, stride, step_stride, skipped, time_major_ ? nullptr : row_of_.data()};
    }
  }

  // The rows of a slice, next to each other, after the norm.
  const void* rows_of(const Slice& slice) const {
    if (!has_norm) return rows_of_x(slice);
    void* rows = normalized_scratch_.at_least(slice.num_rows * row_bytes());
    normalize(normalization(slice, rows_of_x(slice), rows), false);
    return rows;
  }

  // Replaces the gradients of a slice's rows after the norm by those of x; `rows_of` was called before.
  void undo_norm(const Slice& slice, void* grad_rows) const {
    if (has_norm) normalize(normalization(slice, normalized_scratch_.data(), grad_rows), true);
  }

  // Calls `compute` with the memory of the gradients of a slice's rows.
  template <class F>
  void set_grad_rows(const Slice& slice, const Tensor& grad_x, const F& compute) const {
    if (void* rows = rows_in(grad_x, slice)) return compute(rows);
    char* rows = static_cast<char*>(grad_rows_scratch_.at_least(slice.num_rows * row_bytes()));
    compute(rows);
    each_part_of(slice, grad_x, rows, [](char* steps, char* part, int64_t size) { std::memcpy(steps, part, size); });
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

 private:
  // How many steps of a batch element a slice has.
  int64_t steps_of(const Slice& slice, int64_t batch) const {
    const int64_t length = has_lengths() ? scan.lengths[batch] : scan.num_steps;
    return std::max<int64_t>(0, std::min(slice.part.end, length) - slice.part.begin);
  }

  const void* rows_of_x(const Slice& slice) const {
    if (const void* rows = rows_in(x_, slice)) return rows;
    char* rows = static_cast<char*>(rows_scratch_.at_least(slice.num_rows * row_bytes()));
    each_part_of(slice, x_, rows, [](char* steps, char* part, int64_t size) { std::memcpy(part, steps, size); });
    return rows;
  }

  Normalization normalization(const Slice& slice, const void* x, void* out) const {
    void* scales = scales_scratch_.at_least(slice.num_rows * h.element_size());
    return {scan.storage, call_.has(Flag::layer_norm), eps_, x, out, scales, slice.num_rows, num_features};
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

  // How far steps are from each other, in bytes. Without lengths, sequences are contiguous in the order of memory.
  int64_t step_bytes(const Tensor& sequence) const {
    return has_lengths() ? sequence.stride(step_dim_) * sequence.element_size() : row_bytes();
  }

  char* step_of(const Tensor& sequence, int64_t batch, int64_t step) const {
    const int64_t stride = has_lengths() ? sequence.stride(batch_dim_) : scan.num_steps * num_features;
    return data_of<char>(sequence) + batch * stride * sequence.element_size() + step * step_bytes(sequence);
  }

  // The rows of a slice in a sequence, or null if they are not next to each other.
  char* rows_in(const Tensor& sequence, const Slice& slice) const {
    const Part& part = slice.part;
    if (time_major_) return data_of<char>(sequence) + slice.row * row_bytes();
    const bool is_one = part.batch_end == part.batch_begin + 1;
    const bool are_neighbors = is_one ? slice.num_rows == 1 || step_bytes(sequence) == row_bytes()
                                      : !has_lengths() && part.end - part.begin == scan.num_steps;
    return are_neighbors ? step_of(sequence, part.batch_begin, part.begin) : nullptr;
  }

  // Calls f with the memory of each run of neighboring steps, and its size in bytes.
  template <class F>
  void each_run(const Tensor& sequence, int64_t batch, int64_t begin, int64_t end, int64_t size, const F& f) const {
    const int64_t run = step_bytes(sequence) == size ? end - begin : 1;
    for (int64_t step = begin; step < end; step += run) f(step_of(sequence, batch, step), run * size);
  }

  // Calls f, by several threads, with the memory of neighboring steps of a slice in a sequence, their memory in the
  // matrix of the slice's rows, and their size, in bytes.
  template <class F>
  void each_part_of(const Slice& slice, const Tensor& sequence, char* rows, const F& f) const {
    parallel_for(0, slice.num_rows, row_bytes(), [&](int64_t begin, int64_t end) {
      for (int64_t b = slice.part.batch_begin; b < slice.part.batch_end; ++b) {
        const int64_t first = row_of_[b] + slice.part.begin;
        const int64_t from = std::max(begin, first), to = std::min(end, first + steps_of(slice, b));
        char* part = rows + from * row_bytes();
        each_run(sequence, b, from - row_of_[b], to - row_of_[b], row_bytes(), [&](char* steps, int64_t size) {
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

  const bool is_transposed_, time_major_;
  const double eps_;
  const Tensor x_;
  MaybeTensor bias_;
  std::optional<RecurrentWeights> recurrent_;
  std::vector<int64_t> row_of_;  // where the first step of each batch element would be in the present slice
  mutable Scratch pre_activations_scratch_, rows_scratch_, normalized_scratch_, scales_scratch_, grad_rows_scratch_;
};

}  // namespace
}  // namespace mingru
