// Products of many rows with a weight matrix, on Hopper's tensor cores: as those of matmul.cuh, which see.
//
// Here the weights are the left operand, so that tiles may be of few tokens. A stage has 64 columns. While tensor cores
// are busy with one, threads have the copies of another begin, and decode quantized weights for it. A stage is written to
// again two stages after it was read: then all warpgroups are known to be done with it.
#pragma once

#include "formats.cuh"
#include "tile.cuh"
#include "wgmma.cuh"

constexpr int WIDTH = 64;
constexpr int ROW_PIECES = WIDTH / 8;
constexpr int ROW_BYTES = 2 * WIDTH;

// TOKENS × OUTPUTS for a block, a warpgroup for every 64 outputs.
template <int TOKENS, int OUTPUTS, int STAGES> struct HopperTile : WarpgroupTile<TOKENS, OUTPUTS> {
    static constexpr int stages = STAGES, threads = 2 * OUTPUTS;
    static constexpr bool takes_turns = true;
    static __device__ __forceinline__ void wait() { __syncthreads(); }
    static constexpr int stage_bytes = (TOKENS + OUTPUTS) * ROW_BYTES;
    // Stages that are on their way while one is multiplied.
    static constexpr int ahead = STAGES - 2;
    // Pieces of a stage that a thread brings, rows apart by as many as all threads bring at once.
    static constexpr int rows_at_once = threads / ROW_PIECES;
    static constexpr int token_pieces = TOKENS * ROW_PIECES / threads, weight_pieces = OUTPUTS * ROW_PIECES / threads;

    static_assert(stage_bytes * STAGES >= 4 * TOKENS * OUTPUTS, "the sums fit into the stages");
    static_assert(stage_bytes % 1024 == 0 && TOKENS % 8 == 0 && OUTPUTS % 64 == 0, "tiles begin where they may");
    static_assert(token_pieces > 0 && TOKENS * ROW_PIECES % threads == 0, "all threads bring as many pieces");
};

typedef HopperTile<16, 64, 5> Slim;
typedef HopperTile<64, 128, 4> Small;
typedef HopperTile<128, 128, 6> Even;
typedef HopperTile<256, 128, 4> Large;

// Where piece `piece` of row `row` lies, in bytes.
__device__ __forceinline__ int byte_at(int row, int piece) { return row * ROW_BYTES + (piece ^ (row & 7)) * 16; }

template <Format TYPE, class TILE> struct HopperBlock {
    static constexpr bool copied = is_float(TYPE);
    static constexpr Half half = TYPE == F16 ? HALF_F16 : HALF_BF16;

    const Product &product;
    u8 *stages;
    // The rows of which this thread brings pieces; of tokens that aren't there, none.
    const u16 *tokens[TILE::token_pieces];
    const u8 *weights[TILE::weight_pieces];
    Raw raw[copied ? 1 : TILE::weight_pieces];

    __device__ __forceinline__ int piece() const { return threadIdx.x % ROW_PIECES; }
    __device__ __forceinline__ int row(int index) const { return threadIdx.x / ROW_PIECES + index * TILE::rows_at_once; }
    __device__ __forceinline__ u8 *tokens_of(int stage) const { return stages + stage % TILE::stages * TILE::stage_bytes; }
    __device__ __forceinline__ u8 *weights_of(int stage) const { return tokens_of(stage) + TILE::tokens * ROW_BYTES; }

    __device__ __forceinline__ void find_weights(int first_out, size_t matrix, size_t bytes) {
#pragma unroll
        for (int i = 0; i < TILE::weight_pieces; i++) {
            int in_tile = row(i);
            if (product.second) {
                int out = min(first_out + in_tile / 16 * 8 + in_tile % 8, product.outs - 1);
                weights[i] = (in_tile & 8 ? product.second : product.weights) + matrix + out * bytes;
            } else {
                weights[i] = product.weights + matrix + min(first_out + in_tile, product.outs - 1) * bytes;
            }
        }
    }

    __device__ __forceinline__ void find_tokens(Rows rows, int first_row) {
#pragma unroll
        for (int i = 0; i < TILE::token_pieces; i++) {
            int at = first_row + row(i);
            tokens[i] = at < rows.end ? product.halves + place_of(product, at) * product.halves_stride : nullptr;
        }
    }

    // Starts to bring the tokens of stage `stage`.
    __device__ __forceinline__ void copy_tokens(int stage) {
        int column = stage * WIDTH + piece() * 8;
        u8 *to = tokens_of(stage);
#pragma unroll
        for (int i = 0; i < TILE::token_pieces; i++) {
            bool exists = column < product.cols && tokens[i];
            copy_async(to + byte_at(row(i), piece()), exists ? tokens[i] + column : product.halves, exists);
        }
    }

    // Starts to bring its weights, if they are halves.
    __device__ __forceinline__ void copy_weights(int stage) {
        if constexpr (copied) {
            int column = stage * WIDTH + piece() * 8;
            bool exists = column < product.cols;
            u8 *to = weights_of(stage);
#pragma unroll
            for (int i = 0; i < TILE::weight_pieces; i++) {
                copy_async(to + byte_at(row(i), piece()), weights[i] + (exists ? 2 * column : 0), exists);
            }
        }
    }

    // Loads quantized weights of a stage into registers.
    __device__ __forceinline__ void fetch(int stage) {
        if constexpr (!copied) {
            int column = stage * WIDTH + piece() * 8;
#pragma unroll
            for (int i = 0; i < TILE::weight_pieces; i++) {
                raw[i] = column < product.cols ? fetch_quantized<TYPE, false>(weights[i], column) : Raw{};
            }
        }
    }

    // Puts them into their stage as halves.
    __device__ __forceinline__ void decode(int stage) {
        if constexpr (!copied) {
            int column = stage * WIDTH + piece() * 8;
#pragma unroll
            for (int i = 0; i < TILE::weight_pieces; i++) {
                float values[8];
                decode_quantized<TYPE>(raw[i], column, values);
                uint4 words = {halves_of<half>(values[0], values[1]), halves_of<half>(values[2], values[3]),
                               halves_of<half>(values[4], values[5]), halves_of<half>(values[6], values[7])};
                *reinterpret_cast<uint4 *>(weights_of(stage) + byte_at(row(i), piece())) = words;
            }
        }
    }

    // Has the tensor cores multiply a stage.
    __device__ __forceinline__ void multiply(int stage, float (&sums)[TILE::tokens / 8][4]) {
        u64 left = matrix_descriptor(weights_of(stage) + warp_of_thread() / 4 * 64 * ROW_BYTES);
        u64 right = matrix_descriptor(tokens_of(stage));
        begin_products();
#pragma unroll
        for (int depth = 0; depth < WIDTH / 16; depth++) {
            multiply_tiles<half, TILE::tokens>(sums, left + depth * NEXT_COLUMNS, right + depth * NEXT_COLUMNS);
        }
        commit_products();
    }
};

// Blocks in x are tiles of tokens, in y of outputs; in z experts, or blocks that share a tile.
template <Format TYPE, class TILE> __device__ __forceinline__ void hopper_matmul(const Product &product) {
    DYNAMIC_SHARED(u8, shared);
    if (product.offsets) {
        wait_for_launches_before();
    }
    size_t bytes = row_bytes<TYPE>(product.cols);
    size_t matrix = product.offsets ? blockIdx.z * static_cast<size_t>(product.outs) * bytes : 0;
    Rows rows = rows_of(product);
    int first_row = rows.begin + blockIdx.x * TILE::tokens;
    int first_out = blockIdx.y * (product.second ? TILE::outputs / 2 : TILE::outputs);
    if (first_row >= rows.end) {
        return;
    }
    int all = (product.cols + WIDTH - 1) / WIDTH, first = 0, end = all;
    if (!product.offsets) {
        first = static_cast<int>(static_cast<u64>(all) * blockIdx.z / gridDim.z);
        end = static_cast<int>(static_cast<u64>(all) * (blockIdx.z + 1) / gridDim.z);
    }
    // Tiles begin at multiples of 1024 bytes.
    HopperBlock<TYPE, TILE> block = {product, shared + (-shared_address(shared) & 1023), {}, {}, {}};
    block.find_weights(first_out, matrix, bytes);
    // Weights come while the launch before this ends.
    for (int stage = first; stage < min(first + TILE::ahead, end); stage++) {
        block.copy_weights(stage);
        block.fetch(stage);
        block.decode(stage);
    }
    if (first + TILE::ahead < end) {
        block.fetch(first + TILE::ahead);
    }
    ask_for_norm(product, first_out, TILE::outputs);
    if (!product.offsets) {
        wait_for_launches_before();
    }
    block.find_tokens(rows, first_row);
    for (int stage = first; stage < first + TILE::ahead; stage++) {
        if (stage < end) {
            block.copy_tokens(stage);
        }
        commit_copies();
    }
    __shared__ float factors[DEFERRED_ROWS];
    if (TILE::tokens <= DEFERRED_ROWS) {
        find_deferred(product, first_row, rows.end, TILE::threads / 32, factors);
    }
    float sums[1][TILE::tokens / 8][4] = {};
    for (int stage = first; stage < end; stage++) {
        wait_for_copies<TILE::ahead - 1>();
        show_to_tensor_cores();
        __syncthreads();
        block.multiply(stage, sums[0]);
        int next = stage + TILE::ahead;
        if (next < end) {
            block.copy_tokens(next);
            block.copy_weights(next);
            block.decode(next);
            if (next + 1 < end) {
                block.fetch(next + 1);
            }
        }
        commit_copies();
        wait_for_products<1>();
    }
    wait_for_products<0>();
    if (!product.offsets && gridDim.z > 1 && !gather_sums<TILE>(product, sums)) {
        return;
    }
    // By way of shared memory, so that rows are written in one piece.
    wait_for_copies<0>();
    __syncthreads();
    float *tile = reinterpret_cast<float *>(block.stages);
    TILE::leave_sums(sums[0], tile);
    __syncthreads();
    store_tile<TILE>(product, rows, first_row, first_out, tile, factors);
}
