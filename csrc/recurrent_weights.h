// The recurrent weights of a GRU or an LSTM, as the kernels in recurrent_steps.h read them. The weight is (num_gates N, K):
// each row has the weights of its own diagonal block of K features, and the rows are in the order of torch.nn.GRU: reset
// gate, update gate, candidate; or of torch.nn.LSTM. The bias, that of a GRU's candidate, is (N).
#pragma once

#include "linear.h"
#include "operands.h"

namespace mingru {
namespace {

// Narrower blocks would fill a part of a tile.
constexpr int64_t least_rounded = 32;

class RecurrentWeights {
 public:
  // Weight and bias are in the accumulation dtype, as `h` is.
  RecurrentWeights(const Call& call, const Tensor& h, const Scan& scan)
      : num_features_(scan.num_features), needs_gradients_(call.has(Flag::needs_recurrent)), h_(h) {
    blocks_.num_gates = call.traits().num_inputs;
    const Tensor *given = call[Argument::recurrent], *bias = call[Argument::recurrent_bias];
    const auto fits = [&](const Tensor& x) {
      return x.is_cpu() && x.is_contiguous() && x.scalar_type() == h.scalar_type() && x.numel() > 0;
    };
    STD_TORCH_CHECK(
        given && fits(*given) && given->dim() == 2 && given->size(0) == blocks_.num_gates * num_features_ &&
            num_features_ % given->size(1) == 0 && (!bias || (fits(*bias) && bias->numel() == num_features_)) &&
            !call.has(Flag::output_gate),
        call.name, ": recurrent weights must be (num_gates N, K) and their bias (N), contiguous, in the accumulation dtype");
    // Narrow blocks are computed several as one, so that they fill the lanes.
    const int64_t size = given->size(1), count = num_features_ / size;
    merged_ = std::max<int64_t>(1, group / size);
    while (count % merged_ != 0) --merged_;
    blocks_.size = merged_ * size;
    blocks_.count = count / merged_;
    blocks_.padded = ceil_div(blocks_.size, group) * group;
    // To copy the weights takes longer than products of few rows with weights that are not copied, at any width.
    is_few_ = scan.num_steps * scan.num_batch <= blocks_.padded / group;
    const bool is_lstm = call.cell() == Cell::lstm, is_rounded = call.has(Flag::bfloat16_products) && size >= least_rounded;
    if (is_rounded && scan.storage != Storage::float64 && (is_lstm || !is_few_)) blocks_.tiles = tiles_in_use();
    STD_TORCH_CHECK(
        !is_lstm || scan.storage != Storage::bfloat16 || blocks_.tiles, call.name,
        ": an LSTM of bfloat16 must have products of bfloat16");
    blocks_.given = merged_ == 1 ? given->data_ptr() : merged(*given);
    if (blocks_.is_wide()) blocks_.parallel_for = share_wide_block;
    const int64_t padded = blocks_.padded * h.element_size(), bytes = blocks_.size * h.element_size();
    char* const biases = static_cast<char*>(biases_.at_least(blocks_.count * padded));
    std::memset(biases, 0, blocks_.count * padded);
    for (int64_t i = 0; bias && i < blocks_.count; ++i) {
      std::memcpy(biases + i * padded, data_of<char>(*bias) + i * bytes, bytes);
    }
    blocks_.biases = biases;
  }

  // Whether a forward pass computes the linear map of x in its steps.
  bool is_rounded() const { return blocks_.tiles; }

  // Lets the steps of a forward pass compute the linear map, whose bias may be absent.
  void add_map(const InputWeights& weights, const MaybeTensor& bias) {
    const int64_t rows = blocks_.count * blocks_.num_gates * blocks_.padded;
    void* const packed = packed_map_.at_least(rows * ceil_div(weights.num_x, 32) * 64);
    pack_input_weights(weights, blocks_, packed);
    blocks_.input_weights = packed;
    auto* const to = static_cast<float*>(map_biases_.at_least(rows * sizeof(float)));
    std::memset(to, 0, rows * sizeof(float));
    blocks_.input_biases = to;
    if (!bias) return;
    const Tensor wide = bias->element_size() < 4 ? torch::stable::to(*bias, ScalarType::Float) : *bias;
    for (int64_t i = 0; i < blocks_.count * blocks_.num_gates; ++i) {
      const int64_t block = i / blocks_.num_gates, gate = i % blocks_.num_gates;
      const float* from = data_of<const float>(wide) + gate * num_features_ + block * blocks_.size;
      std::memcpy(to + i * blocks_.padded, from, blocks_.size * sizeof(float));
    }
  }

  void run_blocks(const Scan& scan, const Part& part, bool is_backward) {
    const bool is_few = is_few_ && !blocks_.tiles;
    const bool is_step = scan.num_steps == 1 && blocks_.padded == blocks_.size && !blocks_.tiles;
    // Backward, kept values are in place of the products.
    const bool is_kept = is_backward && scan.sums.data;
    if (!blocks_.weights && !is_kept && !is_few) blocks_.weights = packed(packed_, scan, false);
    if (is_backward && !is_step && !blocks_.transposed) blocks_.transposed = packed(transposed_, scan, true);
    if (is_backward && needs_gradients_ && !totals_) {
      const int64_t rows = blocks_.num_gates * blocks_.padded + 1;
      totals_ = zeros({blocks_.num_totals(scan.num_batch), blocks_.count, rows, blocks_.padded}, h_);
      blocks_.totals = totals_->data_ptr();
    }
    run_diagonal_blocks(scan, blocks_, part, is_backward);
  }

  // Appends the gradients of weight and bias, if they are needed.
  void add_gradients(Tensors& grads) const {
    if (!totals_) return;
    const int64_t size = blocks_.size, own = size / merged_, padded = blocks_.padded, rows = blocks_.num_gates * padded + 1;
    const Tensor sum = totals_->size(0) > 1 ? torch::stable::sum(*totals_, std::vector<int64_t>{0}) : *totals_;
    for (int64_t i = 0; blocks_.tiles && i < blocks_.count; ++i) {
      // Those of products of bfloat16 are transposed.
      float* const own = data_of<float>(sum) + i * rows * padded;
      const Tensor part = as_contiguous(view_of(own, {rows - 1, padded}, {1, rows - 1}, h_));
      std::memcpy(own, part.data_ptr(), part.numel() * sizeof(float));
    }
    const bool is_copied = num_features_ > own || padded > size;
    const std::vector<int64_t> sizes = {blocks_.num_gates * num_features_, own};
    const Tensor of_bias = empty({num_features_}, h_), of_weight = is_copied ? empty(sizes, h_) : part_of(sum, 0, sizes);
    const auto copy = [&](const Tensor& to, int64_t index, int64_t from, int64_t count) {
      const int64_t bytes = h_.element_size();
      std::memcpy(data_of<char>(to) + index * bytes, data_of<char>(sum) + from * bytes, count * bytes);
    };
    for (int64_t i = 0; i < blocks_.count * blocks_.num_gates * size; ++i) {
      const int64_t block = i / (blocks_.num_gates * size), gate = i / size % blocks_.num_gates, row = i % size;
      const int64_t first = block * rows * padded, of_gate = first + (gate * padded + row) * padded;
      if (row == 0) copy(of_bias, block * size, first + (rows - 1) * padded, size);
      if (!is_copied) continue;
      copy(of_weight, (gate * num_features_ + block * size + row) * own, of_gate + row / own * own, own);
    }
    grads.insert(grads.end(), {of_weight, of_bias});
  }

 private:
  // The weights of blocks that are computed as one, with 0 beside those of each. So NaN in the state of one is NaN in all.
  const void* merged(const Tensor& given) {
    const int64_t own = given.size(1) * h_.element_size(), bytes = merged_ * own, rows = given.size(0);
    char* const to = static_cast<char*>(merged_weights_.at_least(rows * bytes));
    std::memset(to, 0, rows * bytes);
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(to + i * bytes + i / given.size(1) % merged_ * own, data_of<char>(given) + i * own, own);
    }
    return to;
  }

  const void* packed(Scratch& scratch, const Scan& scan, bool is_transposed) const {
    void* to = scratch.at_least(blocks_.num_gates * num_features_ * blocks_.padded * h_.element_size());
    pack_diagonal_blocks(blocks_, scan.storage, to, is_transposed);
    return to;
  }

  const int64_t num_features_;
  const bool needs_gradients_;
  const Tensor h_;
  DiagonalBlocks blocks_{};
  MaybeTensor totals_;
  bool is_few_;  // few rows of all steps
  int64_t merged_;  // how many blocks are computed as one
  Scratch merged_weights_, biases_, packed_, transposed_, packed_map_, map_biases_;
};

}  // namespace
}  // namespace mingru
