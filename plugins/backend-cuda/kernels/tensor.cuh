// Tensor cores and asynchronous copies: one small function for each instruction, with a plain C++ meaning for the
// emulator. Layouts are those of the PTX instruction set, "warp-level matrix instructions".
//
// A matrix product is 16 rows of A by 8 columns of B over 16 columns of depth, with 16-bit elements and sums in
// float. Lane l is in group l / 4, its place there is l % 4. It holds of A, two elements side by side in a word, rows
// `group` and `group + 8` at depths 2 × place and 2 × place + 8; of B column `group` at the same depths; and of the
// sums rows `group` and `group + 8` at columns 2 × place and 2 × place + 1.
#pragma once

#include "half.cuh"

// What 16-bit elements are.
enum Half { HALF_F16, HALF_BF16 };

// What is too large for F16 becomes the largest number there is; a NaN stays one.
template <Half HALF> __device__ __forceinline__ float in_range(float value) {
    return HALF == HALF_BF16 ? value : value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value;
}

template <Half HALF> __device__ __forceinline__ u16 half_of(float value) {
    return HALF == HALF_BF16 ? bf16_of_float(value) : f16_of_float(in_range<HALF>(value));
}

template <Half HALF> __device__ __forceinline__ float float_of_half(u16 bits) {
    return HALF == HALF_BF16 ? float_of_bf16(bits) : float_of_f16(bits);
}

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

// Two elements in a word, the first in the lower half.
template <Half HALF> __device__ __forceinline__ u32 halves_of(float first, float second) {
    u32 word;
    if constexpr (HALF == HALF_BF16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(in_range<HALF>(second)), "f"(in_range<HALF>(first)));
    }
    return word;
}

__device__ __forceinline__ u32 shared_address(const void *place) {
    return static_cast<u32>(__cvta_generic_to_shared(place));
}

// Starts a copy of sixteen bytes to shared memory, or of zeros where there is nothing to copy. `from` must be a
// valid address either way.
__device__ __forceinline__ void copy_async(void *to, const void *from, bool exists) {
    int bytes = exists ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last `PENDING` groups of this thread's copies are on their way.
template <int PENDING> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four matrices of eight rows of eight elements: lane l says where row l % 8 of matrix l / 8 begins, and gets of each
// matrix the elements 2 × place and 2 × place + 1 of row `group`.
__device__ __forceinline__ void load_matrices(u32 *words, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// As above, of the transposed matrices.
__device__ __forceinline__ void load_transposed(u32 *words, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// sums += A × B, with A in the order that `load_matrices` gives it in: the upper rows, the lower rows, and both again
// at the next eight depths.
template <Half HALF> __device__ __forceinline__ void multiply_add(float *sums, const u32 *a, u32 b0, u32 b1) {
    if constexpr (HALF == HALF_BF16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

#else

template <Half HALF> static inline u32 halves_of(float first, float second) {
    return half_of<HALF>(first) | static_cast<u32>(half_of<HALF>(second)) << 16;
}

static inline void copy_async(void *to, const void *from, bool exists) { cuemu::copy_later(to, exists ? from : nullptr); }
static inline void commit_copies() { cuemu::commit_copies(); }
template <int PENDING> static inline void wait_for_copies() { cuemu::wait_for_copies(PENDING); }

// Element `at` of row `row` of an eight by eight matrix whose rows the lanes from `first` on have the addresses of.
static inline u16 matrix_element(const void *const *rows, int row, int at) {
    return static_cast<const u16 *>(rows[row])[at];
}

template <bool TRANSPOSED> static inline void load_matrices_of(u32 *words, const void *row) {
    struct Lane {
        const void *row;
        u32 *words;
    } lane = {row, words};
    cuemu::together(
        [](void *const *lanes) {
            for (int matrix = 0; matrix < 4; matrix++) {
                const void *rows[8];
                for (int i = 0; i < 8; i++) {
                    rows[i] = static_cast<Lane *>(lanes[8 * matrix + i])->row;
                }
                for (int index = 0; index < 32; index++) {
                    int group = index / 4, at = index % 4 * 2;
                    u32 low = TRANSPOSED ? matrix_element(rows, at, group) : matrix_element(rows, group, at);
                    u32 high = TRANSPOSED ? matrix_element(rows, at + 1, group) : matrix_element(rows, group, at + 1);
                    static_cast<Lane *>(lanes[index])->words[matrix] = low | high << 16;
                }
            }
        },
        &lane);
}

static inline void load_matrices(u32 *words, const void *row) { load_matrices_of<false>(words, row); }
static inline void load_transposed(u32 *words, const void *row) { load_matrices_of<true>(words, row); }

template <Half HALF> static inline void multiply_add(float *sums, const u32 *a, u32 b0, u32 b1) {
    struct Lane {
        float *sums;
        const u32 *a;
        u32 b[2];
    } lane = {sums, a, {b0, b1}};
    cuemu::together(
        [](void *const *lanes) {
            float left[16][16], right[16][8];
            for (int index = 0; index < 32; index++) {
                const Lane &lane = *static_cast<Lane *>(lanes[index]);
                int group = index / 4, place = index % 4 * 2;
                for (int half = 0; half < 2; half++) {
                    auto element = [&](u32 word) { return float_of_half<HALF>(static_cast<u16>(word >> 16 * half)); };
                    for (int i = 0; i < 4; i++) {
                        left[group + i % 2 * 8][place + half + i / 2 * 8] = element(lane.a[i]);
                    }
                    for (int i = 0; i < 2; i++) {
                        right[place + half + 8 * i][group] = element(lane.b[i]);
                    }
                }
            }
            for (int index = 0; index < 32; index++) {
                float *sums = static_cast<Lane *>(lanes[index])->sums;
                for (int i = 0; i < 4; i++) {
                    int row = index / 4 + i / 2 * 8, column = index % 4 * 2 + i % 2;
                    for (int depth = 0; depth < 16; depth++) {
                        sums[i] += left[row][depth] * right[depth][column];
                    }
                }
            }
        },
        &lane);
}

#endif
