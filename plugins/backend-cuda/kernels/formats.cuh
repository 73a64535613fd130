// The weight formats: eight elements of a row at a time, as the checkpoint stores them.
//
// Blocks begin at even addresses, so that they are read two bytes at a time. Quantized formats are those of
// GGUF, bit for bit; a value is `scale × code + minimum`, in that order of rounding.
#pragma once

#include "half.cuh"

enum Format { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K };

__device__ __forceinline__ constexpr bool is_float(Format format) { return format <= BF16; }

__device__ __forceinline__ constexpr int block_elements(Format format) {
    return is_float(format) ? 1 : format <= Q8_0 ? 32 : 256;
}

__device__ __forceinline__ constexpr int block_bytes(Format format) {
    constexpr int bytes[] = {4, 2, 2, 18, 20, 22, 24, 34, 84, 110, 144, 176, 210};
    return bytes[format];
}

__device__ __forceinline__ u16 half_at(const u8 *bytes) { return *reinterpret_cast<const u16 *>(bytes); }

// Eight bytes, the first in the lowest bits.
__device__ __forceinline__ u64 bytes_at(const u8 *bytes) {
    return static_cast<u64>(half_at(bytes)) | static_cast<u64>(half_at(bytes + 2)) << 16 |
           static_cast<u64>(half_at(bytes + 4)) << 32 | static_cast<u64>(half_at(bytes + 6)) << 48;
}

// The same from an address that is a multiple of eight: where blocks are.
__device__ __forceinline__ u64 aligned_bytes_at(const u8 *bytes) { return *reinterpret_cast<const u64 *>(bytes); }

__device__ __forceinline__ u32 byte_of(u64 bytes, int index) { return static_cast<u32>(bytes >> 8 * index) & 255; }

// Eight elements of a quantized row as they lie in memory: what has to be loaded, before anything is computed with it,
// so that loads can run ahead. What a format doesn't have is never read.
struct Raw {
    // Codes in eight bytes; and what else of them lies elsewhere.
    u64 low, high;
    // The block's scale, and in the upper half its minimum.
    u32 scales;
    // Scales of sub-blocks, and bits.
    u32 small;
};

// Elements `at` to `at + 8` of a quantized row; `at` is a multiple of 8. With WHOLE_HEADERS what all sub-blocks of a
// block share is one load where it can be, which takes more registers.
template <Format TYPE, bool WHOLE_HEADERS> __device__ __forceinline__ Raw fetch_quantized(const u8 *row, int at) {
    const u8 *block = row + static_cast<size_t>(at / block_elements(TYPE)) * block_bytes(TYPE);
    int in_block = at % block_elements(TYPE);
    Raw raw = {};
    if constexpr (TYPE == Q4_0 || TYPE == Q4_1 || TYPE == Q5_0 || TYPE == Q5_1) {
        constexpr bool has_minimum = TYPE == Q4_1 || TYPE == Q5_1;
        constexpr bool has_fifth = TYPE == Q5_0 || TYPE == Q5_1;
        constexpr int high_at = has_minimum ? 4 : 2;
        raw.scales = half_at(block) | (has_minimum ? static_cast<u32>(half_at(block + 2)) << 16 : 0);
        raw.low = bytes_at(block + high_at + (has_fifth ? 4 : 0) + in_block % 16);
        raw.small = has_fifth ? half_at(block + high_at + in_block / 16 * 2) : 0;
    } else if constexpr (TYPE == Q8_0) {
        raw.scales = half_at(block);
        raw.low = bytes_at(block + 2 + in_block);
    } else if constexpr (TYPE == Q2_K) {
        raw.scales = half_at(block + 80) | static_cast<u32>(half_at(block + 82)) << 16;
        raw.small = block[in_block / 16];
        raw.low = bytes_at(block + 16 + in_block / 128 * 32 + in_block % 32);
    } else if constexpr (TYPE == Q3_K) {
        int sub = in_block / 16;
        raw.scales = half_at(block + 108);
        raw.small = block[96 + sub % 8] | static_cast<u32>(block[104 + sub % 4]) << 8;
        raw.low = bytes_at(block + 32 + in_block / 128 * 32 + in_block % 32);
        raw.high = bytes_at(block + in_block % 32);
    } else if constexpr (TYPE == Q4_K || TYPE == Q5_K) {
        // Six-bit scales and minima of eight sub-blocks lie in twelve bytes: those of the upper four in pieces. Blocks
        // are multiples of sixteen bytes.
        int sub = in_block / 32, shift = sub % 4 * 8;
        uint4 header = {};
        if constexpr (WHOLE_HEADERS) {
            header = *reinterpret_cast<const uint4 *>(block);
        } else {
            const u32 *words = reinterpret_cast<const u32 *>(block);
            header = {words[0], words[1], words[2], sub < 4 ? 0 : words[3]};
        }
        u32 first = (sub < 4 ? header.y : header.w) >> shift & 255;
        raw.scales = header.x;
        raw.small = first | (header.y >> shift & 255) << 8 | (header.z >> shift & 255) << 16;
        raw.low = aligned_bytes_at(block + (TYPE == Q4_K ? 16 : 48) + in_block / 64 * 32 + in_block % 32);
        raw.high = TYPE == Q5_K ? aligned_bytes_at(block + 16 + in_block % 32) : 0;
    } else {
        raw.scales = half_at(block + 208);
        raw.small = block[192 + in_block / 16];
        raw.low = bytes_at(block + in_block / 128 * 64 + in_block % 64);
        raw.high = bytes_at(block + 128 + in_block / 128 * 32 + in_block % 32);
    }
    return raw;
}

// What was fetched, as numbers.
template <Format TYPE> __device__ __forceinline__ void decode_quantized(const Raw &raw, int at, float *values) {
    int in_block = at % block_elements(TYPE);
    float scale = float_of_f16(static_cast<u16>(raw.scales)), minimum = 0.0f;
    // Codes in eight bytes, and what is subtracted of them.
    u64 codes = raw.low;
    int zero = 0;
    if constexpr (TYPE == Q4_0 || TYPE == Q4_1 || TYPE == Q5_0 || TYPE == Q5_1) {
        constexpr bool has_minimum = TYPE == Q4_1 || TYPE == Q5_1;
        constexpr bool has_fifth = TYPE == Q5_0 || TYPE == Q5_1;
        minimum = has_minimum ? float_of_f16(static_cast<u16>(raw.scales >> 16)) : 0.0f;
        zero = has_minimum ? 0 : has_fifth ? 16 : 8;
        codes = codes >> (in_block / 16 * 4) & 0x0f0f0f0f0f0f0f0full;
        if constexpr (has_fifth) {
            u64 high = raw.small >> in_block % 16 & 255;
            // A copy of the bits in each byte, of which byte i keeps bit i, which the sum moves to the top.
            u64 spread = (high * 0x0101010101010101ull) & 0x8040201008040201ull;
            codes |= ((spread + 0x7f7f7f7f7f7f7f7full) & 0x8080808080808080ull) >> 3;
        }
    } else if constexpr (TYPE == Q8_0) {
        codes ^= 0x8080808080808080ull;
        zero = 128;
    } else if constexpr (TYPE == Q2_K) {
        scale = scale * (raw.small & 15);
        minimum = -(float_of_f16(static_cast<u16>(raw.scales >> 16)) * (raw.small >> 4));
        codes = codes >> (in_block % 128 / 32 * 2) & 0x0303030303030303ull;
    } else if constexpr (TYPE == Q3_K) {
        int sub = in_block / 16;
        int low = raw.small >> (sub / 8 * 4) & 15, high = raw.small >> (8 + sub / 4 * 2) & 3;
        scale = scale * ((low | high << 4) - 32);
        zero = 4;
        codes = (codes >> (in_block % 128 / 32 * 2) & 0x0303030303030303ull) |
                (raw.high >> in_block / 32 & 0x0101010101010101ull) << 2;
    } else if constexpr (TYPE == Q4_K || TYPE == Q5_K) {
        bool upper = in_block / 32 >= 4;
        u32 first = raw.small & 255, second = raw.small >> 8 & 255, third = raw.small >> 16;
        scale = scale * static_cast<float>(upper ? (first & 15) | second >> 6 << 4 : first & 63);
        float least = static_cast<float>(upper ? first >> 4 | third >> 6 << 4 : third & 63);
        minimum = -(float_of_f16(static_cast<u16>(raw.scales >> 16)) * least);
        codes = codes >> (in_block % 64 / 32 * 4) & 0x0f0f0f0f0f0f0f0full;
        if constexpr (TYPE == Q5_K) {
            codes |= (raw.high >> in_block / 32 & 0x0101010101010101ull) << 4;
        }
    } else {
        int quarter = in_block % 128 / 32;
        scale = scale * static_cast<signed char>(raw.small);
        zero = 32;
        codes = (codes >> (quarter / 2 * 4) & 0x0f0f0f0f0f0f0f0full) |
                (raw.high >> (quarter * 2) & 0x0303030303030303ull) << 4;
    }
    for (int i = 0; i < 8; i++) {
        values[i] = scale * static_cast<float>(static_cast<int>(byte_of(codes, i)) - zero) + minimum;
    }
}

template <Format TYPE> __device__ __forceinline__ void load_quantized(const u8 *row, int at, float *values) {
    decode_quantized<TYPE>(fetch_quantized<TYPE, true>(row, at), at, values);
}

template <Format TYPE> __device__ __forceinline__ float load_float(const u8 *row, int at) {
    if constexpr (TYPE == F32) {
        return reinterpret_cast<const float *>(row)[at];
    } else if constexpr (TYPE == F16) {
        return float_of_f16(reinterpret_cast<const u16 *>(row)[at]);
    } else {
        return float_of_bf16(reinterpret_cast<const u16 *>(row)[at]);
    }
}

// Eight floats of a row whose length is a multiple of 8, and whose start is so aligned.
template <Format TYPE> __device__ __forceinline__ void load_floats(const u8 *row, int at, float *values) {
    if constexpr (TYPE == F32) {
        const float4 *from = reinterpret_cast<const float4 *>(row) + at / 4;
        float4 low = from[0], high = from[1];
        values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
        values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    } else {
        uint4 bits = reinterpret_cast<const uint4 *>(row)[at / 8];
        u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
        for (int i = 0; i < 8; i++) {
            u16 half = static_cast<u16>(words[i / 2] >> (i % 2 * 16));
            values[i] = TYPE == F16 ? float_of_f16(half) : float_of_bf16(half);
        }
    }
}

// Elements `at` to `at + 8` of a row of `cols`; 0 for those behind its end.
template <Format TYPE> __device__ __forceinline__ void load_weights(const u8 *row, int at, int cols, float *values) {
    if constexpr (!is_float(TYPE)) {
        load_quantized<TYPE>(row, at, values);
    } else if (cols % 8 == 0) {
        load_floats<TYPE>(row, at, values);
    } else {
        for (int i = 0; i < 8; i++) {
            values[i] = at + i < cols ? load_float<TYPE>(row, at + i) : 0.0f;
        }
    }
}

// Bytes of a row.
template <Format TYPE> __device__ __forceinline__ size_t row_bytes(int cols) {
    return static_cast<size_t>(cols / block_elements(TYPE)) * block_bytes(TYPE);
}
