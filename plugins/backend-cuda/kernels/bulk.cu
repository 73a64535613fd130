// The products of bulk.cuh for one format of halves.

#include "bulk.cuh"

#define DEFINE_BULK(NAME, TILE, BLOCKS)                                                                                \
    extern "C" __global__ void __cluster_dims__(1, TILE::cluster, 1) __launch_bounds__(TILE::threads + 32, BLOCKS)     \
        NAME(const Product product, const __grid_constant__ TensorMap tokens,                                          \
             const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap second) {                    \
        bulk_matmul<FORMAT == F16 ? HALF_F16 : HALF_BF16, TILE>(product, tokens, weights, second);                     \
    }

DEFINE_BULK(JOIN(bulk_slim, FORMAT), BulkSlim, 2)
DEFINE_BULK(JOIN(bulk_small, FORMAT), BulkSmall, 2)
DEFINE_BULK(JOIN(bulk_even, FORMAT), BulkEven, 2)
DEFINE_BULK(JOIN(bulk_large, FORMAT), BulkLarge, 1)

#undef DEFINE_BULK
