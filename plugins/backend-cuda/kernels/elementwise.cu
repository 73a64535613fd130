// Ops whose result at a place depends on that place alone, and copies of rows and columns.

#include "activation.cuh"

// Kinds behind the activations, as in src/ops.rs.
constexpr int KIND_SCALE = 6;
constexpr int KIND_SOFTCAP = 7;

KERNEL(unary, int kind, float by, const float *x, int x_stride, float *y, int y_stride, int cols) {
    wait_for_launches_before();
    const float *from = x + static_cast<size_t>(blockIdx.x) * x_stride;
    float *to = y + static_cast<size_t>(blockIdx.x) * y_stride;
    for (int col = threadIdx.x; col < cols; col += blockDim.x) {
        float value = from[col];
        if (kind == KIND_SCALE) {
            value *= by;
        } else if (kind == KIND_SOFTCAP) {
            value = by * tanhf(value / by);
        } else {
            value = activate(kind, value);
        }
        to[col] = value;
    }
}

constexpr int KIND_ADD = 6;
constexpr int KIND_MUL = 7;

// A sum, a product, or `activation(a) × b`.
KERNEL(binary, int kind, const float *a, int a_stride, const float *b, int b_stride, float *y, int y_stride,
       int cols) {
    wait_for_launches_before();
    const float *left = a + static_cast<size_t>(blockIdx.x) * a_stride;
    const float *right = b + static_cast<size_t>(blockIdx.x) * b_stride;
    float *to = y + static_cast<size_t>(blockIdx.x) * y_stride;
    for (int col = threadIdx.x; col < cols; col += blockDim.x) {
        float value;
        if (kind == KIND_ADD) {
            value = left[col] + right[col];
        } else if (kind == KIND_MUL) {
            value = left[col] * right[col];
        } else {
            value = activate(kind, left[col]) * right[col];
        }
        to[col] = value;
    }
}

// Columns from `start` on, of the rows that `rows` names; of all rows where it is null.
KERNEL(gather, const u32 *rows, const float *x, int x_stride, int start, float *y, int y_stride, int cols) {
    wait_for_launches_before();
    size_t row = rows ? rows[blockIdx.x] : blockIdx.x;
    const float *from = x + row * x_stride + start;
    float *to = y + static_cast<size_t>(blockIdx.x) * y_stride;
    for (int col = threadIdx.x; col < cols; col += blockDim.x) {
        to[col] = from[col];
    }
}
