// Routing of rows to experts, and the lists that group rows by expert.

#include "common.cuh"

constexpr int SCORING_SOFTMAX = 0;

// Router logits to the weights of the `top_k` best experts, 0 for the others. A warp computes a row. Ties go to
// the lower expert, and a NaN counts as higher than any number.
KERNEL(route, const float *x, int x_stride, float *y, int y_stride, int experts, int top_k, int scoring,
       int renormalize, float by) {
    wait_for_launches_before();
    const float *logits = x + static_cast<size_t>(blockIdx.x) * x_stride;
    float *weights = y + static_cast<size_t>(blockIdx.x) * y_stride;
    int lane = lane_of_thread();
    float highest = -INFINITY_F;
    for (int expert = lane; expert < experts; expert += 32) {
        highest = logits[expert] > highest ? logits[expert] : highest;
    }
    highest = warp_max(highest);
    float total = 0.0f;
    for (int expert = lane; expert < experts; expert += 32) {
        total += expf(logits[expert] - highest);
        weights[expert] = 0.0f;
    }
    total = warp_sum(total);
    // The rank of an expert is the number of those before it.
    float chosen_total = 0.0f;
    for (int expert = lane; expert < experts; expert += 32) {
        float logit = logits[expert];
        int rank = 0;
        for (int other = 0; other < experts; other++) {
            float rival = logits[other];
            bool higher = rival > logit || (rival != rival && logit == logit);
            bool equal = rival == logit || (rival != rival && logit != logit);
            rank += higher || (equal && other < expert);
        }
        if (rank < top_k) {
            float score =
                scoring == SCORING_SOFTMAX ? expf(logit - highest) / total : 1.0f / (1.0f + expf(-logit));
            weights[expert] = score;
            chosen_total += score;
        }
    }
    chosen_total = warp_sum(chosen_total);
    float scale = renormalize ? by / chosen_total : by;
    for (int expert = lane; expert < experts; expert += 32) {
        // What wasn't chosen stays 0 even where the scale is NaN.
        if (weights[expert] != 0.0f) {
            weights[expert] *= scale;
        }
    }
}

// Lists the rows of each expert. A warp counts the rows of its experts, one thread adds the counts up, and the
// warps write the lists. Expert e has the pairs `offsets[e]` to `offsets[e + 1]` in the order of rows; `pairs` says of
// each row and expert which pair it is.
KERNEL(expert_lists, const float *routing, int stride, int tokens, int experts, u32 *offsets, u32 *rows, u32 *pairs) {
    wait_for_launches_before();
    int lane = lane_of_thread(), warps = blockDim.x >> 5;
    for (int expert = warp_of_thread(); expert < experts; expert += warps) {
        u32 count = 0;
        for (int row = lane; row < tokens; row += 32) {
            count += routing[static_cast<size_t>(row) * stride + expert] != 0.0f;
        }
        count = warp_sum(count);
        if (lane == 0) {
            offsets[expert + 1] = count;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        offsets[0] = 0;
        for (int expert = 0; expert < experts; expert++) {
            offsets[expert + 1] += offsets[expert];
        }
    }
    __syncthreads();
    for (int expert = warp_of_thread(); expert < experts; expert += warps) {
        u32 next = offsets[expert];
        for (int first = 0; first < tokens; first += 32) {
            int row = first + lane;
            bool chosen = row < tokens && routing[static_cast<size_t>(row) * stride + expert] != 0.0f;
            u32 votes = __ballot_sync(ALL_LANES, chosen);
            if (chosen) {
                u32 pair = next + __popc(votes & ((1u << lane) - 1));
                rows[pair] = row;
                pairs[static_cast<size_t>(row) * experts + expert] = pair;
            }
            next += __popc(votes);
        }
    }
}

// The weighted sum of what a row's experts gave, in the order of experts.
KERNEL(experts_sum, const float *routing, int routing_stride, const u32 *pairs, int experts, const float *x,
       int x_stride, float *y, int y_stride, int cols) {
    wait_for_launches_before();
    const float *shares = routing + static_cast<size_t>(blockIdx.x) * routing_stride;
    const u32 *mine = pairs + static_cast<size_t>(blockIdx.x) * experts;
    float *to = y + static_cast<size_t>(blockIdx.x) * y_stride;
    for (int col = threadIdx.x; col < cols; col += blockDim.x) {
        float sum = 0.0f;
        for (int expert = 0; expert < experts; expert++) {
            if (shares[expert] != 0.0f) {
                sum = fmaf(shares[expert], x[static_cast<size_t>(mine[expert]) * x_stride + col], sum);
            }
        }
        to[col] = sum;
    }
}
