// Rows of floats as halves, for kernels on tensor cores.

#include "tensor.cuh"

KERNEL(pack, const float *x, int x_stride, int half, u16 *y, int y_stride, int cols) {
    wait_for_launches_before();
    const float *from = x + static_cast<size_t>(blockIdx.x) * x_stride;
    u16 *to = y + static_cast<size_t>(blockIdx.x) * y_stride;
    for (int col = 2 * threadIdx.x; col < cols; col += 2 * blockDim.x) {
        float first = from[col], second = col + 1 < cols ? from[col + 1] : 0.0f;
        *reinterpret_cast<u32 *>(to + col) =
            half == HALF_F16 ? halves_of<HALF_F16>(first, second) : halves_of<HALF_BF16>(first, second);
    }
}
