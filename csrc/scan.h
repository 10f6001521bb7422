// Types that kernels and operators share. B: batch, S: steps, N: features, the product of all trailing sizes.
#pragma once

#include <cstdint>

namespace mingru {

enum class Storage { float32, float64, bfloat16, float16 };

// Compilers that take the instruction set as an option of each function. Others compile for the oldest processor of the
// target: SSE2 on x86-64, NEON on 64-bit Arm.
#if defined(__x86_64__) && defined(__GNUC__)
#define MINGRU_X86
#endif

// Name, number of inputs, whether steps may have an elapsed time and the decay a lower bound, and the type of every cell:
// a struct, or its template over the activation. The linear scans are the first. All other lists of cells are made from this list.
#define MINGRU_CELLS(CELL)                                     \
  CELL(linear_scan, 2, false, ScanOf<Real>)                    \
  CELL(complex_linear_scan, 2, false, ScanOf<Complex>)         \
  CELL(quaternion_linear_scan, 2, false, ScanOf<Quaternion>)   \
  CELL(mingru, 2, true, MinGRU)                                \
  CELL(mingru_signed, 2, false, SignedMinGRU)                  \
  CELL(mingru_rotation, 2, true, RotationMinGRU)               \
  CELL(mingru_quaternion, 2, true, QuaternionMinGRU)           \
  CELL(minlstm, 3, true, MinLSTM)                              \
  CELL(minlstm_unnormalized, 3, false, UnnormalizedMinLSTM)    \
  CELL(gru, 3, false, WithoutLanes)                            \
  CELL(lstm, 4, false, WithoutLanes)

// Of an entry of such a list, for an enum.
#define MINGRU_NAME(name, ...) name,
enum class Cell { MINGRU_CELLS(MINGRU_NAME) };

// Name of every mixture, and its cells, which have as many inputs and compute a half of the features each. Mixtures are
// numbered after the cells.
#define MINGRU_MIXTURES(MIXTURE) MIXTURE(mingru_mixed, mingru, mingru_quaternion)

// Of the candidate. Linear scans have none.
#define MINGRU_ACTIVATIONS(ACTIVATION) ACTIVATION(positive) ACTIVATION(linear) ACTIVATION(tanh)
enum class Activation { MINGRU_ACTIVATIONS(MINGRU_NAME) count };

// The tensors of a call: the fields of `Context` and `Layout` in src/mingru/ops/call.py. The first two are not optional.
enum class Argument { h, initial_state, reset, dt, recurrent, recurrent_bias, batch_sizes, lengths, count };

constexpr int most_inputs = 3;  // of a cell with lanes
// With the output gate, which comes after the inputs of the cell. An LSTM has none.
constexpr int most_parts = most_inputs + 1;
// A state of this size stays in the first-level cache while the inputs are read.
constexpr int64_t most_features = 512;
// Features are always computed in groups of this size, so that the split into tasks does not change the results.
constexpr int64_t group = 16;
// If time is split between threads, the number of steps between recorded states.
constexpr int64_t steps_per_checkpoint = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A sequence in memory, or a part of it. The features of a step are contiguous. Strides count elements.
struct Sequence {
  void* data = nullptr;
  int64_t batch_stride = 0, step_stride = 0;
  int64_t skipped = 0;  // number of elements of the sequence before `data`
  // Where each batch element begins, in units of batch_stride. Null: at its index.
  const int64_t* batch_offsets = nullptr;

  // Of the first feature of a step, whose position is its index in the dimension of time or in packed data.
  int64_t index(int64_t batch, int64_t position) const {
    return (batch_offsets ? batch_offsets[batch] : batch) * batch_stride + position * step_stride - skipped;
  }
};

// States are (B, N), in the accumulation dtype, with contiguous features.
struct Scan {
  Cell cell;
  Activation activation;
  Storage storage;
  int64_t num_batch, num_steps, num_features;
  int64_t state_stride;  // from one batch element to the next
  bool reverse, has_output_gate;
  // The packed index at which each step begins, null if the sequences are not packed, and the length of each sequence,
  // null if all have num_steps. Steps after the end of a sequence are neither read nor written.
  const int64_t* step_offsets;
  const int64_t* lengths;
  Sequence inputs[most_parts];
  // The rows of the linear map, of so many numbers, if the steps compute it.
  Sequence x;
  int64_t num_x;
  // (N), in the accumulation dtype. All are null if there is no bias.
  const void* biases[most_parts];
  Sequence out;  // the states
  // Of a forward pass that keeps what backward needs: of a GRU the sums of its candidates, of an LSTM the cells before the
  // steps. The inputs become gates and candidates. Null otherwise.
  Sequence sums;
  // Forward, with an output gate: the states times silu(gate). It may be `out`. Null without an output gate.
  Sequence gated;
  Sequence reset;  // uint8 or null; not bool, because a bool tensor that views bytes may contain other values
  // Only of cells that take time: the elapsed time of each step, in the accumulation dtype (null: 1), and log(m) and
  // log(1 - m) of the lower bound m of the decay. Both are 0 if there is none.
  Sequence dt;
  double log_bound, log_range;
  const void* h;
  const void* initial_state;  // state after a reset; if null, the state is 0
  void* last;
  // Backward only.
  Sequence grad_out;  // of `gated`, if there is an output gate
  Sequence grad_inputs[most_parts];
  const void* grad_last;
  void* grad_h;
  void* grad_initial_state;  // may be null
  // A number for each step and group of features, in the accumulation dtype, initially 0. May be null.
  Sequence grads_of_dt;

  bool is_reset(int64_t batch, int64_t position) const {
    return reset.data && static_cast<const uint8_t*>(reset.data)[reset.index(batch, position)];
  }
};

// A range of batch elements and a range of steps, both in the order of memory.
struct Part {
  int64_t batch_begin, batch_end, begin, end;
};

// Steps [begin, end) and features [feature, feature + num_features) of one batch element. If `checkpoints` is not null,
// the state is recorded there every `steps_per_checkpoint` steps; if `stop_at_match`, the run stops at an equal state.
struct Span {
  int64_t batch, feature, num_features, begin, end;
  void* checkpoints;
  bool stop_at_match;
};

// out = x weight^T + bias: x is (rows, features), whose rows are `x_stride` apart, weight (columns, features) and out
// (rows, columns), both contiguous, in float32 or float64. The bias may be null.
struct Product {
  Storage storage;
  const void *x, *weight, *bias;
  void* out;
  int64_t rows, columns, features, x_stride;
};

// Strides count elements.
struct Matrix {
  const float* data;
  int64_t row_stride, column_stride;
};

// out = left right + added. `added` has a row for each row of out, or one row for all, if its stride is 0, or is null. It
// may be out. The values of a row are next to each other in both, and in the rows or the columns of `right`.
struct MatrixProduct {
  Matrix left, right;
  const float* added;
  float* out;
  int64_t added_stride, out_stride, rows, columns, depth;
};
// The right matrix is copied into panels of so many columns, of which only the last has fewer. A tile of the result has so
// many rows, and sums so many products in registers.
constexpr int64_t panel_columns = 64, tile_rows = 6, tile_depth = 256;

// Contiguous rows scale * x with scale = 1 / sqrt(mean(x^2) + eps), or with the mean subtracted from x before, and the
// scales, in the accumulation dtype. Backward, x has the normalized rows, and `out` their gradients, which are replaced by
// those of the rows.
struct Normalization {
  Storage storage;
  bool is_centered;
  double eps;
  const void* x;
  void *out, *scales;
  int64_t rows, features;
};

// Rows of `columns` values each, which are added to `total`, in the accumulation dtype.
struct RowSum {
  Storage storage;
  const void* rows;
  int64_t num_rows, columns;
  void* total;
};

// The causal depthwise convolution out_t = bias + sum_k weight_k x_{t-k}, and x_t if it `adds_x`. x is the first input of
// the scan, and h the K - 1 inputs before the first step, (B, K - 1, N). Inputs from before a reset count as 0. All
// numbers are float32 or float64.
struct Convolution {
  // A task has so many rows: the steps of all batch elements, and before those of each the K - 1 steps of the state.
  static constexpr int64_t task_rows = 64;
  const Scan& scan;
  int64_t kernel_size;
  bool adds_x;
  const void *weight, *bias, *zeros;  // (K, N), (N) and (N); backward, there is no bias
  void* sums;  // backward only: parts of the gradients of weight and bias, (tasks, K + 1, N)

  int64_t num_rows() const { return scan.num_batch * (scan.num_steps + kernel_size - 1); }
  int64_t num_tasks() const { return ceil_div(num_rows(), task_rows); }
};

// out = rows weights, or added to it, or the sum of two such products. Of `num_blocks` blocks of `num_rows` rows of bfloat16,
// and of `num_vectors` vectors of 16 columns in tiles. `row_stride` counts bytes, and `depth` tiles of 32.
struct TileProduct {
  struct Factors {
    const void *rows, *weights;
    int64_t row_stride, depth;
  };
  Factors first, second;  // the second may have no depth
  float* out;
  int64_t out_stride, num_rows, num_blocks, num_vectors;
  bool is_added;
};

// What multiplies in tiles: AMX, its emulation, or AVX512-BF16. A thread configures tiles of so many rows first.
struct Tiles {
  void (*configure)(int64_t rows);
  void (*release)();
  void (*multiply)(const TileProduct&);
};

// The recurrent weights U of an LSTM or a GRU: `count` diagonal blocks of `size`, or in whole groups of `padded`, as
// recurrent_weights.h packs them: r = sigma(x_r + U_r h), z = sigma(x_z + U_z h) and
// h_t = (1 - z) tanh(x_c + r (U_c h + bias)) + z h, with h = h_{t-1}. All are in the accumulation dtype.
struct DiagonalBlocks {
  // From so many features on, threads share each step of all batch elements, and backward the totals.
  static constexpr int64_t least_wide = 192;
  // For threads, the batch elements of a part are divided into at most so many groups, each with totals of its own. It is
  // constant, so that sums do not depend on the number of threads.
  static constexpr int64_t most_totals = 8;
  static constexpr int64_t most_together = 64;
  int64_t num_gates, size, count, padded;
  // Null if operands of products are not rounded to bfloat16.
  const Tiles* tiles;
  // As the caller has them, and packed. A call of few steps may have those of the caller only.
  const void *given, *weights, *transposed, *biases;
  // Of a forward pass in tiles that computes the linear map of x too: its weights, packed, and its biases, (gates, padded)
  // of each block. Null if the inputs of the cell are given.
  const void *input_weights, *input_biases;
  // Backward only: the gradients of weights and biases, (totals, count, num_gates padded + 1, padded). Null if not needed.
  void* totals;
  // Calls f with ranges of [0, count). Null: the caller calls it with all.
  void (*parallel_for)(
      int64_t count, int64_t multiplications, void (*f)(const void*, int64_t, int64_t), const void* given);

  bool is_wide() const { return size >= least_wide; }
  int64_t per_group() const { return tiles ? 16 : 4; }
  int64_t num_totals(int64_t batch) const {
    const int64_t most = ceil_div(batch, per_group());
    return is_wide() ? 1 : most < most_totals ? most : most_totals;
  }
  int64_t values_of_total() const { return (num_gates * padded + 1) * padded; }
  // How many batch elements are computed together, and backward how many rows of gradients.
  int64_t sequences_together() const { return is_wide() || tiles ? most_together : 8; }
  int64_t rows_together() const { return tiles ? 256 : is_wide() ? 128 : 64; }
};

// The weights of the linear map before a GRU or an LSTM, (num_gates N, num_x), in bfloat16 or float32.
struct InputWeights {
  Storage storage;
  const void* data;
  int64_t num_x;
};

// The kernels of an instruction set, for one accumulation dtype.
struct Kernels {
  // Reads and writes `state`. Returns whether the run stopped at a match.
  bool (*run_span)(const Scan&, const Span&, void* state, bool is_backward);
  // Computes a range of columns.
  void (*multiply_few_rows)(const Product&, int64_t begin, int64_t end);
  // Computes a range of rows.
  void (*normalize)(const Normalization&, int64_t begin, int64_t end, bool is_backward);
  // Computes a task.
  void (*convolve)(const Convolution&, int64_t task, bool is_backward);
  // Adds a range of columns, which begins at a multiple of `group`.
  void (*add_rows)(const RowSum&, int64_t begin, int64_t end);
  // Runs a diagonal block of some batch elements. Backward, adds the gradients of weights and biases to the totals, if there are some.
  void (*run_diagonal_block)(
      const Scan&, const DiagonalBlocks&, const Part&, int64_t block, int64_t begin, int64_t end, bool is_backward,
      void* totals);
  // Copies the weights of a diagonal block.
  void (*pack_diagonal_block)(const DiagonalBlocks&, void* packed, int64_t block, bool is_transposed);
  // Copies a panel of the right matrix, and computes a range of rows of a panel's columns, in float32. Null without
  // AVX-512.
  void (*pack_panel)(const MatrixProduct&, float* to, int64_t panel) = nullptr;
  void (*multiply_panel)(const MatrixProduct&, const float* panel, int64_t index, int64_t begin, int64_t end) = nullptr;
  // The same of the linear map, if the steps compute it. Null in float64.
  void (*pack_input_weights)(const InputWeights&, const DiagonalBlocks&, void* packed, int64_t block) = nullptr;
  // Products of bfloat16, in float32: by tiles of AMX, by pairs of AVX512-BF16, or in C++. Null where they cannot be.
  const Tiles *amx = nullptr, *pairs = nullptr, *emulated = nullptr;
};

}  // namespace mingru
