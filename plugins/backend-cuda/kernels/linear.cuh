// Products of a few rows with a weight matrix, without tensor cores: bound by how fast weights come, or exact.
//
// A warp computes OUTS outputs for TOKENS tokens; where outputs are few, several warps share their columns out. Its lanes
// share the columns out, eight at a time, each sums its own in order, the lanes' sums are added in one tree, and then those
// of the warps in order. How many warps there are depends on the matrix alone, and so an output's value on its own row and
// weights: one token at a time and many give the same bits.
#pragma once

#include "formats.cuh"
#include "product.cuh"

constexpr int OUTS = 4;
constexpr int WARPS = 4;

// Adds up `sums` over the lanes. Each step halves what a lane is in charge of while there is more than one
// sum; in the end lane l holds the total of sum `l / (32 / COUNT)`.
template <int COUNT> __device__ __forceinline__ float reduce(float *sums) {
    int lane = lane_of_thread();
    int count = COUNT;
#pragma unroll
    for (int bits = 16; bits > 0; bits >>= 1) {
        if (count > 1) {
            count /= 2;
            bool upper = lane & bits;
#pragma unroll
            for (int i = 0; i < COUNT / 2; i++) {
                if (i < count) {
                    float given = upper ? sums[i] : sums[i + count];
                    float kept = upper ? sums[i + count] : sums[i];
                    sums[i] = kept + __shfl_xor_sync(ALL_LANES, given, bits);
                }
            }
        } else {
            sums[0] += __shfl_xor_sync(ALL_LANES, sums[0], bits);
        }
    }
    return sums[0];
}

// Sums part `part` of `parts` of the columns, of outputs `first_out` on for the tokens whose rows `xs` points to. Lane l has the sum of output
// `first_out + l / (32 / OUTS)` for token `l / (32 / OUTS / TOKENS) % TOKENS`.
template <Format TYPE, int TOKENS>
__device__ __forceinline__ float multiply(const u8 *weights, int outs, int cols, int first_out,
                                          int part, int parts, const float *const *xs) {
    int lane = lane_of_thread();
    float sums[OUTS * TOKENS];
#pragma unroll
    for (int i = 0; i < OUTS * TOKENS; i++) {
        sums[i] = 0.0f;
    }
    // One token leaves registers for what comes next to be on its way.
#pragma unroll(TOKENS == 1 ? 2 : 1)
    for (int at = (part * 32 + lane) * 8; at < cols; at += parts * 32 * 8) {
        float w[OUTS][8];
        if constexpr (is_float(TYPE)) {
#pragma unroll
            for (int out = 0; out < OUTS; out++) {
                int row = min(first_out + out, outs - 1);
                load_weights<TYPE>(weights + row * row_bytes<TYPE>(cols), at, cols, w[out]);
            }
        } else {
            // All loads go ahead of what is computed.
            Raw raw[OUTS];
#pragma unroll
            for (int out = 0; out < OUTS; out++) {
                int row = min(first_out + out, outs - 1);
                raw[out] = fetch_quantized<TYPE, true>(weights + row * row_bytes<TYPE>(cols), at);
            }
#pragma unroll
            for (int out = 0; out < OUTS; out++) {
                decode_quantized<TYPE>(raw[out], at, w[out]);
            }
        }
#pragma unroll
        for (int token = 0; token < TOKENS; token++) {
            float x[8];
            if (at + 8 <= cols) {
                load_floats<F32>(reinterpret_cast<const u8 *>(xs[token]), at, x);
            } else {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    x[i] = at + i < cols ? xs[token][at + i] : 0.0f;
                }
            }
#pragma unroll
            for (int out = 0; out < OUTS; out++) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    sums[out * TOKENS + token] = fmaf(w[out][i], x[i], sums[out * TOKENS + token]);
                }
            }
        }
    }
    return reduce<OUTS * TOKENS>(sums);
}

// The outputs of this warp, for all rows of its matrix, TOKENS at a time.
template <Format TYPE, int TOKENS> __device__ __forceinline__ void linear(const Product &product) {
    int parts = product.parts, warp = warp_of_thread(), part = warp % parts;
    int first_out = (blockIdx.x * (WARPS / parts) + warp / parts) * OUTS;
    if (TOKENS == 1 && !product.offsets) {
        // The first weights, while the launch before this ends.
        int at = (part * 32 + lane_of_thread()) * 8;
        for (int out = first_out; at < product.cols && out < min(first_out + OUTS, product.outs); out++) {
            size_t place = out * row_bytes<TYPE>(product.cols) + at / block_elements(TYPE) * block_bytes(TYPE);
            prefetch(product.weights + place);
            if (product.second) {
                prefetch(product.second + place);
            }
        }
    }
    wait_for_launches_before();
    if (parts == 1 && first_out >= product.outs) {
        return;
    }
    Rows rows = rows_of(product);
    size_t matrix = product.offsets ? blockIdx.z * static_cast<size_t>(product.outs) * row_bytes<TYPE>(product.cols) : 0;
    constexpr int share = 32 / (OUTS * TOKENS);
    int lane = lane_of_thread(), index = lane / share;
    int out = first_out + index / TOKENS;
    for (int first = rows.begin + blockIdx.y * TOKENS; first < rows.end; first += gridDim.y * TOKENS) {
        const float *xs[TOKENS];
#pragma unroll
        for (int token = 0; token < TOKENS; token++) {
            xs[token] = product.x + place_of(product, min(first + token, rows.end - 1)) * product.x_stride;
        }
        float sums[2] = {};
#pragma unroll 1
        for (int which = 0; which < (product.second ? 2 : 1); which++) {
            const u8 *weights = which ? product.second : product.weights;
            sums[which] = multiply<TYPE, TOKENS>(weights + matrix, product.outs, product.cols, first_out, part, parts, xs);
        }
        if (parts > 1) {
            __shared__ float found[2][WARPS][32];
            __syncthreads();
            found[0][warp][lane] = sums[0], found[1][warp][lane] = sums[1];
            __syncthreads();
            if (part != 0) {
                continue;
            }
            for (int other = 1; other < parts; other++) {
                sums[0] += found[0][warp + other][lane], sums[1] += found[1][warp + other][lane];
            }
        }
        int row = first + index % TOKENS;
        if (lane % share == 0 && out < product.outs && row < rows.end) {
            store_result(product, row, out, result_of(product, row, out, sums[0], sums[1]));
        }
    }
}
