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

    // Four side by side, where `holds_fours`.
    __device__ __forceinline__ void store_four(int col, float4 four) const {
        if (floats) {
            *reinterpret_cast<float4 *>(floats + col) = four;
        }
        if (halves) {
            uint2 words = {pair_by(four.x, four.y), pair_by(four.z, four.w)};
            *reinterpret_cast<uint2 *>(halves + col) = words;
        }
    }

    __device__ __forceinline__ u32 pair_by(float first, float second) const {
        return half == HALF_F16 ? halves_of<HALF_F16>(first, second) : halves_of<HALF_BF16>(first, second);
    }

    // Whether four columns from `first` on are an access of their own.
    __device__ __forceinline__ bool holds_fours(int first) const {
        return is_multiple(floats + first, 16) && is_multiple(halves + first, 8);
    }

    static __device__ __forceinline__ bool is_multiple(const void *place, int of) {
        return reinterpret_cast<size_t>(place) % of == 0;
    }
};

__device__ __forceinline__ Normed normed_row(float *y, int y_stride, u16 *halves, int halves_stride, int half) {
    size_t row = blockIdx.x;
    return {y ? y + row * y_stride : nullptr, halves ? halves + row * halves_stride : nullptr, half};
}

// Groups of four columns that stay in a thread's registers. Loads go ahead of stores, which might be to the same place.
constexpr int HELD = 2;

// Divides by the root mean square of the group and multiplies by `weight + offset`.
KERNEL_OF(512, rms_norm, const float *x, int x_stride, const float *weight, float *y, int y_stride, int group,
          float eps, float offset, u16 *halves, int halves_stride, int half) {
    __shared__ float partial[32];
    const float *from = x + static_cast<size_t>(blockIdx.x) * x_stride + static_cast<size_t>(blockIdx.y) * group;
    Normed to = normed_row(y, y_stride, halves, halves_stride, half);
    int first = blockIdx.y * group;
    bool in_fours = group % 4 == 0 && to.holds_fours(first) && to.is_multiple(from, 16) && to.is_multiple(weight, 16);
    // Those behind the columns that stay in registers.
    int behind = threadIdx.x + (in_fours ? 4 * HELD * blockDim.x : 0);
    float4 held[HELD] = {}, weights[HELD] = {};
    float squares = 0.0f;
    auto column = [&](int i) { return 4 * static_cast<int>(threadIdx.x + i * blockDim.x); };
    auto holds = [&](int i) { return in_fours && column(i) < group; };
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (holds(i)) {
            weights[i] = *reinterpret_cast<const float4 *>(weight + column(i));
        }
    }
    wait_for_launches_before();
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (holds(i)) {
            held[i] = *reinterpret_cast<const float4 *>(from + column(i));
        }
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        squares = fmaf(held[i].x, held[i].x, fmaf(held[i].y, held[i].y, squares));
        squares = fmaf(held[i].z, held[i].z, fmaf(held[i].w, held[i].w, squares));
    }
    for (int col = behind; col < group; col += blockDim.x) {
        squares = fmaf(from[col], from[col], squares);
    }
    squares = block_sum(squares, partial);
    float scale = 1.0f / sqrtf(squares / group + eps);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (holds(i)) {
            float4 x = held[i], w = weights[i];
            float4 four = {x.x * scale * (w.x + offset), x.y * scale * (w.y + offset), x.z * scale * (w.z + offset),
                           x.w * scale * (w.w + offset)};
            to.store_four(first + column(i), four);
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
