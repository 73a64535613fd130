// What all tiled products do with the sums of a tile.
//
// Where there are too few tiles for the device, several blocks share a tile's columns. Each leaves its sums; the last
// one to arrive adds all up, in the order of columns, and so always to the same result.
#pragma once

#include "product.cuh"

// Adds up what the `parts` blocks that share a tile have summed, of which this is block `own`: whether it is the last, which
// then has it all. `sums_of` says where a block leaves the tile's sums, `arrived` counts them.
template <class TILE, class SumsOf, int DOWN, int ACROSS>
__device__ __forceinline__ bool gather_sums(float (&sums)[DOWN][ACROSS][4], int parts, int own, SumsOf sums_of,
                                            u32 *arrived) {
    auto place = [&](int part, int i, int j) {
        float *of_thread = sums_of(part) + 4 * threadIdx.x;
        return reinterpret_cast<float4 *>(of_thread + static_cast<size_t>(i * ACROSS + j) * 4 * TILE::threads);
    };
#pragma unroll
    for (int i = 0; i < DOWN; i++) {
#pragma unroll
        for (int j = 0; j < ACROSS; j++) {
            *place(own, i, j) = float4{sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]};
        }
    }
    if (!arrives_last(arrived, parts, [] { TILE::wait(); })) {
        return false;
    }
    // As many loads are on their way at a time as there are registers for: one takes as long.
    constexpr int columns = ACROSS < 8 ? ACROSS : 8, at_once = (DOWN > 2 ? 8 : 16) / columns;
#pragma unroll
    for (int i = 0; i < DOWN; i++) {
#pragma unroll
        for (int first_column = 0; first_column < ACROSS; first_column += columns) {
            float4 all[columns] = {};
#pragma unroll 1
            for (int first = 0; first < parts; first += at_once) {
                float4 found[at_once][columns];
#pragma unroll
                for (int part = 0; part < at_once; part++) {
#pragma unroll
                    for (int j = 0; j < columns; j++) {
                        bool exists = first + part < parts;
                        found[part][j] = exists ? __ldcg(place(first + part, i, first_column + j)) : float4{};
                    }
                }
#pragma unroll
                for (int part = 0; part < at_once; part++) {
#pragma unroll
                    for (int j = 0; j < columns; j++) {
                        all[j].x += found[part][j].x, all[j].y += found[part][j].y;
                        all[j].z += found[part][j].z, all[j].w += found[part][j].w;
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < columns; j++) {
                float(&to)[4] = sums[i][first_column + j];
                to[0] = all[j].x, to[1] = all[j].y, to[2] = all[j].z, to[3] = all[j].w;
            }
        }
    }
    return true;
}

// The same for the blocks in z of a tile, which blocks in x and y are.
template <class TILE, int DOWN, int ACROSS>
__device__ __forceinline__ bool gather_sums(const Product &product, float (&sums)[DOWN][ACROSS][4]) {
    size_t tile = blockIdx.x + static_cast<size_t>(blockIdx.y) * gridDim.x;
    constexpr size_t tile_sums = TILE::tokens * TILE::outputs;
    float *partials = product.partials + tile * gridDim.z * tile_sums;
    auto sums_of = [&](int part) { return partials + part * tile_sums; };
    return gather_sums<TILE>(sums, gridDim.z, blockIdx.z, sums_of, product.arrived + tile);
}

// Adds up to four floats that lie side by side; four begin at a multiple of sixteen bytes.
__device__ __forceinline__ void add(float (&to)[4], const float *from, int count) {
    if (count == 4) {
        float4 four = *reinterpret_cast<const float4 *>(from);
        to[0] += four.x, to[1] += four.y, to[2] += four.z, to[3] += four.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 3; i++) {
        to[i] += i < count ? from[i] : 0.0f;
    }
}

// Takes in what the sums of four neighbouring outputs of a row come to, or of those that there are.
template <bool GATED>
__device__ __forceinline__ void store_four(const Product &product, int row, int out, float (&first)[4],
                                           float (&second)[4]) {
    int count = min(4, product.outs - out);
    if (product.bias) {
        add(first, product.bias + out, count);
    }
    if (GATED) {
        if (product.second_bias) {
            add(second, product.second_bias + out, count);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            first[i] = activate(product.activation, first[i]) * second[i];
        }
    }
    if (product.residual) {
        add(first, product.residual + static_cast<size_t>(row) * product.residual_stride + out, count);
    }
    if (count < 4) {
#pragma unroll
        for (int i = 0; i < 3; i++) {
            if (i < count) {
                store_result(product, row, out + i, first[i]);
            }
        }
        return;
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
// Activations are much code.
#pragma unroll(GATED ? 1 : 4)
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
        store_four<GATED>(product, first_row + row, out, first, second);
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
