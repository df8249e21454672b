// The kernels of attention.cu: the forward pass of CUTLASS' attention example for Hopper (TMA loads, wgmma, softmax in
// registers, a persistent grid) with the epilogue of attention_epilogue.cuh. They are empty for other architectures.
// Each attention_<dtype>.cu compiles the kernel for operands of that dtype. Source: Shah et al., arXiv:2407.08608.
//
// One warp group loads. Each of the others computes 64 queries, and they share the keys and values. TMA reads zeros for
// keys beyond the last token, and MaskedKeys sets their scores to -inf in the last tile.
#pragma once

#include <cutlass/cutlass.h>

#include <collective/fmha_collective_tma_warpspecialized.hpp>
#include <collective/fmha_fusion.hpp>
#include <cute/tensor.hpp>
#include <kernel/fmha_kernel_tma_warpspecialized.hpp>
#include <kernel/fmha_tile_scheduler.hpp>
#include <type_traits>

#include "attention.h"
#include "attention_epilogue.cuh"
#include "cutlass_kernel.cuh"

namespace dinov2_fast {

// The epilogue of attention_epilogue.cuh with the interface of the example's epilogues. It reads nothing from memory
// and uses no shared memory.
template <Dtype OPERAND>
class AttentionEpilogue {
 public:
  using Arguments = AttentionResult;
  using Params = AttentionResult;
  using LoadPipeline = cutlass::PipelineTransactionAsync<0>;
  using PipelineStorage = typename LoadPipeline::SharedStorage;
  struct TensorStorage {};
  static constexpr int TmaTransactionBytes = 0;

  template <typename Shape>
  static Params to_underlying_arguments(const Shape&, const Arguments& args, void*) {
    return args;
  }

  template <typename Tile, typename Coordinates, typename Result, typename TiledMma, typename Shape>
  __device__ void operator()(const Tile&, const Coordinates& at, const Result& result, const TiledMma&, const Shape&,
                             const Params& params, const LoadPipeline&, TensorStorage&) {
    using namespace cute;
    using Sums = tuple_element_t<0, Result>;
    static_assert(std::is_same_v<typename TiledMma::AtomLayoutC_TV, SM90::GMMA::CLayout_64xN<HEAD_DIM>>,
                  "write_queries expects the sums of one wgmma as wide as a head");
    static_assert(
        std::is_same_v<typename Sums::layout_type,
                       decltype(make_layout(make_shape(make_shape(_2{}, _2{}, Int<HEAD_DIM / WIDTH>{}), _1{}, _1{})))>,
        "write_queries expects the sums in this order");
    const int thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    write_queries<OPERAND>(get<0>(result), get<1>(result), thread, int64_t(get<0>(at)) * 64, get<2, 0>(at),
                           get<2, 1>(at), params);
  }
};

// Masks the last tile of keys only. The example also masks the first tile, which costs a quarter of a tile's
// instructions, and 257 tokens are only three tiles.
struct MaskedKeys : cutlass::fmha::collective::ResidualFusion {
  template <typename Scores, typename Places, typename Shape>
  __device__ void before_softmax(Scores& scores, const Places& places, const Shape& shape) {
    const int last_key =
        cute::get<1>(places(cute::size(scores) - 1)) | 7;  // of the tile, because 4 lanes share 8 columns
    if (last_key >= cute::get<3>(shape)) ResidualFusion::before_softmax(scores, places, shape);
  }
};

template <Dtype OPERAND>
struct Attention {
  using Element = std::conditional_t<OPERAND == Dtype::fp16, cutlass::half_t, cutlass::bfloat16_t>;
  using Stride = cute::Stride<int64_t, cute::_1, cute::Stride<int64_t, int64_t>>;  // token, element, (image, head)
  using Tile = cute::Shape<cute::Int<QUERIES>, cute::Int<KEYS>, cute::Int<HEAD_DIM>>;

  template <cutlass::fmha::kernel::Tag TAG, typename Value>
  using Option = cutlass::fmha::kernel::Option<TAG, Value>;
  using Tag = cutlass::fmha::kernel::Tag;
  template <template <typename...> typename Template, typename... Types>
  using WithOptions =
      Template<Types..., Option<Tag::kIsPersistent, cute::true_type>, Option<Tag::kLoadsQSeparately, cute::true_type>,
               Option<Tag::kNumMmaWarpGroups, cute::Int<QUERIES / 64>>,
               Option<Tag::kStagesKV, cute::Int<6>>>;  // a stage is a tile of keys or of values: three of each

  using Mainloop = WithOptions<cutlass::fmha::collective::FmhaMainloopTmaWarpSpecialized, Element, float, float, Tile,
                               Stride, Stride, Stride, MaskedKeys>;
  using Kernel = WithOptions<cutlass::fmha::kernel::FmhaKernelTmaWarpSpecialized, Mainloop, AttentionEpilogue<OPERAND>,
                             cutlass::fmha::kernel::PersistentTileScheduler>;
};

template <Dtype OPERAND>
void launch_attention(const AttentionForward& args, int multiprocessors, void* stream) {
  using Kernel = typename Attention<OPERAND>::Kernel;
  using Element = typename Attention<OPERAND>::Element;
  using Stride = typename Attention<OPERAND>::Stride;
  const AttentionLayout layout = layout_of(args.qkv);
  const int tokens = static_cast<int>(layout.tokens);
  const Stride stride{layout.stride_token, {}, {layout.stride_batch, layout.stride_head}};
  const Element* queries = pointer<Element>(args.qkv);
  const Element* keys = queries + layout.offset(0, 0, 1, 0);
  const Element* values = queries + layout.offset(0, 0, 2, 0);
  const typename Kernel::Arguments arguments{
      {static_cast<int>(layout.batch), static_cast<int>(layout.heads), tokens, tokens, HEAD_DIM},
      {queries, stride, keys, stride, values, stride},
      result_of(args),
      {args.qkv.device, multiprocessors}};
  // The example's can_implement is not called: it requires a length that is a multiple of 8, for the stores of its own
  // epilogue.
  const typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);
  const auto kernel = prepared<Kernel>();
  kernel<<<Kernel::get_grid_shape(params), Kernel::get_block_shape(), Kernel::SharedStorageSize,
           static_cast<cudaStream_t>(stream)>>>(params);
  check_cuda(cudaGetLastError());
}

}  // namespace dinov2_fast
