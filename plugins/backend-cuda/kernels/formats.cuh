// The weight formats: eight elements of a row at a time, as the checkpoint stores them.
//
// Blocks begin at even addresses, so that they are read two bytes at a time. Quantized formats are those of
// GGUF, bit for bit; a value is `scale × code + minimum`, in that order of rounding.
#pragma once

#include "half.cuh"

// The last is one of keys and values alone: see e4m3.cuh.
enum Format { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, F8_E4M3 };

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

// A whole number below 2²³ less another, exactly. The instruction that converts integers is much slower than these two.
__device__ __forceinline__ float number_of(u32 code, int zero) {
    return __uint_as_float(code | 0x4b000000) - static_cast<float>(8388608 + zero);
}

// The same of byte `index` of a word.
__device__ __forceinline__ float byte_number(u32 word, int index, int zero) {
    return __uint_as_float(__byte_perm(word, 0x4b000000, 0x7540 | index)) - static_cast<float>(8388608 + zero);
}

// Whether elements have something added to the product of scale and code, and what is subtracted from a code.
__device__ __forceinline__ constexpr bool has_minimum(Format format) {
    return format == Q4_1 || format == Q5_1 || format == Q2_K || format == Q4_K || format == Q5_K;
}

__device__ __forceinline__ constexpr int zero_of(Format format) {
    return format == Q4_0   ? 8
           : format == Q5_0 ? 16
           : format == Q8_0 ? 128
           : format == Q3_K ? 4
           : format == Q6_K ? 32
                            : 0;
}

// Codes of four neighbouring elements, a byte each, the first of which is `in_block` of its block: of their bytes, and of
// what else of them there is. In Q5_0 and Q5_1 that is a bit for each, in other formats again four bytes.
template <Format TYPE> __device__ __forceinline__ u32 codes_of(u32 low, u32 high, int in_block) {
    if constexpr (TYPE == Q4_0 || TYPE == Q4_1) {
        return low >> in_block / 16 * 4 & 0x0f0f0f0f;
    } else if constexpr (TYPE == Q5_0 || TYPE == Q5_1) {
        // Bit i times the product's bit 7 × i is bit 4 of byte i; no two products meet.
        return (low >> in_block / 16 * 4 & 0x0f0f0f0f) | ((high & 15) * 0x02040810 & 0x10101010);
    } else if constexpr (TYPE == Q8_0) {
        return low ^ 0x80808080;
    } else if constexpr (TYPE == Q2_K) {
        return low >> in_block % 128 / 32 * 2 & 0x03030303;
    } else if constexpr (TYPE == Q3_K) {
        return (low >> in_block % 128 / 32 * 2 & 0x03030303) | (high >> in_block / 32 & 0x01010101) << 2;
    } else if constexpr (TYPE == Q4_K) {
        return low >> in_block % 64 / 32 * 4 & 0x0f0f0f0f;
    } else if constexpr (TYPE == Q5_K) {
        return (low >> in_block % 64 / 32 * 4 & 0x0f0f0f0f) | (high >> in_block / 32 & 0x01010101) << 4;
    } else {
        int quarter = in_block % 128 / 32;
        return (low >> quarter / 2 * 4 & 0x0f0f0f0f) | (high >> quarter * 2 & 0x03030303) << 4;
    }
}

// Six-bit numbers in Q4_K and Q5_K, a byte each: those of the upper sub-blocks have their lower four bits in `top`, and the
// others in what `low` has above the numbers of the lower ones.
__device__ __forceinline__ u32 six_bits(u32 low, u32 top, bool upper) {
    return upper ? (top & 0x0f0f0f0f) | (low >> 2 & 0x30303030) : low & 0x3f3f3f3f;
}

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
        // Blocks are multiples of sixteen bytes.
        u32 sub = in_block / 32, byte = sub % 4;
        uint4 header = {};
        if constexpr (WHOLE_HEADERS) {
            header = *reinterpret_cast<const uint4 *>(block);
        } else {
            const u32 *words = reinterpret_cast<const u32 *>(block);
            header = {words[0], words[1], words[2], sub < 4 ? 0 : words[3]};
        }
        raw.scales = header.x;
        raw.small = __byte_perm(__byte_perm(header.y, header.z, byte * 0x11 | 0x40), header.w, byte * 0x1100 | 0x4410);
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
    if constexpr (has_minimum(TYPE)) {
        minimum = float_of_f16(static_cast<u16>(raw.scales >> 16));
    }
    u32 high[2] = {static_cast<u32>(raw.high), static_cast<u32>(raw.high >> 32)};
    if constexpr (TYPE == Q5_0 || TYPE == Q5_1) {
        high[0] = raw.small >> in_block % 16, high[1] = high[0] >> 4;
    } else if constexpr (TYPE == Q2_K) {
        scale = scale * number_of(raw.small & 15, 0);
        minimum = -(minimum * number_of(raw.small >> 4, 0));
    } else if constexpr (TYPE == Q3_K) {
        int sub = in_block / 16;
        u32 low = raw.small >> sub / 8 * 4 & 15, top = raw.small >> (8 + sub / 4 * 2) & 3;
        scale = scale * number_of(low | top << 4, 32);
    } else if constexpr (TYPE == Q4_K || TYPE == Q5_K) {
        // The scale, and the minimum above it.
        u32 top = (raw.small >> 16 & 0x0f) | (raw.small >> 12 & 0x0f00);
        u32 both = six_bits(raw.small, top, in_block / 32 >= 4);
        scale = scale * byte_number(both, 0, 0);
        minimum = -(minimum * byte_number(both, 1, 0));
    } else if constexpr (TYPE == Q6_K) {
        scale = scale * number_of(raw.small ^ 128, 128);
    }
    u32 codes[2] = {codes_of<TYPE>(static_cast<u32>(raw.low), high[0], in_block),
                    codes_of<TYPE>(static_cast<u32>(raw.low >> 32), high[1], in_block)};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float code = byte_number(codes[i / 4], i % 4, zero_of(TYPE));
        // With a minimum the product is exact: it has no more bits than a float has.
        values[i] = has_minimum(TYPE) ? fmaf(scale, code, minimum) : scale * code;
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
