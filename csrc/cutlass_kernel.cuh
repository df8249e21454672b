// How a kernel made of CUTLASS' parts gets onto the device, for linear.cuh and attention.cuh.
#pragma once

#include "common.cuh"

namespace dinov2_fast {

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::MaxThreadsPerBlock, Kernel::MinBlocksPerMultiprocessor)
    cutlass_kernel(const __grid_constant__ typename Kernel::Params params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char shared[];
  Kernel()(params, shared);
#else
  __trap();  // the launchers run this on sm_90 only, so it was compiled for sm_90 without the a
#endif
}

// The kernel, which may then have the shared memory that it needs.
template <typename Kernel>
auto prepared() {
  static_assert(Kernel::SharedStorageSize <= 227 << 10, "more shared memory than a block can have");
  void (*kernel)(typename Kernel::Params) = cutlass_kernel<Kernel>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize));
  return kernel;
}

}  // namespace dinov2_fast
