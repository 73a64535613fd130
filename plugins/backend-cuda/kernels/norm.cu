// Norms over rows, or over groups of a row's columns. A block computes one group, in floats, in halves, or in both.

#include "product.cuh"

// A row of results, of which a part may not be wanted.
struct Normed {
    float *floats;
    u16 *halves;
    int half;

    __device__ __forceinline__ void store(int col, float value) const {
        if (floats) {
            floats[col] = value;
        }
        if (halves) {
            halves[col] = half_by(half, value);
        }
    }
};

__device__ __forceinline__ Normed normed_row(float *y, int y_stride, u16 *halves, int halves_stride, int half) {
    size_t row = blockIdx.x;
    return {y ? y + row * y_stride : nullptr, halves ? halves + row * halves_stride : nullptr, half};
}

// Columns of a thread that stay in registers. Loads go ahead of stores, which might be to the same place.
constexpr int HELD = 8;

// Divides by the root mean square of the group and multiplies by `weight + offset`.
KERNEL_OF(512, rms_norm, const float *x, int x_stride, const float *weight, float *y, int y_stride, int group,
          float eps, float offset, u16 *halves, int halves_stride, int half) {
    __shared__ float partial[32];
    const float *from = x + static_cast<size_t>(blockIdx.x) * x_stride + static_cast<size_t>(blockIdx.y) * group;
    Normed to = normed_row(y, y_stride, halves, halves_stride, half);
    int first = blockIdx.y * group, behind = threadIdx.x + HELD * blockDim.x;
    float held[HELD], weights[HELD], squares = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int col = threadIdx.x + i * blockDim.x;
        weights[i] = col < group ? weight[col] + offset : 0.0f;
    }
    wait_for_launches_before();
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int col = threadIdx.x + i * blockDim.x;
        held[i] = col < group ? from[col] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        squares = fmaf(held[i], held[i], squares);
    }
    for (int col = behind; col < group; col += blockDim.x) {
        squares = fmaf(from[col], from[col], squares);
    }
    squares = block_sum(squares, partial);
    float scale = 1.0f / sqrtf(squares / group + eps);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int col = threadIdx.x + i * blockDim.x;
        if (col < group) {
            to.store(first + col, held[i] * scale * weights[i]);
        }
    }
    for (int col = behind; col < group; col += blockDim.x) {
        to.store(first + col, from[col] * scale * (weight[col] + offset));
    }
}

// Subtracts the mean, divides by the standard deviation, times weight, plus bias where there is one.
KERNEL(layer_norm, const float *x, int x_stride, const float *weight, const float *bias, float *y, int y_stride,
       int cols, float eps, u16 *halves, int halves_stride, int half) {
    wait_for_launches_before();
    __shared__ float partial[32];
    const float *from = x + static_cast<size_t>(blockIdx.x) * x_stride;
    Normed to = normed_row(y, y_stride, halves, halves_stride, half);
    float sum = 0.0f;
    for (int col = threadIdx.x; col < cols; col += blockDim.x) {
        sum += from[col];
    }
    float mean = block_sum(sum, partial) / cols;
    float squares = 0.0f;
    for (int col = threadIdx.x; col < cols; col += blockDim.x) {
        float distance = from[col] - mean;
        squares = fmaf(distance, distance, squares);
    }
    float scale = 1.0f / sqrtf(block_sum(squares, partial) / cols + eps);
    for (int col = threadIdx.x; col < cols; col += blockDim.x) {
        to.store(col, (from[col] - mean) * scale * weight[col] + (bias ? bias[col] : 0.0f));
    }
}
