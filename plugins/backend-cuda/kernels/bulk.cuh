// Products of very many rows with weights in halves, on Hopper: as those of hopper.cuh, with nothing but products left for
// their threads to do.
//
// What limits these is how fast tiles come from the second-level cache. So two blocks, a cluster, take the same tokens and
// different outputs, and each fetches half of the tokens for both. One thread asks for copies; the accelerator makes them.
// With two matrices the upper half of a tile's outputs are the second's.
#pragma once

#include "formats.cuh"
#include "tile.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

struct Bulk {
    static constexpr int tokens = 256, outputs = 128, stages = 4, columns = 64, cluster = 2;
    // Threads that multiply; those of one more warp copy.
    static constexpr int threads = 2 * outputs;
    static constexpr int row_bytes = 2 * columns;
    static constexpr int stage_bytes = (tokens + outputs) * row_bytes;
    static constexpr bool takes_turns = false;

    static __device__ __forceinline__ int sum_at(int row, int column) {
        return row * outputs + (column ^ (row >> 1 & 3) << 3);
    }
};

// Waits for the threads that multiply.
__device__ __forceinline__ void wait_for_multipliers() { asm volatile("bar.sync 1, %0;" ::"n"(Bulk::threads) : "memory"); }

// Blocks in x are tiles of tokens, in y of outputs: an even number of them.
template <Half HALF>
__device__ __forceinline__ void bulk_matmul(const Product &product, const TensorMap &tokens, const TensorMap &weights,
                                            const TensorMap &second) {
    DYNAMIC_SHARED(u8, shared);
    __shared__ Barrier full[Bulk::stages], empty[Bulk::stages];
    // Tiles begin at multiples of 1024 bytes, at the same place in both blocks.
    u8 *stages = shared + (-shared_address(shared) & 1023);
    int first_row = blockIdx.x * Bulk::tokens;
    int first_out = blockIdx.y * (product.second ? Bulk::outputs / 2 : Bulk::outputs);
    int all = (product.cols + Bulk::columns - 1) / Bulk::columns;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Bulk::stages; stage++) {
            full[stage].init(1);
            // A thread of each warpgroup of both blocks.
            empty[stage].init(Bulk::cluster * Bulk::threads / 128);
        }
        Barrier::show();
    }
    wait_for_cluster();
    if (threadIdx.x >= Bulk::threads) {
        if (threadIdx.x == Bulk::threads) {
            u32 rank = rank_in_cluster();
            auto place = [&](int stage) { return stages + stage % Bulk::stages * Bulk::stage_bytes; };
            auto copy_weights = [&](int stage) {
                Barrier &barrier = full[stage % Bulk::stages];
                u8 *to = place(stage) + Bulk::tokens * Bulk::row_bytes;
                barrier.expect(Bulk::stage_bytes);
                copy_box(to, weights, first_out, stage * Bulk::columns, barrier);
                if (product.second) {
                    copy_box(to + Bulk::outputs / 2 * Bulk::row_bytes, second, first_out, stage * Bulk::columns, barrier);
                }
            };
            auto copy_tokens = [&](int stage) {
                int half = rank * (Bulk::tokens / Bulk::cluster);
                copy_box_to((1 << Bulk::cluster) - 1, place(stage) + half * Bulk::row_bytes, tokens, first_row + half,
                            stage * Bulk::columns, full[stage % Bulk::stages]);
            };
            int ahead = min(all, Bulk::stages);
            for (int stage = 0; stage < ahead; stage++) {
                copy_weights(stage);
            }
            // Tokens are what the launch before this computes.
            wait_for_launches_before();
            for (int stage = 0; stage < ahead; stage++) {
                copy_tokens(stage);
            }
            for (int stage = ahead; stage < all; stage++) {
                empty[stage % Bulk::stages].wait((stage / Bulk::stages & 1) ^ 1);
                copy_weights(stage);
                copy_tokens(stage);
            }
        }
        __syncwarp();
    } else {
        wait_for_launches_before();
        auto release = [&](int stage) {
            if (threadIdx.x % 128 < Bulk::cluster) {
                empty[stage % Bulk::stages].arrive_at(threadIdx.x % 128);
            }
        };
        float sums[1][Bulk::tokens / 8][4] = {};
        int group = threadIdx.x / 128;
        for (int stage = 0; stage < all; stage++) {
            full[stage % Bulk::stages].wait(stage / Bulk::stages & 1);
            u8 *tile = stages + stage % Bulk::stages * Bulk::stage_bytes;
            u64 left = matrix_descriptor(tile + (Bulk::tokens + 64 * group) * Bulk::row_bytes);
            u64 right = matrix_descriptor(tile);
            begin_products();
#pragma unroll
            for (int depth = 0; depth < Bulk::columns / 16; depth++) {
                multiply_tiles<HALF, Bulk::tokens>(sums[0], left + depth * NEXT_COLUMNS, right + depth * NEXT_COLUMNS);
            }
            commit_products();
            // The stage before this has been read.
            wait_for_products<1>();
            if (stage > 0) {
                release(stage - 1);
            }
        }
        wait_for_products<0>();
        wait_for_multipliers();
        float *tile = reinterpret_cast<float *>(stages);
        int output = warp_of_thread() * 16 + lane_of_thread() / 4, at = lane_of_thread() % 4 * 2;
#pragma unroll
        for (int j = 0; j < Bulk::tokens / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                tile[Bulk::sum_at(8 * j + at + i % 2, output + i / 2 * 8)] = sums[0][j][i];
            }
        }
        wait_for_multipliers();
        store_tile<Bulk>(product, {0, product.tokens}, first_row, first_out, tile);
    }
    // Neither leaves while the other may still arrive at its barriers.
    wait_for_cluster();
}
