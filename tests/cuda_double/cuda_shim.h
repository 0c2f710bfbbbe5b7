// What a kernel source needs to be compiled by g++ and run on the CPU, for the driver double.
//
// One block runs at a time and, within it, one thread at a time, up to the end or the next __syncthreads(). So
// atomics are plain operations, and a kernel must not wait for another block. The double checks what a GPU leaves
// undefined: a barrier that some threads do not reach, a misaligned vector access, shared memory read before it is
// written (it is filled with NaN before each block).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <math.h>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One copy serves all blocks, since they run in turn; the section is how run_grid.cpp finds it.
#define __shared__ static __attribute__((section("cuda_shared")))
#define __syncthreads() ::cuda_shim::barrier(__LINE__)

#define CUDA_SHIM_VECTOR2(name, type, bytes)     \
    struct __attribute__((aligned(bytes))) name { \
        type x, y;                                \
    };                                            \
    inline name make_##name(type x, type y) { return {x, y}; }
#define CUDA_SHIM_VECTOR4(name, type, bytes)     \
    struct __attribute__((aligned(bytes))) name { \
        type x, y, z, w;                          \
    };                                            \
    inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_SHIM_VECTOR2(float2, float, 8)
CUDA_SHIM_VECTOR2(uint2, unsigned int, 8)
CUDA_SHIM_VECTOR4(float4, float, 16)
CUDA_SHIM_VECTOR4(int4, int, 16)
CUDA_SHIM_VECTOR4(uint4, unsigned int, 16)
CUDA_SHIM_VECTOR4(uchar4, unsigned char, 4)

struct uint3 {
    unsigned int x, y, z;
};
struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using std::max;
using std::min;

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; }  // NaN becomes 0
inline unsigned int __umulhi(unsigned int a, unsigned int b) { return uint64_t{a} * b >> 32; }

namespace cuda_shim {
template <typename To, typename From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <typename T, typename Change>
T exchange(T* where, Change change) {
    T old = *where;
    *where = change(old);
    return old;
}

template <typename T>
struct same {  // keeps the second argument of an atomic out of the deduction of T, so that 1 fits unsigned int*
    using type = T;
};
template <typename T>
using same_t = typename same<T>::type;

void barrier(int line);
}  // namespace cuda_shim

inline float __uint_as_float(unsigned int a) { return cuda_shim::bits<float>(a); }
inline float __int_as_float(int a) { return cuda_shim::bits<float>(a); }
inline unsigned int __float_as_uint(float a) { return cuda_shim::bits<unsigned int>(a); }
inline int __float_as_int(float a) { return cuda_shim::bits<int>(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned int a) { return static_cast<float>(a); }
inline int __float2int_rn(float a) { return static_cast<int>(rintf(a)); }
inline unsigned int __float2uint_rn(float a) { return a > 0 ? static_cast<unsigned int>(rintf(a)) : 0; }

template <typename T>
T __ldg(const T* where) {
    return *where;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T atomicAdd(T* where, cuda_shim::same_t<T> value) {
    return cuda_shim::exchange(where, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicSub(T* where, cuda_shim::same_t<T> value) {
    return cuda_shim::exchange(where, [=](T old) { return static_cast<T>(old - value); });
}
template <typename T>
T atomicMin(T* where, cuda_shim::same_t<T> value) {
    return cuda_shim::exchange(where, [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicMax(T* where, cuda_shim::same_t<T> value) {
    return cuda_shim::exchange(where, [=](T old) { return value > old ? value : old; });
}
template <typename T>
T atomicExch(T* where, cuda_shim::same_t<T> value) {
    return cuda_shim::exchange(where, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* where, cuda_shim::same_t<T> expected, cuda_shim::same_t<T> value) {
    return cuda_shim::exchange(where, [=](T old) { return old == expected ? value : old; });
}

namespace cuda_shim {
struct Kernel {
    const char* name;
    size_t argument_bytes;
    void (*call)(const void* argument);
};

const Kernel* find(const char* name);  // nullptr where none is registered under it

// Runs every thread of every block. Returns 0, or the CUresult that a GPU would raise.
int run(const Kernel& kernel, dim3 grid, dim3 block, const void* argument, bool backwards);

struct Registration {
    explicit Registration(Kernel kernel);
};
}  // namespace cuda_shim

// Makes `kernel(Argument)` known to the double's modules.
#define DOUBLE_KERNEL(kernel, Argument)                                                       \
    static_assert(std::is_trivially_copyable<Argument>::value && sizeof(Argument) <= 4096);   \
    static const cuda_shim::Registration kernel##_registration{cuda_shim::Kernel{             \
        #kernel, sizeof(Argument), [](const void* argument) {                                 \
            kernel(*static_cast<const Argument*>(argument));                                  \
        }}};
