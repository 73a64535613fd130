// Norms over rows, or over groups of a row's columns. A block computes one group.

#include "common.cuh"

// Divides by the root mean square of the group and multiplies by `weight + offset`.
KERNEL(rms_norm, const float *x, int x_stride, const float *weight, float *y, int y_stride, int group, float eps,
       float offset) {
    __shared__ float partial[32];
    const float *from = x + static_cast<size_t>(blockIdx.x) * x_stride + static_cast<size_t>(blockIdx.y) * group;
    float *to = y + static_cast<size_t>(blockIdx.x) * y_stride + static_cast<size_t>(blockIdx.y) * group;
    float squares = 0.0f;
    for (int col = threadIdx.x; col < group; col += blockDim.x) {
        squares = fmaf(from[col], from[col], squares);
    }
    squares = block_sum(squares, partial);
    float scale = 1.0f / sqrtf(squares / group + eps);
    for (int col = threadIdx.x; col < group; col += blockDim.x) {
        to[col] = from[col] * scale * (weight[col] + offset);
    }
}

// Subtracts the mean, divides by the standard deviation, times weight, plus bias where there is one.
KERNEL(layer_norm, const float *x, int x_stride, const float *weight, const float *bias, float *y, int y_stride,
       int cols, float eps) {
    __shared__ float partial[32];
    const float *from = x + static_cast<size_t>(blockIdx.x) * x_stride;
    float *to = y + static_cast<size_t>(blockIdx.x) * y_stride;
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
        to[col] = (from[col] - mean) * scale * weight[col] + (bias ? bias[col] : 0.0f);
    }
}
