// Merges the parts that blocks of their own have attended to.

#include "attention.cuh"

// Blocks are tokens and heads.
KERNEL(attend_combine, const float *partials, const u32 *positions, int window, const float *sinks, float *y,
       int y_stride, int v_dim, int most_parts) {
    int position = positions[blockIdx.x], head = blockIdx.y;
    int parts = position / PART - first_seen(position, window) / PART + 1;
    size_t first = (static_cast<size_t>(blockIdx.x) * gridDim.y + head) * most_parts;
    for (int column = threadIdx.x; column < v_dim; column += blockDim.x) {
        Attended all = nothing_attended();
        for (int part = 0; part < parts; part++) {
            const float *place = partials + (first + part) * (v_dim + 2);
            all = merge(all, {place[0], place[1], place[2 + column]});
        }
        y[static_cast<size_t>(blockIdx.x) * y_stride + static_cast<size_t>(head) * v_dim + column] =
            finish(all, sinks, head);
    }
}
