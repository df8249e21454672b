// The launches of csrc/linear.cu for the CPU. Plain loops compute the sums, in the order in which wgmma would leave
// them. The epilogue, the checks and the choice of a tile are those of the GPU.
#include "common.cuh"
#include "epilogue.cuh"
#include "linear.h"

namespace dinov2_fast {
namespace {

float element(const Tensor& matrix, int64_t row, int64_t column) {
  const int64_t at = row * matrix.row_stride() + column;
  if (matrix.dtype == Dtype::bf16) return __bfloat162float(pointer<__nv_bfloat16>(matrix)[at]);
  if (matrix.dtype == Dtype::fp16) return __half2float(pointer<__half>(matrix)[at]);
  return static_cast<float>(pointer<__nv_fp8_e4m3>(matrix)[at]);
}

float product(const LinearForward& args, int64_t row, int64_t column) {
  if (row >= args.x.rows() || column >= args.weight.rows()) return 0.0f;
  float sum = 0.0f;
  for (int64_t k = 0; k < args.x.columns(); ++k) sum += element(args.x, row, k) * element(args.weight, column, k);
  return sum;
}

template <Form FORM, Dtype OPERAND, int TILE>
void linear_forward_kernel(const LinearForward* args) {
  constexpr int ROWS = TILES[TILE].rows, COLUMNS = TILES[TILE].columns, THREADS = TILES[TILE].pingpong ? 128 : 256;
  const int thread = threadIdx.x, lane = thread % WARP;
  const int64_t tile_row = int64_t(blockIdx.x) * ROWS, tile_column = int64_t(blockIdx.y) * COLUMNS;
  float sums[ROWS * COLUMNS / THREADS];
  int i = 0;
  for (int row = tile_row + thread / WARP * 16 + lane / 4; row < tile_row + ROWS; row += THREADS / 2) {
    for (int column = tile_column + lane % 4 * 2; column < tile_column + COLUMNS; column += 8) {
      for (int below : {0, 8}) {
        for (int side : {0, 1}) sums[i++] = product(*args, row + below, column + side);
      }
    }
  }
  const auto accumulators = [&](int i) { return sums[i]; };
  write_tile<FORM, OPERAND, ROWS, COLUMNS, THREADS>(accumulators, thread, tile_row, tile_column, epilogue_of(*args));
}

template <Form FORM, Dtype OPERAND, int TILE = 0>
void launch_tile(const LinearForward& args, int tile) {
  if constexpr (TILE < NUM_TILES) {
    if constexpr (serves(TILES[TILE], FORM)) {
      const dim3 grid(tiles_in(args.x.rows(), TILES[TILE].rows), tiles_in(args.weight.rows(), TILES[TILE].columns));
      const dim3 block(TILES[TILE].pingpong ? 128 : 256);
      if (tile == TILE) return launch(linear_forward_kernel<FORM, OPERAND, TILE>, grid, block, nullptr, &args);
    }
    launch_tile<FORM, OPERAND, TILE + 1>(args, tile);
  }
}

}  // namespace

template <Dtype OPERAND>
void launch_linear(const LinearForward& args, int tile, int, void*) {
  if (args.form == Form::none) launch_tile<Form::none, OPERAND>(args, tile);
  if (args.form == Form::gelu) launch_tile<Form::gelu, OPERAND>(args, tile);
  if (args.form == Form::swiglu) launch_tile<Form::swiglu, OPERAND>(args, tile);
  if (args.form == Form::residual) launch_tile<Form::residual, OPERAND>(args, tile);
}

template void launch_linear<Dtype::bf16>(const LinearForward&, int, int, void*);
template void launch_linear<Dtype::fp16>(const LinearForward&, int, int, void*);
template void launch_linear<Dtype::e4m3>(const LinearForward&, int, int, void*);

}  // namespace dinov2_fast

// For tests/ops/test_linear_cuda.py
extern "C" const dinov2_fast::Tile* dinov2_fast_choose_tile(int64_t rows, int64_t out_features, int form,
                                                            int multiprocessors) {
  using namespace dinov2_fast;
  return &TILES[choose_tile(rows, out_features, static_cast<Form>(form), multiprocessors)];
}
