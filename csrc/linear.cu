// The launcher of linear: x @ weight^T + bias with an epilogue, for sm_90. The kernels are in linear.cuh, their
// epilogue is in epilogue.cuh, and the choice of a tile in linear_tiles.h.
#include "common.cuh"
#include "linear.h"

namespace dinov2_fast {
void linear_forward(const LinearForward& args, void* stream) {
  check_linear(args);
  const Dtype operand = args.x.dtype;
  const int multiprocessors = multiprocessors_of(args.x.device, "linear");
  if (args.x.rows() == 0) return;
  const int tile = choose_tile(args.x.rows(), args.weight.rows(), args.form, multiprocessors);
  if (operand == Dtype::bf16) return launch_linear<Dtype::bf16>(args, tile, multiprocessors, stream);
  if (operand == Dtype::fp16) return launch_linear<Dtype::fp16>(args, tile, multiprocessors, stream);
  launch_linear<Dtype::e4m3>(args, tile, multiprocessors, stream);
}

}  // namespace dinov2_fast
