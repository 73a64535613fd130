// What every kernel builds on: one source that NVRTC compiles for the device, without any header of the
// toolkit's, and g++ for the emulator.
//
// Kernels are named `name_FORMAT` where they are written for a format; `KERNEL` declares one under its full
// name, and `DENSE_KERNEL_OF` one of which so many blocks shall fit on a multiprocessor. Sums over a row, a warp or a
// block go in one fixed order: the same launch gives the same bits, and but for what runs on tensor cores a token's
// result doesn't depend on what runs beside it. NVRTC is told not to contract products and sums; where a fused
// multiply-add is wanted it says `fmaf`.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define DYNAMIC_SHARED(type, name)                                                                                     \
    extern __shared__ uint4 dynamic_shared_memory[];                                                                   \
    type *name = reinterpret_cast<type *>(dynamic_shared_memory)
#define KERNEL(name, ...) extern "C" __global__ void __launch_bounds__(1024) name(__VA_ARGS__)
#define KERNEL_OF(threads, name, ...) extern "C" __global__ void __launch_bounds__(threads, 1) name(__VA_ARGS__)
#define DENSE_KERNEL_OF(threads, blocks, name, ...)                                                                    \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(__VA_ARGS__)
#define INFINITY_F __int_as_float(0x7f800000)
#define NOT_INLINED __noinline__
#else
#define DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(cuemu::dynamic_shared)
#define KERNEL(name, ...)                                                                                              \
    void name(__VA_ARGS__);                                                                                            \
    static int registered_##name = cuemu::register_kernel(#name, name);                                                \
    void name(__VA_ARGS__)
#define KERNEL_OF(threads, name, ...) NAMED_KERNEL(name, __VA_ARGS__)
#define DENSE_KERNEL_OF(threads, blocks, name, ...) NAMED_KERNEL(name, __VA_ARGS__)
#define NAMED_KERNEL(name, ...) KERNEL(name, __VA_ARGS__)
#define INFINITY_F __builtin_inff()
#define NOT_INLINED __attribute__((noinline))
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

constexpr u32 ALL_LANES = 0xffffffffu;
// No token could be sampled.
constexpr u32 NO_TOKEN = 0xffffffffu;

// To be called by every kernel before it touches memory that another launch may have written, or still reads. A kernel may
// be started while the one before it ends; until here it can do what depends on neither, such as asking for weights.
__device__ __forceinline__ void wait_for_launches_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Asks for memory that will be read soon.
__device__ __forceinline__ void prefetch(const void *place) {
#if defined(__CUDA_ARCH__)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(place));
#else
    (void)place;
#endif
}

__device__ __forceinline__ int lane_of_thread() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_of_thread() { return threadIdx.x >> 5; }

// Adds one to a counter: what this thread knew to be written can be read by who finds it there, and the other way round.
__device__ __forceinline__ u32 count_arrival(u32 *arrived) {
#if defined(__CUDA_ARCH__)
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
    return before;
#else
    return atomicAdd(arrived, 1u);
#endif
}

// Whether this block is the last of `count` that count themselves in `arrived`, which is 0 between launches: what all have
// written can be read then, past this multiprocessor's cache. `wait` waits for the block's threads that call this, of which
// the first speaks for all: a fence of every thread takes longer.
template <class Wait> __device__ __forceinline__ bool arrives_last(u32 *arrived, u32 count, Wait wait) {
    __shared__ u32 before;
    wait();
    if (threadIdx.x == 0) {
        before = count_arrival(arrived);
        if (before + 1 == count) {
            // For the next launch.
            *arrived = 0;
        }
    }
    wait();
    return before + 1 == count;
}

// The sum over the lanes of a warp, the same in each.
template <class T> __device__ __forceinline__ T warp_sum(T value) {
    for (int bits = 16; bits > 0; bits >>= 1) {
        value += __shfl_xor_sync(ALL_LANES, value, bits);
    }
    return value;
}

template <class T> __device__ __forceinline__ T warp_max(T value) {
    for (int bits = 16; bits > 0; bits >>= 1) {
        T other = __shfl_xor_sync(ALL_LANES, value, bits);
        value = other > value ? other : value;
    }
    return value;
}

// The sum over the threads of a block of whole warps, the same in each. All threads take part; `partial` has
// room for 32 values and is free again when this returns.
template <class T> __device__ __forceinline__ T block_sum(T value, T *partial) {
    value = warp_sum(value);
    if (lane_of_thread() == 0) {
        partial[warp_of_thread()] = value;
    }
    __syncthreads();
    int warps = blockDim.x >> 5;
    value = warp_sum(lane_of_thread() < warps ? partial[lane_of_thread()] : T(0));
    __syncthreads();
    return value;
}

template <class T> __device__ __forceinline__ T block_max(T value, T *partial, T lowest) {
    value = warp_max(value);
    if (lane_of_thread() == 0) {
        partial[warp_of_thread()] = value;
    }
    __syncthreads();
    int warps = blockDim.x >> 5;
    value = warp_max(lane_of_thread() < warps ? partial[lane_of_thread()] : lowest);
    __syncthreads();
    return value;
}
