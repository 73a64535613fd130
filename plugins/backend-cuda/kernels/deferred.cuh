// Norms by the root mean square that have no launch of their own, where rows are few: a launch takes longer than what it does.
//
// A product's sums are as good divided by the root mean square as x is: it is one number for a row. So whoever computes a row
// writes it in halves times the norm's weights, not divided yet, with a sum of squares for every 64 columns; and products of
// these halves divide their results. Halves are BF16, whose exponents reach as far as those of floats.
#pragma once

#include "product.cuh"

constexpr int SQUARED = 64;
// Rows of a launch that has norms deferred, at most.
constexpr int DEFERRED_ROWS = 16;

// Asks for a norm's weights for outputs `first_out` to `first_out + outputs`: nobody else has read them lately.
__device__ __forceinline__ void ask_for_norm(const Product &product, int first_out, int outputs) {
    constexpr int of_line = 32;
    int out = first_out + of_line * static_cast<int>(threadIdx.x);
    if (product.norm_weight && out < min(first_out + outputs, product.outs)) {
        prefetch(product.norm_weight + out);
    }
}

// Leaves the squares of four neighbouring results of a row, whose sum each lane has; sixteen lanes have SQUARED columns. All lanes
// of a warp take part, also those without results.
__device__ __forceinline__ void leave_squares(const Product &product, int row, int out, bool exists, float squares) {
#pragma unroll
    for (int bits = 1; bits < SQUARED / 4; bits *= 2) {
        squares += __shfl_xor_sync(ALL_LANES, squares, bits);
    }
    if (exists && lane_of_thread() % (SQUARED / 4) == 0) {
        int sums = (product.outs + SQUARED - 1) / SQUARED;
        product.norm_squares[static_cast<size_t>(row) * sums + out / SQUARED] = squares;
    }
}

// Finds what the results of rows `first_row` to `end` are to be multiplied by, for a block of `warps` whole warps.
__device__ __forceinline__ void find_deferred(const Product &product, int first_row, int end, int warps, float *factors) {
    if (!product.x_squares) {
        return;
    }
    int sums = (product.cols + SQUARED - 1) / SQUARED;
    for (int row = warp_of_thread(); row < min(end - first_row, DEFERRED_ROWS); row += warps) {
        const float *from = product.x_squares + static_cast<size_t>(first_row + row) * sums;
        float squares = 0.0f;
        for (int i = lane_of_thread(); i < sums; i += 32) {
            squares += from[i];
        }
        squares = warp_sum(squares);
        if (lane_of_thread() == 0) {
            factors[row] = 1.0f / sqrtf(squares / product.cols + product.x_eps);
        }
    }
}
