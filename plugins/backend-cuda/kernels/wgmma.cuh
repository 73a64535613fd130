// Tensor cores of Hopper: a warpgroup, four warps, multiplies tiles that lie in shared memory, while it goes on with
// something else. See "asynchronous warpgroup level matrix instructions" of the PTX instruction set; compiled for sm_90a
// alone.
//
// A product is 64 outputs by TOKENS tokens over 16 columns. Both operands lie row by row, a row's 64 columns in 128 bytes,
// whose sixteen-byte pieces are permuted so that eight rows lie in different banks: piece p of row r at place p ^ (r % 8).
// Of the sums a lane has, for each 8 tokens, outputs `lane / 4` and 8 behind it at tokens `lane % 4 × 2` and the next.
#pragma once

#include "tensor.cuh"

// Where rows of 128 bytes that begin at `place`, a multiple of 1024, lie: for the instruction.
__device__ __forceinline__ u64 matrix_descriptor(const void *place) {
    constexpr u64 eight_rows = 1024 >> 4, permuted_by_128 = 1;
    return (shared_address(place) & 0x3ffff) >> 4 | u64(1) << 16 | eight_rows << 32 | permuted_by_128 << 62;
}

// What a descriptor grows by from 16 columns to the next.
constexpr u64 NEXT_COLUMNS = 32 >> 4;

// Orders what threads wrote to shared memory before what tensor cores read of it.
__device__ __forceinline__ void show_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the last `PENDING` groups of products are on their way.
template <int PENDING> __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define EIGHT(i)                                                                                                       \
    "+f"(sums[(i) / 4][0]), "+f"(sums[(i) / 4][1]), "+f"(sums[(i) / 4][2]), "+f"(sums[(i) / 4][3]),                     \
        "+f"(sums[(i) / 4 + 1][0]), "+f"(sums[(i) / 4 + 1][1]), "+f"(sums[(i) / 4 + 1][2]), "+f"(sums[(i) / 4 + 1][3])

// clang-format off
#define WGMMA_16(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE " {" \
                 "%0, %1, %2, %3, %4, %5, %6, %7" \
                 "}, %8, %9, p, 1, 1, 0, 0;\n}\n" \
                 : EIGHT(0) \
                 : "l"(weights), "l"(tokens))

#define WGMMA_64(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
                 "}, %32, %33, p, 1, 1, 0, 0;\n}\n" \
                 : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24) \
                 : "l"(weights), "l"(tokens))

#define WGMMA_128(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
                 "}, %64, %65, p, 1, 1, 0, 0;\n}\n" \
                 : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56) \
                 : "l"(weights), "l"(tokens))

#define WGMMA_256(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
                 "}, %128, %129, p, 1, 1, 0, 0;\n}\n" \
                 : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56),  \
                   EIGHT(64), EIGHT(72), EIGHT(80), EIGHT(88), EIGHT(96), EIGHT(104), EIGHT(112), EIGHT(120) \
                 : "l"(weights), "l"(tokens))

// clang-format on

// sums += weights × tokens, both by their descriptors; queued.
template <Half HALF, int TOKENS>
__device__ __forceinline__ void multiply_tiles(float (&sums)[TOKENS / 8][4], u64 weights, u64 tokens) {
    if constexpr (TOKENS == 16) {
        if constexpr (HALF == HALF_BF16) { WGMMA_16("bf16"); } else { WGMMA_16("f16"); }
    } else if constexpr (TOKENS == 64) {
        if constexpr (HALF == HALF_BF16) { WGMMA_64("bf16"); } else { WGMMA_64("f16"); }
    } else if constexpr (TOKENS == 128) {
        if constexpr (HALF == HALF_BF16) { WGMMA_128("bf16"); } else { WGMMA_128("f16"); }
    } else {
        static_assert(TOKENS == 256, "there is no such product");
        if constexpr (HALF == HALF_BF16) { WGMMA_256("bf16"); } else { WGMMA_256("f16"); }
    }
}

// A tile of which a warpgroup multiplies every 64 outputs.
template <int TOKENS, int OUTPUTS> struct WarpgroupTile {
    static constexpr int tokens = TOKENS, outputs = OUTPUTS;
    // Those that multiply.
    static constexpr int threads = 2 * OUTPUTS;

    // Where a sum lies in shared memory: four pairs of rows lie in different banks.
    static __device__ __forceinline__ int sum_at(int row, int column) {
        return row * outputs + (column ^ (row >> 1 & 3) << 3);
    }

    // Puts a thread's sums there.
    static __device__ __forceinline__ void leave_sums(const float (&sums)[TOKENS / 8][4], float *tile) {
        int output = warp_of_thread() * 16 + lane_of_thread() / 4, token = lane_of_thread() % 4 * 2;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                tile[sum_at(8 * j + token + i % 2, output + i / 2 * 8)] = sums[j][i];
            }
        }
    }
};

// Keeps the compiler from using sums before products are waited for, or from still changing them when products begin.
template <int COUNT> __device__ __forceinline__ void hold(float (&sums)[COUNT][4]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        asm volatile("" : "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])::"memory");
    }
}

// The same for left operands in registers.
template <int COUNT> __device__ __forceinline__ void hold(u32 (&words)[COUNT][4]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        asm volatile("" : "+r"(words[i][0]), "+r"(words[i][1]), "+r"(words[i][2]), "+r"(words[i][3])::"memory");
    }
}

// As `matrix_descriptor`, for a right operand that lies transposed: a row of 64 of its columns for each column of the
// left one, and `apart` bytes behind them the same for the next 64.
__device__ __forceinline__ u64 transposed_descriptor(const void *place, u32 apart) {
    return matrix_descriptor(place) + ((u64(apart >> 4) - 1) << 16);
}

// What a descriptor grows by for so many rows.
__device__ __forceinline__ constexpr u64 next_rows(int rows) { return rows * 128 >> 4; }

// clang-format off
#define SUMS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

#define SUMS_128 SUMS_64 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define WGMMA_128_FRESH(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" SUMS_128 "}, %64, %65, p, 1, 1, 0, 0;\n}\n" \
                 : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56) \
                 : "l"(left), "l"(right), "r"(static_cast<int>(adds)))

#define WGMMA_64_TRANSPOSED(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" SUMS_64 "}, " \
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n" \
                 : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24) \
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right))

#define WGMMA_128_TRANSPOSED(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" SUMS_128 "}, " \
                 "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n" \
                 : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56) \
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right))
// clang-format on

// sums = left × right, both by their descriptors, added to what there is where `adds`; queued.
template <Half HALF>
__device__ __forceinline__ void multiply_tiles(float (&sums)[16][4], u64 left, u64 right, bool adds) {
    if constexpr (HALF == HALF_BF16) { WGMMA_128_FRESH("bf16"); } else { WGMMA_128_FRESH("f16"); }
}

// sums += left × right, the left one in registers, in the order of `multiply_add`, the right one by a descriptor of what
// lies transposed; queued.
template <Half HALF, int COLUMNS>
__device__ __forceinline__ void multiply_transposed(float (&sums)[COLUMNS / 8][4], const u32 (&left)[4], u64 right) {
    if constexpr (COLUMNS == 64) {
        if constexpr (HALF == HALF_BF16) { WGMMA_64_TRANSPOSED("bf16"); } else { WGMMA_64_TRANSPOSED("f16"); }
    } else {
        static_assert(COLUMNS == 128, "there is no such product");
        if constexpr (HALF == HALF_BF16) { WGMMA_128_TRANSPOSED("bf16"); } else { WGMMA_128_TRANSPOSED("f16"); }
    }
}
