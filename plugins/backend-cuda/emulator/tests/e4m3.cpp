// Eight-bit keys and values against the definition of e4m3, for every code and every scale.

#include "../cuemu.h"

#include "../../kernels/e4m3.cuh"

#include <cstdio>
#include <cstdlib>

static void check(bool holds, const char *what, double at) {
    if (!holds) {
        fprintf(stderr, "%s: %g\n", what, at);
        exit(1);
    }
}

// A sign, four bits of exponent with a bias of 7, three of fraction; the codes that would be above 448 are NaNs.
static double number(int code) {
    int exponent = code >> 3 & 15, fraction = code & 7;
    double value = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
    return code & 0x80 ? -value : value;
}

static bool is_nan(int code) { return (code & 0x7f) == 0x7f; }

static u32 bits_of(float value) { return __float_as_uint(value); }

// The code that is nearest to x, the even one of two.
static int nearest(double x) {
    int best = 0;
    for (int code = 1; code < 0x7f; code++) {
        double before = std::fabs(std::fabs(x) - number(best)), here = std::fabs(std::fabs(x) - number(code));
        best = here < before || (here == before && code % 2 == 0) ? code : best;
    }
    return best | (std::signbit(x) ? 0x80 : 0);
}

static void codes_are_decoded() {
    for (u32 scale = 127; scale <= 254; scale++) {
        for (int code = 0; code < 256; code++) {
            u8 row[2] = {0x55, static_cast<u8>(code)};
            double expected = std::ldexp(number(code), static_cast<int>(scale) - 247);
            if (!is_nan(code) && std::fabs(expected) >= 0x1p-126) {
                check(element_at(row, 1, scale) == expected, "decoded", expected);
                check(code_of(static_cast<float>(expected), scale) == static_cast<u32>(code), "encoded again", expected);
                u32 both = elements_of(static_cast<u32>(code) << 8 | 0x38u << 24, scale_pair(scale, 247));
                check(float_of_bf16(static_cast<u16>(both)) == expected, "beside another", expected);
                check(float_of_bf16(static_cast<u16>(both >> 16)) == 1.0f, "the other", expected);
            }
        }
    }
}

static void scales_are_the_least() {
    u32 state = 1;
    for (int i = 0; i < 200000; i++) {
        state = state * 1664525 + 1013904223;
        // From the least to the largest, and at and around 448 times a power of two.
        u32 largest = i % 4 ? state >> 1 : (bits_of(448.0f) & 0x7fffff) + (state >> 24 << 23) + i / 4 % 3 - 1;
        largest &= 0x7fffffff;
        if (largest >= 0x7f800000) {
            check(scale_for(largest) == NOT_FINITE, "not finite", i);
            continue;
        }
        double value = __uint_as_float(largest);
        int exponent = static_cast<int>(scale_for(largest)) - 247;
        check(exponent >= -120 && exponent <= 7, "in range", value);
        check(value <= std::ldexp(448, exponent) || exponent == 7, "large enough", value);
        check(value > std::ldexp(448, exponent - 1) || exponent == -120, "no larger", value);
    }
}

static void elements_are_rounded_to_the_nearest() {
    u32 state = 7;
    for (int i = 0; i < 40000; i++) {
        state = state * 1664525 + 1013904223;
        int exponent = static_cast<int>(state >> 8) % 8 - 12;
        // Anything, and what is just between two codes.
        int code = state >> 24 & 0x7f;
        double between = code < 0x7e ? (number(code) + number(code + 1)) / 2 : 500;
        double x = i % 2 ? between : std::ldexp(static_cast<double>(state & 0xffff) + 1, static_cast<int>(state >> 16 & 15) - 21);
        x = state & 1 ? -x : x;
        float element = static_cast<float>(std::ldexp(x, exponent));
        u32 found = code_of(element, static_cast<u32>(exponent + 247));
        check(found == static_cast<u32>(nearest(std::ldexp(element, -exponent))), "nearest", x);
    }
}

static void a_head_that_is_not_finite_is_nan() {
    for (float element : {1.0f, -3e38f, __builtin_inff(), __builtin_nanf("")}) {
        check(code_of(element, NOT_FINITE) == 0, "code", element);
    }
    u8 zero = 0;
    check(std::isnan(element_at(&zero, 0, NOT_FINITE)), "NaN", 0);
    check(element_at(&zero, 0, 0) == 0.0f, "what nobody sees", 0);
}

int main() {
    codes_are_decoded();
    scales_are_the_least();
    elements_are_rounded_to_the_nearest();
    a_head_that_is_not_finite_is_nan();
    fprintf(stderr, "as described\n");
}
