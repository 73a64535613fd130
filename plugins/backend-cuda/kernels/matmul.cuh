// Products of many rows with a weight matrix, on tensor cores.
//
// A block computes a tile of tokens by outputs, DEPTH columns at a time. Tiles of both operands pass through stages of
// shared memory: while one is multiplied the next ones are on their way. Halves are copied asynchronously; quantized
// weights are loaded into registers a stage ahead and put into the stage as halves, so that they are decoded once for
// all tokens of the tile.
//
// A row of a stage is four pieces of sixteen bytes. Piece p of row r lies at place p ^ (r / 2 % 4), so that the eight
// rows which a warp reads at a time lie in different banks.
#pragma once

#include "formats.cuh"
#include "tile.cuh"

constexpr int DEPTH = 32;
constexpr int PIECES = DEPTH / 8;

// TOKENS × OUTPUTS for a block, shared out over WARPS_T × WARPS_O warps.
template <int TOKENS, int OUTPUTS, int WARPS_T, int WARPS_O, int STAGES_> struct Tile {
    static constexpr int tokens = TOKENS, outputs = OUTPUTS, stages = STAGES_;
    static constexpr int threads = 32 * WARPS_T * WARPS_O;
    // A warp's share, in products of 16 tokens by 8 outputs.
    static constexpr int down = TOKENS / WARPS_T / 16, across = OUTPUTS / WARPS_O / 8;
    static constexpr int warps_across = WARPS_O;
    static constexpr bool takes_turns = true;
    static __device__ __forceinline__ void wait() { __syncthreads(); }
    static constexpr int stage_halves = (TOKENS + OUTPUTS) * DEPTH;

    // Where a sum lies in shared memory: eight rows lie in different banks.
    static __device__ __forceinline__ int sum_at(int row, int column) {
        return row * outputs + (column ^ (row & 7) << 3);
    }

    static_assert(2 * stage_halves * STAGES_ >= 4 * TOKENS * OUTPUTS, "the sums fit into the stages");
    static_assert(TOKENS % (16 * WARPS_T) == 0 && OUTPUTS % (16 * WARPS_O) == 0, "a warp takes whole products");
};

typedef Tile<128, 128, 2, 4, 4> Wide;
typedef Tile<64, 64, 2, 2, 4> Middle;
typedef Tile<16, 64, 1, 4, 6> Narrow;

// Where piece `piece` of row `row` lies in a tile, in halves.
__device__ __forceinline__ int piece_at(int row, int piece) { return row * DEPTH + (piece ^ (row >> 1 & 3)) * 8; }

template <Format TYPE> struct HalfOf {
    static constexpr Half half = TYPE == F16 ? HALF_F16 : HALF_BF16;
};

// A block's part of a product.
template <Format TYPE, class TILE> struct Block {
    static constexpr Half half = HalfOf<TYPE>::half;
    static constexpr bool copied = is_float(TYPE);
    // Pieces of the weights' tile that a thread decodes.
    static constexpr int decoded = TILE::outputs * PIECES / TILE::threads;

    const Product &product;
    u16 *stages;
    const u8 *weights, *second;
    Rows rows;
    int first_row, first_out;
    size_t bytes;
    Raw raw[copied ? 1 : decoded];

    // Outputs of a tile: with two matrices eight of one and eight of the other take turns.
    __device__ __forceinline__ int outputs() const { return product.second ? TILE::outputs / 2 : TILE::outputs; }

    // Row `row` of the weights' tile.
    __device__ __forceinline__ const u8 *weights_of(int row) const {
        if (!product.second) {
            return weights + min(first_out + row, product.outs - 1) * bytes;
        }
        int out = min(first_out + row / 16 * 8 + row % 8, product.outs - 1);
        return (row & 8 ? second : weights) + out * bytes;
    }

    __device__ __forceinline__ u16 *tokens_of(int stage) const { return stages + stage % TILE::stages * TILE::stage_halves; }
    __device__ __forceinline__ u16 *weights_tile(int stage) const { return tokens_of(stage) + TILE::tokens * DEPTH; }

    // Starts to load stage `stage`, the columns from `stage × DEPTH` on.
    __device__ __forceinline__ void fetch(int stage) {
        u16 *tile = tokens_of(stage);
        for (int i = threadIdx.x; i < TILE::tokens * PIECES; i += TILE::threads) {
            int row = i / PIECES, piece = i % PIECES, column = stage * DEPTH + piece * 8;
            bool exists = first_row + row < rows.end && column < product.cols;
            size_t place = place_of(product, min(first_row + row, rows.end - 1));
            const u16 *from = product.halves + place * product.halves_stride + (exists ? column : 0);
            copy_async(tile + piece_at(row, piece), from, exists);
        }
        if constexpr (copied) {
            u16 *to = weights_tile(stage);
            for (int i = threadIdx.x; i < TILE::outputs * PIECES; i += TILE::threads) {
                int row = i / PIECES, piece = i % PIECES, column = stage * DEPTH + piece * 8;
                bool exists = column < product.cols;
                copy_async(to + piece_at(row, piece), weights_of(row) + (exists ? 2 * column : 0), exists);
            }
        } else {
#pragma unroll
            for (int i = 0; i < decoded; i++) {
                int index = threadIdx.x + i * TILE::threads;
                raw[i] = fetch_quantized<TYPE, false>(weights_of(index / PIECES), stage * DEPTH + index % PIECES * 8);
            }
        }
    }

    // Puts what was fetched into registers into its stage.
    __device__ __forceinline__ void decode(int stage) {
        if constexpr (!copied) {
#pragma unroll
            for (int i = 0; i < decoded; i++) {
                int index = threadIdx.x + i * TILE::threads;
                float values[8];
                decode_quantized<TYPE>(raw[i], stage * DEPTH + index % PIECES * 8, values);
                uint4 words = {halves_of<half>(values[0], values[1]), halves_of<half>(values[2], values[3]),
                               halves_of<half>(values[4], values[5]), halves_of<half>(values[6], values[7])};
                *reinterpret_cast<uint4 *>(weights_tile(stage) + piece_at(index / PIECES, index % PIECES)) = words;
            }
        }
    }

    // Multiplies the tiles of a stage.
    __device__ __forceinline__ void multiply(int stage, int token, int output,
                                             float (&sums)[TILE::down][TILE::across][4]) {
        const u16 *left = tokens_of(stage), *right = weights_tile(stage);
        int lane = lane_of_thread();
#pragma unroll
        for (int depth = 0; depth < PIECES; depth += 2) {
            u32 a[TILE::down][4], b[TILE::across / 2][4];
#pragma unroll
            for (int i = 0; i < TILE::down; i++) {
                load_matrices(a[i], left + piece_at(token + 16 * i + lane % 16, depth + lane / 16));
            }
#pragma unroll
            for (int i = 0; i < TILE::across / 2; i++) {
                int row = output + 16 * i + lane % 8 + lane / 16 * 8;
                load_matrices(b[i], right + piece_at(row, depth + lane / 8 % 2));
            }
#pragma unroll
            for (int i = 0; i < TILE::down; i++) {
#pragma unroll
                for (int j = 0; j < TILE::across; j++) {
                    multiply_add<half>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
                }
            }
        }
    }
};

// Blocks in x are tiles of tokens, in y of outputs; in z experts, or blocks that share a tile.
template <Format TYPE, class TILE> __device__ __forceinline__ void matmul(const Product &product) {
    DYNAMIC_SHARED(u16, shared);
    wait_for_launches_before();
    size_t bytes = row_bytes<TYPE>(product.cols);
    size_t matrix = product.offsets ? blockIdx.z * static_cast<size_t>(product.outs) * bytes : 0;
    Block<TYPE, TILE> block = {product, shared, product.weights + matrix,
                               product.second ? product.second + matrix : nullptr, rows_of(product), 0, 0, bytes, {}};
    block.first_row = block.rows.begin + blockIdx.x * TILE::tokens;
    block.first_out = blockIdx.y * block.outputs();
    if (block.first_row >= block.rows.end) {
        return;
    }
    // The stages of this block's columns.
    int all = (product.cols + DEPTH - 1) / DEPTH, first = 0, end = all;
    if (!product.offsets) {
        first = static_cast<int>(static_cast<u64>(all) * blockIdx.z / gridDim.z);
        end = static_cast<int>(static_cast<u64>(all) * (blockIdx.z + 1) / gridDim.z);
    }
    int warp = warp_of_thread();
    int token = warp / TILE::warps_across * TILE::down * 16, output = warp % TILE::warps_across * TILE::across * 8;
    float sums[TILE::down][TILE::across][4] = {};
    for (int ahead = 0; ahead < TILE::stages - 1; ahead++) {
        if (first + ahead < end) {
            block.fetch(first + ahead);
            block.decode(first + ahead);
        }
        commit_copies();
    }
    __shared__ float factors[DEFERRED_ROWS];
    if (TILE::tokens <= DEFERRED_ROWS) {
        find_deferred(product, block.first_row, block.rows.end, TILE::threads / 32, factors);
    }
    for (int stage = first; stage < end; stage++) {
        wait_for_copies<TILE::stages - 2>();
        __syncthreads();
        int next = stage + TILE::stages - 1;
        if (next < end) {
            block.fetch(next);
        }
        commit_copies();
        block.multiply(stage, token, output, sums);
        if (next < end) {
            block.decode(next);
        }
    }
    if (!product.offsets && gridDim.z > 1 && !gather_sums<TILE>(product, sums)) {
        return;
    }
    // By way of shared memory, so that rows are written in one piece and what becomes of a sum is compiled once.
    wait_for_copies<0>();
    __syncthreads();
    float *tile = reinterpret_cast<float *>(shared);
    int group = lane_of_thread() / 4, place = lane_of_thread() % 4 * 2;
#pragma unroll
    for (int i = 0; i < TILE::down; i++) {
#pragma unroll
        for (int j = 0; j < TILE::across; j++) {
            int row = token + 16 * i + group, column = output + 8 * j + place;
            *reinterpret_cast<float2 *>(tile + TILE::sum_at(row, column)) = {sums[i][j][0], sums[i][j][1]};
            *reinterpret_cast<float2 *>(tile + TILE::sum_at(row + 8, column)) = {sums[i][j][2], sums[i][j][3]};
        }
    }
    __syncthreads();
    store_tile<TILE>(product, block.rows, block.first_row, block.first_out, tile, factors);
}
