// Runs CUDA C kernels on the CPU, so that every kernel and the whole backend can be tested without a GPU.
//
// A block's threads are fibers of one OS thread. A thread runs until it reaches a collective (a barrier, a
// shuffle, a vote); the scheduler carries a collective out once every thread that it names has arrived, so a
// barrier that not all reach, or a lane that a mask names and that is gone, ends the program with a message
// instead of going unnoticed. Blocks run one after another. Dynamic shared memory is poisoned before each block,
// with bytes that make a NaN of any float.
//
// What it can't show: races between the lanes of a warp or between blocks (CUEMU_REVERSE=1 runs lanes and
// blocks in reverse, which uncovers some), the last bits of transcendental functions, time.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
// All threads of a block are fibers of one thread, and blocks don't overlap.
#define __shared__ static

struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace cuemu {

struct Launch {
    uint3 grid, block;
    size_t shared_bytes;
};

enum class Collective { none, barrier, shuffle, ballot, together };

// What a whole warp does at once, given what each lane brings.
using Together = void (*)(void *const *lanes);

struct Thread {
    uint3 index;
    unsigned lane;
    Collective waits_for = Collective::none;
    bool done = false;
    unsigned mask = 0;
    // What the lane brings to a collective, which lane it reads from, and what it gets.
    uint64_t gives = 0;
    unsigned reads_from = 0;
    uint64_t gets = 0;
    Together work = nullptr;
    void *context = nullptr;
};

extern Thread *current;
extern uint3 block_index;
extern Launch launched;
extern char *dynamic_shared;

// Runs `body` once for every thread of the launch.
void run(const Launch &launch, const std::function<void()> &body);

// Waits in a collective: what the lane gets from it.
uint64_t arrive(Collective collective, unsigned mask, uint64_t gives, unsigned reads_from);

// Has all 32 lanes of the warp do `work` with what each brings.
void together(Together work, void *brings);

// Copies sixteen bytes, or zeros where `from` is null, when the group that the copy is in has been waited for, and not
// before: who forgets to wait finds what was there.
void copy_later(void *to, const void *from);
void commit_copies();
void wait_for_copies(int pending);

// A kernel by name, for the driver.
struct Kernel {
    std::function<void(void **)> call;
    std::vector<size_t> parameter_bytes;
};
Kernel *find_kernel(const std::string &name);
int add_kernel(const std::string &name, Kernel kernel);

template <class... P, size_t... I>
void call(void (*kernel)(P...), void **parameters, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<P> *>(parameters[I])...);
}

template <class... P> int register_kernel(const char *name, void (*kernel)(P...)) {
    auto invoke = [kernel](void **parameters) { call(kernel, parameters, std::index_sequence_for<P...>{}); };
    return add_kernel(name, Kernel{invoke, {sizeof(P)...}});
}

template <class T> T shuffle(unsigned mask, T value, unsigned from) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = arrive(Collective::shuffle, mask, bits, from);
    memcpy(&value, &bits, sizeof value);
    return value;
}

} // namespace cuemu

#define threadIdx (cuemu::current->index)
#define blockIdx (cuemu::block_index)
#define blockDim (cuemu::launched.block)
#define gridDim (cuemu::launched.grid)

static inline void __syncthreads() { cuemu::arrive(cuemu::Collective::barrier, 0, 0, 0); }
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, unsigned bits) {
    return cuemu::shuffle(mask, value, cuemu::current->lane ^ bits);
}
template <class T> static inline T __shfl_sync(unsigned mask, T value, unsigned from) {
    return cuemu::shuffle(mask, value, from);
}
static inline unsigned __ballot_sync(unsigned mask, int vote) {
    return static_cast<unsigned>(cuemu::arrive(cuemu::Collective::ballot, mask, vote != 0, 0));
}
static inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
static inline void __syncwarp() { cuemu::arrive(cuemu::Collective::ballot, ~0u, 0, 0); }
static inline void __threadfence() {}
template <class T> static inline T atomicAdd(T *place, T value) {
    T before = *place;
    *place += value;
    return before;
}
template <class T> static inline T __ldcg(const T *place) { return *place; }
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
// Bytes of two words, the second one's from 4 on, chosen by a digit each.
static inline unsigned __byte_perm(unsigned first, unsigned second, unsigned digits) {
    uint64_t bytes = first | static_cast<uint64_t>(second) << 32;
    unsigned chosen = 0;
    for (int i = 0; i < 4; i++) {
        chosen |= static_cast<unsigned>(bytes >> (digits >> 4 * i & 7) * 8 & 255) << 8 * i;
    }
    return chosen;
}
static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline long long __double_as_longlong(double value) {
    long long bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
