// What the kernels share: chunks of 8 elements in 16-byte accesses, reductions over a warp, the choice of a type by its
// name, and launches that check their error. Statistics and sums are in fp32, offsets in 64 bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#ifdef DINOV2_FAST_ON_HOST
#include "cuda_on_host.h"  // of the tests: runs kernels on the CPU
#else
#include <cuda_runtime.h>
#endif

#include <cstring>
#include <type_traits>

#include "math.cuh"
#include "ops.h"

namespace dinov2_fast {

constexpr int WARP = 32;
constexpr int WIDTH = 8;  // elements of a chunk

// Two neighbouring elements of a type, and the steps from and to fp32.
template <typename T>
struct Pair;

template <>
struct Pair<float> {
  using Type = float2;
  static __device__ float2 unpack(float2 pair) { return pair; }
  static __device__ float2 pack(float a, float b) { return make_float2(a, b); }
};

template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ float2 unpack(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
  static __device__ __nv_bfloat162 pack(float a, float b) { return __floats2bfloat162_rn(a, b); }
};

template <>
struct Pair<__half> {
  using Type = __half2;
  static __device__ float2 unpack(__half2 pair) { return __half22float2(pair); }
  static __device__ __half2 pack(float a, float b) { return __floats2half2_rn(a, b); }
};

template <>
struct Pair<__nv_fp8_e4m3> {  // only written
  using Type = __nv_fp8x2_storage_t;
  static __device__ __nv_fp8x2_storage_t pack(float a, float b) { return to_e4m3(a, b); }
};

// Of plain words: the classes of half precision have copy constructors, which would split an access into pairs.
template <typename T>
struct Chunk {
  using Access = std::conditional_t<sizeof(T) == 1, uint2, uint4>;
  static constexpr int ACCESSES = sizeof(T) * WIDTH / sizeof(Access);
  Access words[ACCESSES];
};

template <typename T>
__device__ __forceinline__ Chunk<T> read(const T* from) {
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < chunk.ACCESSES; ++i) {
    chunk.words[i] = reinterpret_cast<const typename Chunk<T>::Access*>(from)[i];
  }
  return chunk;
}

template <typename T>
__device__ __forceinline__ void write(T* to, const Chunk<T>& chunk) {
#pragma unroll
  for (int i = 0; i < chunk.ACCESSES; ++i) reinterpret_cast<typename Chunk<T>::Access*>(to)[i] = chunk.words[i];
}

template <typename T>
__device__ __forceinline__ void unpack(const Chunk<T>& chunk, float (&to)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) {
    typename Pair<T>::Type pair;
    memcpy(static_cast<void*>(&pair), reinterpret_cast<const char*>(chunk.words) + i * sizeof(pair), sizeof(pair));
    const float2 numbers = Pair<T>::unpack(pair);
    to[2 * i] = numbers.x;
    to[2 * i + 1] = numbers.y;
  }
}

template <typename T>
__device__ __forceinline__ Chunk<T> pack(const float (&from)[WIDTH]) {
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) {
    const auto pair = Pair<T>::pack(from[2 * i], from[2 * i + 1]);
    memcpy(reinterpret_cast<char*>(chunk.words) + i * sizeof(pair), static_cast<const void*>(&pair), sizeof(pair));
  }
  return chunk;
}

template <typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[WIDTH]) {
  unpack(read(from), to);
}

template <typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[WIDTH]) {
  write(to, pack<T>(from));
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = WARP / 2; lanes; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = WARP / 2; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

// Adds up what the threads below one another in a block hold of a chunk, always in the same order, and writes it at
// `to` where it is `inside`. All threads take part; `scratch` holds a chunk for each.
__device__ __forceinline__ void write_block_sum(const float (&own)[WIDTH], float* to, bool inside, float* scratch) {
  const int size = blockDim.x * WIDTH, at = threadIdx.x * WIDTH;
  __syncthreads();  // what the last call left in scratch has been read
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) scratch[threadIdx.y * size + at + i] = own[i];
  __syncthreads();
  if (threadIdx.y || !inside) return;
  float sum[WIDTH] = {};
  for (int row = 0; row < static_cast<int>(blockDim.y); ++row) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sum[i] += scratch[row * size + at + i];
  }
  store(to, sum);
}

// Host code

template <typename T>
struct Type {
  using type = T;
};

// Calls `function` with the Type of a floating-point dtype.
template <typename Function>
void with_float(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::bf16:
      return function(Type<__nv_bfloat16>{});
    case Dtype::fp16:
      return function(Type<__half>{});
    case Dtype::fp32:
      return function(Type<float>{});
    default:
      fail("there is no kernel for ", name(dtype));
  }
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline dim3 grid_of(int64_t x, int64_t y = 1) {
  if (x > INT32_MAX || y > UINT16_MAX) fail("a grid of ", x, " x ", y, " blocks is larger than CUDA takes");
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

#ifndef DINOV2_FAST_ON_HOST
inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream stream, const Arguments&... arguments) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check_cuda(cudaGetLastError());
}
#endif

}  // namespace dinov2_fast
