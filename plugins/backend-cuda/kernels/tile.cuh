// What all tiled products do with the sums of a tile.
//
// Where there are too few tiles for the device, several blocks share a tile's columns. Each leaves its sums; the last
// one to arrive adds all up, in the order of columns, and so always to the same result.
#pragma once

#include "deferred.cuh"

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

__device__ __forceinline__ void add(float (&to)[4], const float *from) {
    float4 four = *reinterpret_cast<const float4 *>(from);
    to[0] += four.x, to[1] += four.y, to[2] += four.z, to[3] += four.w;
}

// What the sums of four neighbouring outputs of a row come to: in `first`.
template <bool GATED>
__device__ __forceinline__ void finish_four(const Product &product, int row, int out, float (&first)[4],
                                            float (&second)[4]) {
    if (product.bias) {
        add(first, product.bias + out);
    }
    if (GATED) {
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
}

// Takes the results in, in floats and in halves.
__device__ __forceinline__ void store_four(const Product &product, int row, int out, const float (&floats)[4],
                                           const float (&halves)[4]) {
    if (product.y) {
        float *to = product.y + static_cast<size_t>(row) * product.y_stride + out;
        *reinterpret_cast<float4 *>(to) = float4{floats[0], floats[1], floats[2], floats[3]};
    }
    if (product.y_halves) {
        u16 *to = product.y_halves + static_cast<size_t>(row) * product.y_halves_stride + out;
        bool f16 = product.y_half == HALF_F16;
        uint2 words = {f16 ? halves_of<HALF_F16>(halves[0], halves[1]) : halves_of<HALF_BF16>(halves[0], halves[1]),
                       f16 ? halves_of<HALF_F16>(halves[2], halves[3]) : halves_of<HALF_BF16>(halves[2], halves[3])};
        *reinterpret_cast<uint2 *>(to) = words;
    }
}

// Takes in the results of four sums, of which another four lie `apart` where there are two matrices: the sum of their squares.
template <bool DEFERS, bool GATED>
__device__ __forceinline__ float take_four(const Product &product, int row, int out, const float *sums, int apart,
                                           float factor) {
    float4 four = *reinterpret_cast<const float4 *>(sums), other = {};
    if (GATED) {
        other = *reinterpret_cast<const float4 *>(sums + apart);
    }
    float first[4] = {four.x, four.y, four.z, four.w}, second[4] = {other.x, other.y, other.z, other.w};
    if (DEFERS) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            first[i] *= factor, second[i] *= factor;
        }
    }
    float normed[4] = {}, squares = 0.0f;
    bool norms = DEFERS && !GATED && product.norm_squares;
    if (norms) {
        add(normed, product.norm_weight + out);
    }
    finish_four<GATED>(product, row, out, first, second);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        normed[i] = norms ? first[i] * (normed[i] + product.norm_offset) : first[i];
        squares = fmaf(first[i], first[i], squares);
    }
    store_four(product, row, out, first, normed);
    return squares;
}

// The same of less than four, at the end of rows: in these no norm is deferred.
template <bool GATED>
__device__ __forceinline__ void take_some(const Product &product, int row, int out, const float *sums, int apart,
                                          float factor) {
#pragma unroll 1
    for (int i = 0; out + i < product.outs; i++) {
        float first = sums[i] * factor, second = GATED ? sums[i + apart] * factor : 0.0f;
        store_result(product, row, out + i, result_of(product, row, out + i, first, second));
    }
}

template <class TILE, bool GATED>
__device__ __forceinline__ void store_rows(const Product &product, Rows rows, int first_row, int first_out,
                                           const float *tile, const float *factors) {
    constexpr int fours = TILE::outputs / (GATED ? 8 : 4);
    constexpr bool defers = TILE::tokens <= DEFERRED_ROWS;
    static_assert(!defers || (TILE::tokens * fours % TILE::threads == 0 && TILE::outputs % SQUARED == 0),
                  "all lanes of a warp have as many results, and as many lanes a sum");
// Activations are much code, as is what becomes of norms; and few rows leave little to repeat.
#pragma unroll(GATED || defers ? 1 : 4)
    for (int i = threadIdx.x; i < TILE::tokens * fours; i += TILE::threads) {
        int row = i / fours, in_tile = i % fours * 4, out = first_out + in_tile;
        float squares = 0.0f;
        bool exists = first_row + row < rows.end && out < product.outs;
        if (exists) {
            int column = GATED && TILE::takes_turns ? in_tile / 8 * 16 + in_tile % 8 : in_tile;
            const float *sums = tile + TILE::sum_at(row, column);
            int other = GATED ? column + (TILE::takes_turns ? 8 : TILE::outputs / 2) : column;
            int apart = TILE::sum_at(row, other) - TILE::sum_at(row, column);
            float factor = defers && product.x_squares ? factors[row] : 1.0f;
            if (out + 4 <= product.outs) {
                squares = take_four<defers, GATED>(product, first_row + row, out, sums, apart, factor);
            } else {
                take_some<GATED>(product, first_row + row, out, sums, apart, factor);
            }
        }
        if (defers && !GATED && product.norm_squares) {
            leave_squares(product, first_row + row, out, exists, squares);
        }
    }
}

// Takes in the sums of a tile, which lie in shared memory where `TILE::sum_at` says. With two matrices either eight outputs
// of one and eight of the other take turns, or the upper half is the second's. `factors` are those of deferred norms, which
// only tiles of few rows have.
template <class TILE>
__device__ __forceinline__ void store_tile(const Product &product, Rows rows, int first_row, int first_out,
                                           const float *tile, const float *factors) {
    if (product.second) {
        store_rows<TILE, true>(product, rows, first_row, first_out, tile, factors);
    } else {
        store_rows<TILE, false>(product, rows, first_row, first_out, tile, factors);
    }
}
