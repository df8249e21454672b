// The kernel of attention.cu for bf16 operands. It has its own file because it takes long to compile.
#include "attention.cuh"

namespace dinov2_fast {

template void launch_attention<Dtype::bf16>(const AttentionForward&, int, void*);

}  // namespace dinov2_fast
