// Products of many rows with weights in halves on Hopper: as those of hopper.cuh, with nothing but products left for their threads to do.
//
// One thread asks for tiles and the tensor memory accelerator copies them. What limits large tiles is how fast they come
// from the second-level cache; so two blocks, a cluster, take the same tokens and different outputs, and each fetches half
// of the tokens for both. With two matrices the upper half of a tile's outputs are the second's.
//
// A cluster stays for the whole product and takes tile after tile (work.cuh): the next one is on its way while results are
// written.
#pragma once

#include "formats.cuh"
#include "tile.cuh"
#include "tma.cuh"
#include "wgmma.cuh"
#include "work.cuh"

// TOKENS × OUTPUTS for a block, a warpgroup for every 64 outputs, and one more of which a thread copies.
template <int TOKENS, int OUTPUTS, int STAGES, int CLUSTER> struct BulkTile {
    static constexpr int tokens = TOKENS, outputs = OUTPUTS, stages = STAGES, cluster = CLUSTER;
    // Of a shared tile that are worth a cluster of its own.
    static constexpr int least_stages = 4;
    // Those that multiply.
    static constexpr int threads = 2 * OUTPUTS;
    static constexpr int columns = 64, row_bytes = 2 * columns;
    static constexpr int stage_bytes = (TOKENS + OUTPUTS) * row_bytes;

    // Waits for all threads that multiply.
    static __device__ __forceinline__ void wait() { asm volatile("bar.sync 1, %0;" ::"n"(threads) : "memory"); }

    // Tokens whose results pass through shared memory at a time.
    struct Part : WarpgroupTile<64, OUTPUTS> {
        static constexpr bool takes_turns = false;
    };

    static_assert(stage_bytes % 1024 == 0 && TOKENS / CLUSTER % 8 == 0 && OUTPUTS % 64 == 0, "tiles begin where they may");
};

typedef BulkTile<64, 128, 7, 2> Bulk64;
typedef BulkTile<128, 128, 6, 2> Bulk128;
typedef BulkTile<256, 128, 4, 2> Bulk256;

// A stage of a cluster's work, and the next one. One thread goes from stage to stage for all others: it doesn't divide more
// than once a tile.
template <class TILE> struct Cursor {
    const Work<TILE> &work;
    int at, stage, first_row, first_out;

    __device__ __forceinline__ void find(const Product &product) {
        StageOfTile place = work.locate(at);
        stage = place.stage, first_row = work.first_row(place.tile);
        first_out = work.first_out(product, place.tile, rank_in_cluster());
    }

    __device__ __forceinline__ void advance(const Product &product) {
        at++, stage++;
        if (stage == work.stages) {
            find(product);
        }
    }
};

// Brings stage after stage to shared memory, as many ahead as there is room for: what one thread does.
template <class TILE> struct Copier {
    static constexpr int part = TILE::tokens / TILE::cluster;

    const Product &product;
    const Work<TILE> &work;
    const TensorMap &tokens, &weights, &second;
    u8 *stages;
    Barrier *full, *empty;

    __device__ __forceinline__ void copy_weights(const Cursor<TILE> &cursor) const {
        Barrier &barrier = full[cursor.at % TILE::stages];
        u8 *to = stages + cursor.at % TILE::stages * TILE::stage_bytes + TILE::tokens * TILE::row_bytes;
        int column = cursor.stage * TILE::columns;
        barrier.expect(TILE::stage_bytes);
        copy_box(to, weights, cursor.first_out, column, barrier);
        if (product.second) {
            copy_box(to + TILE::outputs / 2 * TILE::row_bytes, second, cursor.first_out, column, barrier);
        }
    }

    __device__ __forceinline__ void copy_tokens(const Cursor<TILE> &cursor) const {
        int begin = rank_in_cluster() * part;
        u8 *to = stages + cursor.at % TILE::stages * TILE::stage_bytes + begin * TILE::row_bytes;
        copy_box_to((1 << TILE::cluster) - 1, to, tokens, cursor.first_row + begin, cursor.stage * TILE::columns,
                    full[cursor.at % TILE::stages]);
    }

    __device__ __forceinline__ Cursor<TILE> first() const {
        Cursor<TILE> cursor = {work, 0, 0, 0, 0};
        cursor.find(product);
        return cursor;
    }

    __device__ __forceinline__ int ahead() const { return min(work.count(), TILE::stages); }

    // Weights depend on no launch and on no other block.
    __device__ __forceinline__ void begin() const {
        for (Cursor<TILE> cursor = first(); cursor.at < ahead(); cursor.advance(product)) {
            copy_weights(cursor);
        }
    }

    // Tokens are what the launch before this computes.
    __device__ __forceinline__ void go_on() const {
        Cursor<TILE> cursor = first();
        for (; cursor.at < ahead(); cursor.advance(product)) {
            copy_tokens(cursor);
        }
        for (int count = work.count(); cursor.at < count; cursor.advance(product)) {
            empty[cursor.at % TILE::stages].wait((cursor.at / TILE::stages & 1) ^ 1);
            copy_weights(cursor);
            copy_tokens(cursor);
        }
    }
};

// What a thread that multiplies sums over the stages from `at` on, `count` of one tile.
template <Half HALF, class TILE>
__device__ __forceinline__ void multiply_stages(int at, int count, const u8 *stages, Barrier *full, Barrier *empty,
                                                float (&sums)[TILE::tokens / 8][4]) {
    int group = threadIdx.x / 128;
    auto release = [&](int at) {
        if (threadIdx.x % 128 < TILE::cluster) {
            empty[at % TILE::stages].arrive_at(threadIdx.x % 128);
        }
    };
    for (int end = at + count; at < end; at++) {
        full[at % TILE::stages].wait(at / TILE::stages & 1);
        const u8 *stage = stages + at % TILE::stages * TILE::stage_bytes;
        u64 left = matrix_descriptor(stage + (TILE::tokens + 64 * group) * TILE::row_bytes);
        u64 right = matrix_descriptor(stage);
        begin_products();
#pragma unroll
        for (int depth = 0; depth < TILE::columns / 16; depth++) {
            multiply_tiles<HALF, TILE::tokens>(sums, left + depth * NEXT_COLUMNS, right + depth * NEXT_COLUMNS);
        }
        commit_products();
        // The stage before this has been read.
        wait_for_products<1>();
        if (at > 0) {
            release(at - 1);
        }
    }
    wait_for_products<0>();
}

// Takes in the results of a tile, some tokens at a time.
template <class TILE>
__device__ __forceinline__ void store_results(const Product &product, int first_row, int first_out,
                                              const float (&sums)[TILE::tokens / 8][4], float *results) {
    typedef typename TILE::Part Part;
    constexpr int sums_of_part = Part::tokens / 8;
#pragma unroll 1
    for (int part = 0; part < TILE::tokens / Part::tokens && first_row + part * Part::tokens < product.tokens; part++) {
        TILE::wait();
#pragma unroll
        for (int i = 0; i < TILE::tokens / Part::tokens; i++) {
            if (i == part) {
                Part::leave_sums(reinterpret_cast<const float(&)[sums_of_part][4]>(sums[i * sums_of_part]), results);
            }
        }
        TILE::wait();
        store_tile<Part>(product, {0, product.tokens}, first_row + part * Part::tokens, first_out, results, nullptr);
    }
}

// Blocks in x are clusters.
template <Half HALF, class TILE>
__device__ __forceinline__ void bulk_matmul(const Product &product, const TensorMap &tokens, const TensorMap &weights,
                                            const TensorMap &second) {
    DYNAMIC_SHARED(u8, shared);
    __shared__ Barrier full[TILE::stages], empty[TILE::stages];
    // Tiles begin at multiples of 1024 bytes, at the same place in all blocks.
    u8 *stages = shared + (-shared_address(shared) & 1023);
    float *results = reinterpret_cast<float *>(stages + TILE::stages * TILE::stage_bytes);
    Work<TILE> work(product);
    Copier<TILE> copier = {product, work, tokens, weights, second, stages, full, empty};
    bool copies = threadIdx.x == TILE::threads;
    if (copies) {
        for (int stage = 0; stage < TILE::stages; stage++) {
            full[stage].init(1);
            // A thread of each warpgroup of all blocks.
            empty[stage].init(TILE::cluster * TILE::threads / 128);
        }
        Barrier::show();
        copier.begin();
    }
    __syncwarp();
    wait_for_cluster();
    if (threadIdx.x >= TILE::threads) {
        take_fewer_registers<COPYING_REGISTERS>();
        if (copies) {
            wait_for_launches_before();
            copier.go_on();
        }
        __syncwarp();
    } else {
        take_more_registers<MULTIPLYING_REGISTERS>();
        wait_for_launches_before();
        int count = work.count(), rank = rank_in_cluster();
        for (int at = 0; at < count;) {
            auto [tile, first] = work.locate(at);
            int here = min(work.stages - first, count - at);
            float sums[1][TILE::tokens / 8][4] = {};
            multiply_stages<HALF, TILE>(at, here, stages, full, empty, sums[0]);
            at += here;
            if (here < work.stages && !work.gather(product, tile, rank, sums)) {
                continue;
            }
            store_results<TILE>(product, work.first_row(tile), work.first_out(product, tile, rank), sums[0], results);
        }
    }
    // None leaves while another may still arrive at its barriers.
    wait_for_cluster();
}
