// What a product of rows with a weight matrix is asked for, and what is done with its sums: for all kernels that
// compute one, on tensor cores or not.
#pragma once

#include "activation.cuh"
#include "tensor.cuh"

// As src/product.rs writes it down. Pointers are null where there is nothing.
struct Product {
    // `[outs][cols]`, for each expert where there are any. With `second` there are two matrices, and a result is
    // `activation(first) × second`.
    const u8 *weights, *second;
    const float *bias, *second_bias;
    // Added to the results.
    const float *residual;
    // The rows, in float and in halves: kernels on tensor cores read the latter, and are only launched where they
    // were written.
    const float *x;
    const u16 *halves;
    // Results in float, and in halves for the product behind this one.
    float *y;
    u16 *y_halves;
    // Experts: expert e has the pairs `offsets[e]` to `offsets[e + 1]`, and `rows` names each pair's row. Results lie
    // by pair; so do the rows of x where `by_pair`.
    const u32 *offsets, *rows;
    // Where blocks that share a tile leave their sums, and how many of them have; see matmul.cuh.
    float *partials;
    u32 *arrived;
    int x_stride, halves_stride, residual_stride, y_stride, y_halves_stride;
    int tokens, outs, cols;
    int activation, by_pair;
    // Whether halves are F16 or BF16.
    int y_half;
    // Warps that share columns out, in kernels that aren't on tensor cores.
    int parts;
    // A norm over the results, and the one that x comes from, if the products around a norm do it: see deferred.cuh.
    const float *norm_weight;
    float *norm_squares;
    const float *x_squares;
    float norm_offset, x_eps;
};

// The rows of x that a block's matrix is multiplied with: all, or those of an expert.
struct Rows {
    int begin, end;
};

__device__ __forceinline__ Rows rows_of(const Product &product) {
    if (!product.offsets) {
        return {0, product.tokens};
    }
    return {static_cast<int>(product.offsets[blockIdx.z]), static_cast<int>(product.offsets[blockIdx.z + 1])};
}

// Where row `row` of the rows lies in x.
__device__ __forceinline__ size_t place_of(const Product &product, int row) {
    return product.offsets && !product.by_pair ? product.rows[row] : row;
}

// The result of one output: `first` and `second` are the sums.
__device__ __forceinline__ float result_of(const Product &product, int row, int out, float first, float second) {
    float value = product.bias ? first + product.bias[out] : first;
    if (product.second) {
        value = activate(product.activation, value) * (product.second_bias ? second + product.second_bias[out] : second);
    }
    if (product.residual) {
        value += product.residual[static_cast<size_t>(row) * product.residual_stride + out];
    }
    return value;
}

__device__ __forceinline__ u16 half_by(int half, float value) {
    return half == HALF_F16 ? half_of<HALF_F16>(value) : half_of<HALF_BF16>(value);
}

// Takes the result of one output in.
__device__ __forceinline__ void store_result(const Product &product, int row, int out, float value) {
    if (product.y) {
        product.y[static_cast<size_t>(row) * product.y_stride + out] = value;
    }
    if (product.y_halves) {
        product.y_halves[static_cast<size_t>(row) * product.y_halves_stride + out] = half_by(product.y_half, value);
    }
}
