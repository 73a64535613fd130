// The 16-bit floats, as bits. The device converts with an instruction, the emulator by hand; both round to
// the nearest, ties to even.
#pragma once

#include "common.cuh"

__device__ __forceinline__ float float_of_bf16(u16 bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }

__device__ __forceinline__ u16 bf16_of_float(float value) {
    u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return static_cast<u16>(bits >> 16 | 0x40);
    }
    return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

__device__ __forceinline__ float float_of_f16(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ u16 f16_of_float(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#else

static inline float float_of_f16(u16 bits) {
    u32 sign = static_cast<u32>(bits & 0x8000) << 16;
    u32 exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) {
        return __uint_as_float(sign | 0x7f800000 | fraction << 13);
    }
    if (exponent == 0) {
        float value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

static inline u16 f16_of_float(float value) {
    u32 bits = __float_as_uint(value);
    u32 sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        return static_cast<u16>(sign | 0x7e00);
    }
    if (magnitude >= 0x477ff000) {
        return static_cast<u16>(sign | 0x7c00);
    }
    if (magnitude < 0x38800000) {
        // Below the smallest normal number, in whole units of the smallest subnormal.
        return static_cast<u16>(sign | static_cast<u32>(std::nearbyint(__uint_as_float(magnitude) * 0x1p24f)));
    }
    u32 rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<u16>(sign | (rounded - 0x38000000) >> 13);
}

#endif
