// Products of very many rows with weights in halves on Hopper: as those of hopper.cuh, with nothing but products left for their threads to do.
//
// One thread asks for tiles and the tensor memory accelerator copies them. What limits large tiles is how fast they come
// from the second-level cache; so two blocks, a cluster, take the same tokens and different outputs, and each fetches half
// of the tokens for both. With two matrices the upper half of a tile's outputs are the second's.
#pragma once

#include "formats.cuh"
#include "tile.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

// TOKENS × OUTPUTS for a block, a warpgroup for every 64 outputs, and one more warp that copies.
template <int TOKENS, int OUTPUTS, int STAGES, int CLUSTER> struct BulkTile : WarpgroupTile<TOKENS, OUTPUTS> {
    static constexpr int stages = STAGES, cluster = CLUSTER, threads = 2 * OUTPUTS;
    static constexpr int columns = 64, row_bytes = 2 * columns;
    static constexpr int stage_bytes = (TOKENS + OUTPUTS) * row_bytes;
    static constexpr bool takes_turns = false;

    // Waits for all threads that multiply.
    static __device__ __forceinline__ void wait() { asm volatile("bar.sync 1, %0;" ::"n"(threads) : "memory"); }

    static_assert(stage_bytes * STAGES >= 4 * TOKENS * OUTPUTS, "the sums fit into the stages");
    static_assert(stage_bytes % 1024 == 0 && TOKENS / CLUSTER % 8 == 0 && OUTPUTS % 64 == 0, "tiles begin where they may");
};

typedef BulkTile<256, 128, 4, 2> Bulk;

// Blocks in x are tiles of tokens, in y of outputs, whole clusters of them; in z those that share a tile.
template <Half HALF, class TILE>
__device__ __forceinline__ void bulk_matmul(const Product &product, const TensorMap &tokens, const TensorMap &weights,
                                            const TensorMap &second) {
    DYNAMIC_SHARED(u8, shared);
    __shared__ Barrier full[TILE::stages], empty[TILE::stages];
    // Tiles begin at multiples of 1024 bytes, at the same place in all blocks.
    u8 *stages = shared + (-shared_address(shared) & 1023);
    int first_row = blockIdx.x * TILE::tokens;
    int first_out = blockIdx.y * (product.second ? TILE::outputs / 2 : TILE::outputs);
    int all = (product.cols + TILE::columns - 1) / TILE::columns;
    int first = static_cast<int>(static_cast<u64>(all) * blockIdx.z / gridDim.z);
    int count = static_cast<int>(static_cast<u64>(all) * (blockIdx.z + 1) / gridDim.z) - first;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < TILE::stages; stage++) {
            full[stage].init(1);
            // A thread of each warpgroup of all blocks.
            empty[stage].init(TILE::cluster * TILE::threads / 128);
        }
        Barrier::show();
    }
    wait_for_cluster();
    if (threadIdx.x >= TILE::threads) {
        if (threadIdx.x == TILE::threads) {
            int part = TILE::tokens / TILE::cluster, begin = rank_in_cluster() * part;
            auto place = [&](int stage) { return stages + stage % TILE::stages * TILE::stage_bytes; };
            auto copy_weights = [&](int stage) {
                Barrier &barrier = full[stage % TILE::stages];
                u8 *to = place(stage) + TILE::tokens * TILE::row_bytes;
                int column = (first + stage) * TILE::columns;
                barrier.expect(TILE::stage_bytes);
                copy_box(to, weights, first_out, column, barrier);
                if (product.second) {
                    copy_box(to + TILE::outputs / 2 * TILE::row_bytes, second, first_out, column, barrier);
                }
            };
            auto copy_tokens = [&](int stage) {
                Barrier &barrier = full[stage % TILE::stages];
                u8 *to = place(stage) + begin * TILE::row_bytes;
                int column = (first + stage) * TILE::columns;
                copy_box_to((1 << TILE::cluster) - 1, to, tokens, first_row + begin, column, barrier);
            };
            int ahead = min(count, TILE::stages);
            for (int stage = 0; stage < ahead; stage++) {
                copy_weights(stage);
            }
            // Tokens are what the launch before this computes.
            wait_for_launches_before();
            for (int stage = 0; stage < ahead; stage++) {
                copy_tokens(stage);
            }
            for (int stage = ahead; stage < count; stage++) {
                empty[stage % TILE::stages].wait((stage / TILE::stages & 1) ^ 1);
                copy_weights(stage);
                copy_tokens(stage);
            }
        }
        __syncwarp();
    } else {
        wait_for_launches_before();
        auto release = [&](int stage) {
            if (threadIdx.x % 128 < TILE::cluster) {
                empty[stage % TILE::stages].arrive_at(threadIdx.x % 128);
            }
        };
        float sums[1][TILE::tokens / 8][4] = {};
        int group = threadIdx.x / 128;
        for (int stage = 0; stage < count; stage++) {
            full[stage % TILE::stages].wait(stage / TILE::stages & 1);
            u8 *tile = stages + stage % TILE::stages * TILE::stage_bytes;
            u64 left = matrix_descriptor(tile + (TILE::tokens + 64 * group) * TILE::row_bytes);
            u64 right = matrix_descriptor(tile);
            begin_products();
#pragma unroll
            for (int depth = 0; depth < TILE::columns / 16; depth++) {
                multiply_tiles<HALF, TILE::tokens>(sums[0], left + depth * NEXT_COLUMNS, right + depth * NEXT_COLUMNS);
            }
            commit_products();
            // The stage before this has been read.
            wait_for_products<1>();
            if (stage > 0) {
                release(stage - 1);
            }
        }
        wait_for_products<0>();
        if (gridDim.z == 1 || gather_sums<TILE>(product, sums)) {
            TILE::wait();
            float *tile = reinterpret_cast<float *>(stages);
            TILE::leave_sums(sums[0], tile);
            TILE::wait();
            store_tile<TILE>(product, {0, product.tokens}, first_row, first_out, tile);
        }
    }
    // None leaves while another may still arrive at its barriers.
    wait_for_cluster();
}
