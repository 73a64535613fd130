// What all tiled products do with the sums of a tile.
//
// Where there are too few tiles for the device, several blocks share a tile's columns. Each leaves its sums; the last
// one to arrive adds all up, in the order of columns, and so always to the same result.
#pragma once

#include "product.cuh"

// Adds up what the blocks that share this tile have summed: whether this block is the last, which then has it all.
template <class TILE, int DOWN, int ACROSS>
__device__ __forceinline__ bool gather_sums(const Product &product, float (&sums)[DOWN][ACROSS][4]) {
    size_t tile = blockIdx.x + static_cast<size_t>(blockIdx.y) * gridDim.x;
    constexpr size_t tile_sums = TILE::tokens * TILE::outputs;
    float *partials = product.partials + tile * gridDim.z * tile_sums + 4 * threadIdx.x;
    auto place = [&](int block, int i, int j) {
        return partials + block * tile_sums + static_cast<size_t>(i * ACROSS + j) * 4 * TILE::threads;
    };
#pragma unroll
    for (int i = 0; i < DOWN; i++) {
#pragma unroll
        for (int j = 0; j < ACROSS; j++) {
            float4 four = {sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]};
            *reinterpret_cast<float4 *>(place(blockIdx.z, i, j)) = four;
        }
    }
    if (!arrives_last(product.arrived + tile, gridDim.z, [] { TILE::wait(); })) {
        return false;
    }
#pragma unroll
    for (int i = 0; i < DOWN; i++) {
#pragma unroll
        for (int j = 0; j < ACROSS; j++) {
            float4 all = {0.0f, 0.0f, 0.0f, 0.0f};
            for (int block = 0; block < static_cast<int>(gridDim.z); block++) {
                float4 part = __ldcg(reinterpret_cast<const float4 *>(place(block, i, j)));
                all.x += part.x, all.y += part.y, all.z += part.z, all.w += part.w;
            }
            sums[i][j][0] = all.x, sums[i][j][1] = all.y, sums[i][j][2] = all.z, sums[i][j][3] = all.w;
        }
    }
    return true;
}

__device__ __forceinline__ void add(float (&to)[4], const float *from) {
    float4 four = *reinterpret_cast<const float4 *>(from);
    to[0] += four.x, to[1] += four.y, to[2] += four.z, to[3] += four.w;
}

// Takes in what the sums of four neighbouring outputs of a row come to.
__device__ __forceinline__ void store_four(const Product &product, int row, int out, float (&first)[4],
                                           float (&second)[4]) {
    if (out + 4 > product.outs) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (out + i < product.outs) {
                store_result(product, row, out + i, result_of(product, row, out + i, first[i], second[i]));
            }
        }
        return;
    }
    if (product.bias) {
        add(first, product.bias + out);
    }
    if (product.second) {
        if (product.second_bias) {
            add(second, product.second_bias + out);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            first[i] = activate(product.activation, first[i]) * second[i];
        }
    }
    if (product.residual) {
        add(first, product.residual + static_cast<size_t>(row) * product.residual_stride + out);
    }
    if (product.y) {
        float *to = product.y + static_cast<size_t>(row) * product.y_stride + out;
        *reinterpret_cast<float4 *>(to) = float4{first[0], first[1], first[2], first[3]};
    }
    if (product.y_halves) {
        u16 *to = product.y_halves + static_cast<size_t>(row) * product.y_halves_stride + out;
        bool f16 = product.y_half == HALF_F16;
        uint2 words = {f16 ? halves_of<HALF_F16>(first[0], first[1]) : halves_of<HALF_BF16>(first[0], first[1]),
                       f16 ? halves_of<HALF_F16>(first[2], first[3]) : halves_of<HALF_BF16>(first[2], first[3])};
        *reinterpret_cast<uint2 *>(to) = words;
    }
}

template <class TILE, bool GATED>
__device__ __forceinline__ void store_rows(const Product &product, Rows rows, int first_row, int first_out,
                                           const float *tile) {
    constexpr int fours = TILE::outputs / (GATED ? 8 : 4);
    for (int i = threadIdx.x; i < TILE::tokens * fours; i += TILE::threads) {
        int row = i / fours, in_tile = i % fours * 4, out = first_out + in_tile;
        if (first_row + row >= rows.end || out >= product.outs) {
            continue;
        }
        int column = GATED && TILE::takes_turns ? in_tile / 8 * 16 + in_tile % 8 : in_tile;
        int apart = TILE::takes_turns ? 8 : TILE::outputs / 2;
        float4 four = *reinterpret_cast<const float4 *>(tile + TILE::sum_at(row, column)), other = {};
        if (GATED) {
            other = *reinterpret_cast<const float4 *>(tile + TILE::sum_at(row, column + apart));
        }
        float first[4] = {four.x, four.y, four.z, four.w}, second[4] = {other.x, other.y, other.z, other.w};
        store_four(product, first_row + row, out, first, second);
    }
}

// Takes in the sums of a tile, which lie in shared memory where `TILE::sum_at` says. With two matrices either eight outputs
// of one and eight of the other take turns, or the upper half is the second's.
template <class TILE>
__device__ __forceinline__ void store_tile(const Product &product, Rows rows, int first_row, int first_out,
                                           const float *tile) {
    if (product.second) {
        store_rows<TILE, true>(product, rows, first_row, first_out, tile);
    } else {
        store_rows<TILE, false>(product, rows, first_row, first_out, tile);
    }
}
