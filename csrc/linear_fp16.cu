// The kernels of linear.cu for fp16 operands. They have their own file because they take minutes to compile.
#include "linear.cuh"

namespace dinov2_fast {

template void launch_linear<Dtype::fp16>(const LinearForward&, int, int, void*);

}  // namespace dinov2_fast
