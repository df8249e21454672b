// The __global__ function of a kernel made of CUTLASS' parts, for linear.cuh and attention.cuh.
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
  __trap();  // reached only if this was compiled for sm_90 instead of sm_90a, because launchers refuse other devices
#endif
}

// The kernel, with its limit of dynamic shared memory raised to what it needs.
template <typename Kernel>
auto prepared() {
  static_assert(Kernel::SharedStorageSize <= 227 << 10, "more shared memory than a block can have");
  void (*kernel)(typename Kernel::Params) = cutlass_kernel<Kernel>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize));
  return kernel;
}

}  // namespace dinov2_fast
