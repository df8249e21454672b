// The kernels of linear.cu for e4m3 operands. They have their own file because they take minutes to compile.
#include "linear.cuh"

namespace dinov2_fast {

template void launch_linear<Dtype::e4m3>(const LinearForward&, int, int, void*);

}  // namespace dinov2_fast
