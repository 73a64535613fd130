// Products of a few rows with a weight matrix, without tensor cores: bound by how fast weights come, or exact.
//
// A warp computes OUTS outputs for TOKENS tokens. Its lanes share the columns out, eight at a time, each sums its own
// in order, and the lanes' sums are added in one tree. So an output's value depends on its own row and weights alone:
// one token at a time and many give the same bits.
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

// Sums outputs `first_out` on for the tokens whose rows `xs` points to. Lane l has the sum of output
// `first_out + l / (32 / OUTS)` for token `l / (32 / OUTS / TOKENS) % TOKENS`.
template <Format TYPE, int TOKENS>
__device__ __forceinline__ float multiply(const u8 *weights, int outs, int cols, int first_out,
                                          const float *const *xs) {
    int lane = lane_of_thread();
    float sums[OUTS * TOKENS];
#pragma unroll
    for (int i = 0; i < OUTS * TOKENS; i++) {
        sums[i] = 0.0f;
    }
    for (int at = lane * 8; at < cols; at += 32 * 8) {
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
    int first_out = (blockIdx.x * WARPS + warp_of_thread()) * OUTS;
    if (first_out >= product.outs) {
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
        float sum = multiply<TYPE, TOKENS>(product.weights + matrix, product.outs, product.cols, first_out, xs);
        float second = 0.0f;
        if (product.second) {
            second = multiply<TYPE, TOKENS>(product.second + matrix, product.outs, product.cols, first_out, xs);
        }
        int row = first + index % TOKENS;
        if (lane % share == 0 && out < product.outs && row < rows.end) {
            store_result(product, row, out, result_of(product, row, out, sum, second));
        }
    }
}
