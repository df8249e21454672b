// What the kernels share: chunks of 8 elements, which are read and written in accesses of 16 bytes (e4m3: 8), and the
// exchange between 4 lanes. What the launchers share: calls of the CUDA runtime.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#ifdef DINOV2_FAST_ON_HOST
#include "cuda_on_host.h"  // in tests/: runs kernels on the CPU
#else
#include <cuda_runtime.h>
#endif

#include <cstring>
#include <type_traits>

#include "checks.h"
#include "math.cuh"

namespace dinov2_fast {

constexpr int WARP = 32;
constexpr int WIDTH = 8;  // elements of a chunk

// Two neighbouring elements of a type, and their conversion from and to fp32.
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
struct Pair<__nv_fp8_e4m3> {  // written, never read
  using Type = __nv_fp8x2_storage_t;
  static __device__ __nv_fp8x2_storage_t pack(float a, float b) { return to_e4m3(a, b); }
};

// WIDTH elements as plain words. The half-precision classes have copy constructors, which would split an access into
// pairs.
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

// A store that the compiler does not split. It splits some plain stores, and then spills registers.
template <typename T>
__device__ __forceinline__ void store_at_once(T* to, const Chunk<T>& chunk) {
#ifdef __CUDA_ARCH__
#pragma unroll
  for (int i = 0; i < chunk.ACCESSES; ++i) {
    __stwb(reinterpret_cast<typename Chunk<T>::Access*>(to) + i, chunk.words[i]);
  }
#else
  write(to, chunk);
#endif
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

// Transposes the 4 x 4 words of 4 neighbouring lanes (a quad): x[i] of lane j becomes x[j] of lane i.
template <typename Word>
__device__ __forceinline__ void transpose_in_quad(Word (&x)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const Word received = __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + bit], bit);
      x[i] = upper ? received : x[i];
      x[i + bit] = upper ? x[i + bit] : received;
    }
  }
}

// Host code

template <typename T>
struct Type {
  using type = T;
};

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data);
}

#ifdef DINOV2_FAST_ON_HOST
inline int multiprocessors_of(int, const char*) { return 2; }
#else
inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// The number of multiprocessors of a device. Fails if the device cannot run the kernels of `op`.
inline int multiprocessors_of(int device, const char* op) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) fail("the kernels of ", op, " run on sm_90 only, got sm_", major, minor);
  return attribute(cudaDevAttrMultiProcessorCount, device);
}
#endif

}  // namespace dinov2_fast
