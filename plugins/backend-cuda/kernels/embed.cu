// Rows of an embedding table, for one weight format.

#include "formats.cuh"

#define NAME JOIN(embed, FORMAT)
KERNEL_OF(1024, NAME, const u32 *tokens, const u8 *table, float scale, float *y, int y_stride, int cols) {
    wait_for_launches_before();
    const u8 *row = table + tokens[blockIdx.x] * row_bytes<FORMAT>(cols);
    float *to = y + static_cast<size_t>(blockIdx.x) * y_stride;
    for (int at = threadIdx.x * 8; at < cols; at += blockDim.x * 8) {
        float values[8];
        load_weights<FORMAT>(row, at, cols, values);
        if (at + 8 <= cols && reinterpret_cast<size_t>(to) % 16 == 0) {
            float4 *fours = reinterpret_cast<float4 *>(to + at);
            fours[0] = float4{values[0] * scale, values[1] * scale, values[2] * scale, values[3] * scale};
            fours[1] = float4{values[4] * scale, values[5] * scale, values[6] * scale, values[7] * scale};
            continue;
        }
        for (int i = 0; i < 8 && at + i < cols; i++) {
            to[at + i] = values[i] * scale;
        }
    }
}
#undef NAME
