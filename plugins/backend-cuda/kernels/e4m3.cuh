// Keys and values in eight bits: codes of e4m3, with a scale for each head of a token, a power of two.
//
// A scale is kept as the exponent's bits of a float that is 2^120 times as large. Moved to where BF16 has such bits, a code
// is 2^-120 of what it was; times the scale with those bits it is the element, exactly, also where codes are subnormal.
// A head of which an element isn't finite has the bits of an infinity, and codes that are all 0: it is all NaN.
#pragma once

#include "half.cuh"

constexpr u32 NOT_FINITE = 255;

// The scale of a head whose largest magnitude has the bits `largest`: the least that keeps it within e4m3's 448.
__device__ __forceinline__ u32 scale_for(u32 largest) {
    if (largest >= 0x7f800000) {
        return NOT_FINITE;
    }
    // 448 is 1.75 × 2^8.
    int exponent = static_cast<int>(largest >> 23) - 127 - 8 + ((largest & 0x7fffff) > 0x600000);
    return min(max(exponent, -120), 7) + 247;
}

// The code of an element, rounded to the nearest, ties to even; what is too large becomes the largest.
__device__ __forceinline__ u32 code_of(float element, u32 scale) {
    if (scale == NOT_FINITE) {
        return 0;
    }
    u32 bits = __float_as_uint(element * __uint_as_float((374 - scale) << 23));
    u32 magnitude = bits & 0x7fffffff;
    // Numbers below the least normal one, 2^-6, are multiples of 2^-9: as those behind 2^14 are of a float.
    u32 code = magnitude < 0x3c800000 ? __float_as_uint(__uint_as_float(magnitude) + 16384.0f) - 0x46800000
                                      : ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    return (bits >> 24 & 0x80) | min(code, 0x7eu);
}

// A scale in both halves, and two, the first in the lower half.
__device__ __forceinline__ u32 scale_twice(u32 scale) { return scale * 0x00800080; }
__device__ __forceinline__ u32 scale_pair(u32 first, u32 second) { return first << 7 | second << 23; }

// Two elements in BF16, of codes in the upper bytes of the halves.
__device__ __forceinline__ u32 elements_of(u32 codes, u32 scales) {
    u32 small = (codes & 0x80008000) | (codes >> 4 & 0x07f007f0);
#if defined(__CUDA_ARCH__)
    u32 elements;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(elements) : "r"(small), "r"(scales), "r"(0x80008000));
    return elements;
#else
    auto product = [&](int half) -> u32 {
        auto of = [&](u32 word) { return float_of_bf16(static_cast<u16>(word >> 16 * half)); };
        return bf16_of_float(of(small) * of(scales));
    };
    return product(0) | product(1) << 16;
#endif
}

// One element of a row of codes.
__device__ __forceinline__ float element_at(const u8 *codes, size_t at, u32 scale) {
    return float_of_bf16(static_cast<u16>(elements_of(codes[at] << 8, scale << 7)));
}
