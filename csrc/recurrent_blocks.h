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
  RecurrentBlocks(const Call& call, const Tensor& h, int64_t num_features) : num_features_(num_features) {
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
    h.element_size() == 8 ? set<double>(*given, bias) : set<float>(*given, bias);
  }

  void run(const Scan& scan, const Part& part, bool is_backward, const Tensor& h) {
    if (is_backward && !totals) {
      totals = torch::stable::new_zeros(h, {most_totals, blocks_.count, num_gates * blocks_.padded + 1, blocks_.padded});
      blocks_.totals = totals->data_ptr();
    }
    run_blocks(scan, blocks_, part, is_backward);
  }

 private:
  static constexpr int64_t num_gates = 3;

  template <class A>
  void set(const Tensor& weight, const Tensor* bias) {
    const int64_t num_weights = num_gates * num_features_ * blocks_.padded, size = blocks_.size;
    A* packed = static_cast<A*>(packed_.at_least((2 * num_weights + blocks_.count * blocks_.padded) * sizeof(A)));
    A *transposed = packed + num_weights, *biases = transposed + num_weights;
    pack(data_of<const A>(weight), packed, size, 1);
    pack(data_of<const A>(weight), transposed, 1, size);
    std::fill(biases, biases + blocks_.count * blocks_.padded, A(0));
    for (int64_t i = 0; bias && i < num_features_; ++i) biases[i / size * blocks_.padded + i % size] = data_of<const A>(*bias)[i];
    blocks_.weights = packed, blocks_.transposed = transposed, blocks_.biases = biases;
  }

  // (blocks, padded / lanes, size, gates, lanes): a vector has the weights from one feature to some, or transposed, from
  // some features to one. The strides are those of features that are lanes, and of those that are not.
  template <class A>
  void pack(const A* weight, A* to, int64_t lane_stride, int64_t stride) const {
    const int64_t size = blocks_.size, lanes = 64 / sizeof(A);
    for (int64_t first = 0; first < num_features_; first += size) {
      for (int64_t lane = 0; lane < blocks_.padded; lane += lanes) {
        for (int64_t k = 0; k < size; ++k) {
          for (int64_t gate = 0; gate < num_gates; ++gate) {
            const A* from = weight + (gate * num_features_ + first) * size + k * stride;
            for (int64_t i = lane; i < lane + lanes; ++i) *to++ = i < size ? from[i * lane_stride] : A(0);
          }
        }
      }
    }
  }

  const int64_t num_features_;
  Blocks blocks_{};
  Scratch packed_;
};

}  // namespace
}  // namespace mingru
