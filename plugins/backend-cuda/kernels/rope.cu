// Rotary embedding. The angles of a step's tokens are computed once for each table, in double precision, since
// a float can't tell one position from the next at the far end of a long context.

#include "rope.cuh"

// Cosine and sine of each token's position times each frequency, side by side.
KERNEL(rope_angles, const u32 *positions, const double *frequencies, int pairs, float magnitude, float *angles) {
    wait_for_launches_before();
    double position = positions[blockIdx.x];
    float *to = angles + static_cast<size_t>(blockIdx.x) * 2 * pairs;
    for (int pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
        double angle = position * frequencies[pair];
        to[2 * pair] = static_cast<float>(cos(angle)) * magnitude;
        to[2 * pair + 1] = static_cast<float>(sin(angle)) * magnitude;
    }
}

// Turns each head.
KERNEL(rope, const float *x, int x_stride, const float *angles, int pairs, int head_dim, int interleaved, float *y,
       int y_stride, int cols) {
    wait_for_launches_before();
    const float *from = x + static_cast<size_t>(blockIdx.x) * x_stride;
    const float *turns = angles + static_cast<size_t>(blockIdx.x) * 2 * pairs;
    float *to = y + static_cast<size_t>(blockIdx.x) * y_stride;
    for (int col = threadIdx.x; col < cols; col += blockDim.x) {
        to[col] = turned(from + col / head_dim * head_dim, col % head_dim, turns, pairs, interleaved);
    }
}
