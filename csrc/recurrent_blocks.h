// The recurrent weights of a GRU whose features see each other in blocks, as the kernels in blocks.h read them. The weight
// is (3 N, K): each row has the weights of its own block of K features, and the rows are in the order of torch.nn.GRU: reset
// gate, update gate, candidate. The bias, that of the candidate, is (N).
#pragma once

#include "operands.h"
#include "scratch.h"

namespace mingru {
namespace {

class RecurrentBlocks {
 public:
  // Backward only: sums of the gradients of weights and bias, (most_totals, blocks, 3 padded + 1, padded).
  MaybeTensor totals;

  // Weight and bias are in the accumulation dtype, as `h` is.
  RecurrentBlocks(const Call& call, const Tensor& h, int64_t num_features) : num_features_(num_features), h_(h) {
    const Tensor *given = call[Argument::recurrent], *bias = call[Argument::recurrent_bias];
    const auto fits = [&](const Tensor& x) {
      return x.is_cpu() && x.is_contiguous() && x.scalar_type() == h.scalar_type() && x.numel() > 0;
    };
    STD_TORCH_CHECK(
        given && fits(*given) && given->dim() == 2 && given->size(0) == num_gates * num_features &&
            num_features % given->size(1) == 0 && (!bias || (fits(*bias) && bias->numel() == num_features)) &&
            !call.has(Flag::output_gate),
        call.name, ": recurrent weights must be (3 N, K) and their bias (N), contiguous, in the accumulation dtype");
    blocks_.size = given->size(1);
    blocks_.count = num_features / blocks_.size;
    blocks_.padded = (blocks_.size + group - 1) / group * group;
    weight_ = data_of<void>(*given);
    blocks_.weights = packed(packed_, blocks_.size, 1);
    const int64_t padded = blocks_.padded * h.element_size(), bytes = blocks_.size * h.element_size();
    biases_.resize(blocks_.count * padded);
    for (int64_t i = 0; bias && i < blocks_.count; ++i) {
      std::memcpy(&biases_[i * padded], data_of<char>(*bias) + i * bytes, bytes);
    }
    blocks_.biases = biases_.data();
  }

  void run(const Scan& scan, const Part& part, bool is_backward) {
    if (is_backward && !totals) {
      totals = torch::stable::new_zeros(h_, {most_totals, blocks_.count, num_gates * blocks_.padded + 1, blocks_.padded});
      blocks_.totals = totals->data_ptr();
      blocks_.transposed = packed(transposed_, 1, blocks_.size);
    }
    run_blocks(scan, blocks_, part, is_backward);
  }

 private:
  static constexpr int64_t num_gates = Blocks::num_gates;

  // Returns weights in this order: (blocks, padded / lanes, size, gates, lanes). A vector has the weights from one feature
  // to some, or transposed, from some features to one. The strides are those of features that are lanes, and of those that
  // are not.
  const void* packed(Scratch& scratch, int64_t lane_stride, int64_t stride) const {
    void* to = scratch.at_least(num_gates * num_features_ * blocks_.padded * h_.element_size());
    h_.element_size() == 8 ? pack(static_cast<double*>(to), lane_stride, stride)
                           : pack(static_cast<float*>(to), lane_stride, stride);
    return to;
  }

  template <class A>
  void pack(A* to, int64_t lane_stride, int64_t stride) const {
    const int64_t size = blocks_.size, lanes = Blocks::vector_bytes / sizeof(A);
    for (int64_t first = 0; first < num_features_; first += size) {
      for (int64_t lane = 0; lane < blocks_.padded; lane += lanes) {
        for (int64_t k = 0; k < size; ++k) {
          for (int64_t gate = 0; gate < num_gates; ++gate) {
            const A* from = static_cast<const A*>(weight_) + (gate * num_features_ + first) * size + k * stride;
            for (int64_t i = lane; i < lane + lanes; ++i) *to++ = i < size ? from[i * lane_stride] : A(0);
          }
        }
      }
    }
  }

  const int64_t num_features_;
  const Tensor h_;
  const void* weight_;
  Blocks blocks_{};
  std::vector<char> biases_;
  Scratch packed_, transposed_;
};

}  // namespace
}  // namespace mingru
