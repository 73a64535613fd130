// Linear layers and experts, for one weight format.
//
// A block's warps take neighbouring tiles of outputs for the same tokens. Launches with a single token have
// kernels of their own (`one`), the others take eight at a time (`many`).

#include "linear.cuh"

#define DEFINE_LINEAR(NAME, TOKENS)                                                                                    \
    KERNEL_OF(128, NAME, const u8 *weights, const float *bias, const float *x, int x_stride, float *y, int y_stride,   \
              int tokens, int outs, int cols) {                                                                        \
        int first_out = (blockIdx.x * WARPS + warp_of_thread()) * OUTS;                                                \
        int first = blockIdx.y * TOKENS;                                                                               \
        if (first_out >= outs) {                                                                                       \
            return;                                                                                                    \
        }                                                                                                              \
        const float *xs[TOKENS];                                                                                       \
        for (int token = 0; token < TOKENS; token++) {                                                                 \
            xs[token] = x + static_cast<size_t>(min(first + token, tokens - 1)) * x_stride;                            \
        }                                                                                                              \
        multiply<FORMAT, TOKENS>(weights, outs, cols, first_out, xs, [&](int out, int token, float value) {            \
            if (first + token < tokens) {                                                                              \
                y[static_cast<size_t>(first + token) * y_stride + out] = bias ? value + bias[out] : value;             \
            }                                                                                                          \
        });                                                                                                            \
    }

// The rows that chose an expert are listed by `expert_lists`: expert e has the pairs `offsets[e]` to
// `offsets[e + 1]`, and `rows` names each pair's row. Results lie by pair; so does x where `by_pair`.
#define DEFINE_EXPERTS(NAME, TOKENS)                                                                                   \
    KERNEL_OF(128, NAME, const u8 *weights, const u32 *offsets, const u32 *rows, int by_pair, const float *x,          \
              int x_stride, float *y, int y_stride, int outs, int cols) {                                              \
        int first_out = (blockIdx.x * WARPS + warp_of_thread()) * OUTS;                                                \
        if (first_out >= outs) {                                                                                       \
            return;                                                                                                    \
        }                                                                                                              \
        int begin = offsets[blockIdx.z], end = offsets[blockIdx.z + 1];                                                \
        const u8 *matrix = weights + blockIdx.z * static_cast<size_t>(outs) * row_bytes<FORMAT>(cols);                 \
        for (int first = begin + blockIdx.y * TOKENS; first < end; first += gridDim.y * TOKENS) {                      \
            const float *xs[TOKENS];                                                                                   \
            for (int token = 0; token < TOKENS; token++) {                                                             \
                int pair = min(first + token, end - 1);                                                                \
                xs[token] = x + static_cast<size_t>(by_pair ? pair : rows[pair]) * x_stride;                           \
            }                                                                                                          \
            multiply<FORMAT, TOKENS>(matrix, outs, cols, first_out, xs, [&](int out, int token, float value) {         \
                if (first + token < end) {                                                                             \
                    y[static_cast<size_t>(first + token) * y_stride + out] = value;                                    \
                }                                                                                                      \
            });                                                                                                        \
        }                                                                                                              \
    }

DEFINE_LINEAR(JOIN(linear_one, FORMAT), 1)
DEFINE_LINEAR(JOIN(linear_many, FORMAT), 8)
DEFINE_EXPERTS(JOIN(experts_one, FORMAT), 1)
DEFINE_EXPERTS(JOIN(experts_many, FORMAT), 8)

#undef DEFINE_LINEAR
#undef DEFINE_EXPERTS
