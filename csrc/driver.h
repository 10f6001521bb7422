#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>

#include "scan.h"

#ifdef MINGRU_X86
#include <xmmintrin.h>
#endif

namespace mingru {

// Sets what a thread does with numbers below the smallest normal one, until its end. On x86 such a number costs some 150
// cycles, elsewhere none. Backward passes take 0 for it: gradients decay over time to such numbers, so that a training step
// whose loss reads only the last of 200 time steps took 15 times as long.
class Subnormals {
 public:
#ifdef MINGRU_X86
  static unsigned mode() { return _mm_getcsr(); }
  static void set(unsigned mode) { _mm_setcsr(mode); }
#else
  static unsigned mode() { return 0; }
  static void set(unsigned) {}
#endif
  static constexpr unsigned none = 0x8040;
  explicit Subnormals(unsigned mode) : before_(Subnormals::mode()) { set(mode); }
  ~Subnormals() { set(before_); }

 private:
  const unsigned before_;
};

// Calls f with ranges of the numbers below `count`, on torch's threads, in the caller's mode.
template <class F>
void on_threads(int64_t count, int64_t least, const F& f) {
  torch::stable::parallel_for(0, count, least, [&, mode = Subnormals::mode()](int64_t begin, int64_t end) {
    const Subnormals same(mode);
    f(begin, end);
  });
}

// With fewer values, a thread costs more time than it saves.
constexpr int64_t values_per_thread = 16384;

// Calls f with each number below `count`, on several threads if there are enough values, so many for each number.
template <class F>
void for_each(int64_t count, int64_t values, const F& f) {
  on_threads(count, ceil_div(values_per_thread, values), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Runs a part of a scan, or of its backward pass, on torch's thread pool. Parts must be run in the order of the scan,
// because each part continues from the state of the previous part.
void run_scan(const Scan& scan, const Part& part, bool backward);

// The same for a GRU or an LSTM.
void run_diagonal_blocks(const Scan& scan, const DiagonalBlocks& blocks, const Part& part, bool backward);
// The `parallel_for` of wide diagonal blocks.
void share_wide_block(
    int64_t count, int64_t multiplications, void (*f)(const void*, int64_t, int64_t), const void* given);
// What multiplies bfloat16 here, or null.
const Tiles* tiles_in_use();
// Copies the weights of all diagonal blocks as the kernels read them.
void pack_diagonal_blocks(const DiagonalBlocks& blocks, Storage storage, void* packed, bool is_transposed);
void pack_input_weights(const InputWeights& weights, const DiagonalBlocks& blocks, void* packed);

// With more rows, torch's product is faster.
constexpr int64_t most_few_rows = 8;
// Computes a product whose rows are at most `most_few_rows`.
void multiply_few_rows(const Product& product);

// Whether this processor multiplies float32 matrices in tiles, unless they are small, because torch's product takes longer.
bool multiplies_in_tiles();
// With fewer rows, torch's product is faster.
constexpr int64_t least_tiled_rows = 32;
bool is_faster_in_tiles(const MatrixProduct& product);
// The floats of the memory that a product in tiles needs.
constexpr int64_t most_packed = 1 << 18;
void multiply_in_tiles(const MatrixProduct& product, float* packed);

void add_rows(const RowSum& sum);

void normalize(const Normalization& of, bool is_backward);

void convolve(const Convolution& of, bool is_backward);

// The names of the instruction sets that this library and this processor have, the fastest last: "baseline", or "avx2",
// "avx512", "avx512_bf16" and "amx", and first "emulated", of AMX, and on an Intel "avx512_bf16". The environment variable
// MINGRU_ISA chooses one.
std::string instruction_sets();
// The text that says from which sources the library was built.
extern char built_from[];

}  // namespace mingru
