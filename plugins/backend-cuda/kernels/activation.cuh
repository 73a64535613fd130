// The elementwise functions, by their number in `activation_code` of src/ops.rs.
#pragma once

#include "common.cuh"

__device__ __forceinline__ float activate(int kind, float x) {
    switch (kind) {
    case 0: // SiLU.
        return x / (1.0f + expf(-x));
    case 1: // GELU, with the error function.
        return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case 2: // GELU, by tanh.
        return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case 3: // ReLU, which keeps a NaN.
        return x < 0.0f ? 0.0f : x;
    case 4: // Its square.
        return x < 0.0f ? 0.0f : x * x;
    default: // The logistic function.
        return 1.0f / (1.0f + expf(-x));
    }
}
