// The products of bulk.cuh for one format of halves.

#include "bulk.cuh"

#define DEFINE_BULK(NAME, TILE)                                                                                        \
    extern "C" __global__ void __cluster_dims__(TILE::cluster, 1, 1) __launch_bounds__(TILE::threads + 128, 1)          \
        NAME(const __grid_constant__ Product product, const __grid_constant__ TensorMap tokens,                        \
             const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap second) {                    \
        bulk_matmul<FORMAT == F16 ? HALF_F16 : HALF_BF16, TILE>(product, tokens, weights, second);                     \
    }

DEFINE_BULK(JOIN(bulk_64, FORMAT), Bulk64)
DEFINE_BULK(JOIN(bulk_128, FORMAT), Bulk128)
DEFINE_BULK(JOIN(bulk_256, FORMAT), Bulk256)

#undef DEFINE_BULK
