// The kernels of linear.cu: CUTLASS' warp-specialised GEMM for sm_90a (TMA loads, wgmma, a persistent grid) with the
// epilogue of epilogue.cuh. They are empty for other architectures. Each linear_<dtype>.cu compiles the kernels for
// operands of that dtype.
//
// e4m3: the tensor cores add up all products, with fewer bits than fp32 has (fast accumulation; ops/linear.py gives the
// error). The alternative in CUTLASS adds every 128 products to a second set of accumulators, and the larger tiles have
// no registers for it.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <type_traits>

#include "cutlass_kernel.cuh"
#include "epilogue.cuh"

namespace dinov2_fast {

template <Dtype OPERAND>
using CutlassType =
    std::conditional_t<OPERAND == Dtype::e4m3, cutlass::float_e4m3_t,
                       std::conditional_t<OPERAND == Dtype::fp16, cutlass::half_t, cutlass::bfloat16_t>>;

// epilogue.cuh with the interface of CUTLASS' epilogues. That also requires the types of two matrices that are not
// used.
template <Form FORM, Dtype OPERAND, int TILE>
class LinearEpilogue {
 public:
  using ElementC = float;
  using ElementD = float;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;
  using Arguments = EpilogueArguments;
  using Params = EpilogueArguments;
  struct SharedStorage {};

  template <typename Shape>
  static Params to_underlying_arguments(const Shape&, const Arguments& args, void*) {
    return args;
  }

  template <typename Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }

  __host__ __device__ explicit LinearEpilogue(const Params& params) : params_(params) {}

  template <typename Shape, typename Block, typename Coordinates, typename Accumulators, typename TiledMma,
            typename Residue>
  __device__ void operator()(const Shape&, const Block&, const Coordinates& tile, const Accumulators& accumulators,
                             const TiledMma&, const Residue&, int thread, char*) {
    using namespace cute;
    constexpr int ROWS = TILES[TILE].rows, COLUMNS = TILES[TILE].columns, THREADS = decltype(size(TiledMma{}))::value;
    constexpr int SLICES = 2 * ROWS / THREADS;
    static_assert(std::is_same_v<typename TiledMma::AtomLayoutC_TV, SM90::GMMA::CLayout_64xN<COLUMNS>>,
                  "epilogue.cuh expects the accumulators of one wgmma as wide as the tile");
    static_assert(std::is_same_v<typename Accumulators::layout_type,
                                 decltype(make_layout(
                                     make_shape(make_shape(_2{}, _2{}, Int<COLUMNS / WIDTH>{}), Int<SLICES>{}, _1{})))>,
                  "epilogue.cuh expects the accumulators in this order");
    write_tile<FORM, OPERAND, ROWS, COLUMNS, THREADS>(accumulators, thread, int64_t(get<0>(tile)) * ROWS,
                                                      int64_t(get<1>(tile)) * COLUMNS, params_);
  }

 private:
  Params params_;
};

template <Form FORM, Dtype OPERAND, int TILE>
struct LinearGemm {
  using Element = CutlassType<OPERAND>;
  static constexpr int ALIGNMENT = 16 / sizeof(Element), STEP = 128 / sizeof(Element);
  // Two blocks, one below the other, read the weight once, by multicast.
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  static constexpr bool E4M3 = OPERAND == Dtype::e4m3;
  using Pingpong = std::conditional_t<E4M3, cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum,
                                      cutlass::gemm::KernelTmaWarpSpecializedPingpong>;
  using Cooperative = std::conditional_t<E4M3, cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum,
                                         cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
  using Epilogue =
      cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<LinearEpilogue<FORM, OPERAND, TILE>>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp,  //
      Element, cutlass::layout::RowMajor, ALIGNMENT,        // x
      Element, cutlass::layout::ColumnMajor, ALIGNMENT,     // weight, transposed
      float,                                                // sums
      cute::Shape<cute::Int<TILES[TILE].rows>, cute::Int<TILES[TILE].columns>, cute::Int<STEP>>, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
      std::conditional_t<TILES[TILE].pingpong, Pingpong, Cooperative>>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
};

template <Form FORM, Dtype OPERAND, int TILE>
void launch_kernel(const LinearForward& args, int multiprocessors, cudaStream_t stream) {
  using Kernel = typename LinearGemm<FORM, OPERAND, TILE>::Kernel;
  using Element = CutlassType<OPERAND>;
  const Tensor &x = args.x, &weight = args.weight;
  const typename Kernel::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {int(x.rows()), int(weight.rows()), int(x.columns()), 1},
      {pointer<Element>(x), {x.row_stride(), {}, 0}, pointer<Element>(weight), {weight.row_stride(), {}, 0}},
      epilogue_of(args),
      {x.device, multiprocessors}};
  const typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);

  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = Kernel::get_grid_shape(params);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, prepared<Kernel>(), params));
}

// Launches the kernel with TILES[tile], where tile >= TILE.
template <Form FORM, Dtype OPERAND, int TILE = 0>
void launch_tile(const LinearForward& args, int tile, int multiprocessors, cudaStream_t stream) {
  if constexpr (TILE < NUM_TILES) {
    if constexpr (serves(TILES[TILE], FORM)) {
      if (tile == TILE) return launch_kernel<FORM, OPERAND, TILE>(args, multiprocessors, stream);
    }
    launch_tile<FORM, OPERAND, TILE + 1>(args, tile, multiprocessors, stream);
  }
}

template <Dtype OPERAND>
void launch_linear(const LinearForward& args, int tile, int multiprocessors, void* stream) {
  const auto launch = [&](auto form) {
    launch_tile<form(), OPERAND>(args, tile, multiprocessors, static_cast<cudaStream_t>(stream));
  };
  switch (args.form) {
    case Form::none:
      if constexpr (OPERAND == Dtype::e4m3) launch(std::integral_constant<Form, Form::none>{});
      break;
    case Form::gelu:
      return launch(std::integral_constant<Form, Form::gelu>{});
    case Form::swiglu:
      return launch(std::integral_constant<Form, Form::swiglu>{});
    case Form::residual:
      return launch(std::integral_constant<Form, Form::residual>{});
  }
}

}  // namespace dinov2_fast
