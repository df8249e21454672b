// x @ weight^T + bias with what follows it, for sm_90: the launcher. The kernels are in linear.cuh, what they do with
// the product in epilogue.cuh, which tile they take in linear_tiles.h.
#include "common.cuh"
#include "linear.h"

namespace dinov2_fast {
namespace {

#ifdef DINOV2_FAST_ON_HOST
int multiprocessors_of(int) { return 2; }
#else
int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

int multiprocessors_of(int device) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) fail("the kernels of linear are for sm_90 only, got sm_", major, minor);
  return attribute(cudaDevAttrMultiProcessorCount, device);
}
#endif

}  // namespace

void linear_forward(const LinearForward& args, void* stream) {
  check_linear(args);
  const Dtype operand = args.x.dtype;
  const int multiprocessors = multiprocessors_of(args.x.device);
  if (args.x.rows() == 0) return;
  const int tile = choose_tile(args.x.rows(), args.weight.rows(), args.form, multiprocessors);
  if (operand == Dtype::bf16) return launch_linear<Dtype::bf16>(args, tile, multiprocessors, stream);
  if (operand == Dtype::fp16) return launch_linear<Dtype::fp16>(args, tile, multiprocessors, stream);
  launch_linear<Dtype::e4m3>(args, tile, multiprocessors, stream);
}

}  // namespace dinov2_fast
