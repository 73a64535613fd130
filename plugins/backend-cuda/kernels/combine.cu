// Merges the parts that blocks of their own have attended to.

#include "attention.cuh"

// Blocks in x are tiles of queries, as for `attend`; in y KV heads.
KERNEL(attend_combine, const float *partials, const u32 *row_offsets, const u32 *row_positions, const u32 *tiles,
       int group, int window, const float *sinks, float *y, int y_stride, u16 *halves, int halves_stride, int half,
       int v_dim, int most_parts) {
    wait_for_launches_before();
    int row = tiles[2 * blockIdx.x], first_query = tiles[2 * blockIdx.x + 1];
    int first_token = row_offsets[row], tokens = row_offsets[row + 1] - first_token;
    int queries = min(QUERIES, tokens * group - first_query);
    for (int i = threadIdx.x; i < queries * v_dim; i += blockDim.x) {
        int number = first_query + i / v_dim, column = i % v_dim;
        size_t token = first_token + number / group;
        int head = blockIdx.y * group + number % group;
        int position = static_cast<int>(row_positions[row]) + number / group;
        int parts = position / PART - first_seen(position, window) / PART + 1;
        size_t first = (token * gridDim.y * group + head) * most_parts;
        Attended all = nothing_attended();
        for (int part = 0; part < parts; part++) {
            const float *place = partials + (first + part) * (v_dim + 2);
            all = merge(all, {place[0], place[1], place[2 + column]});
        }
        size_t to = static_cast<size_t>(head) * v_dim + column;
        store_attended(y, token * y_stride + to, halves, token * halves_stride + to, half, finish(all, sinks, head));
    }
}
