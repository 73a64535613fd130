// The product of bulk.cuh for one format of halves.

#include "bulk.cuh"

extern "C" __global__ void __cluster_dims__(1, Bulk::cluster, 1) __launch_bounds__(Bulk::threads + 32, 1)
    JOIN(bulk, FORMAT)(const Product product, const __grid_constant__ TensorMap tokens,
                       const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap second) {
    bulk_matmul<FORMAT == F16 ? HALF_F16 : HALF_BF16, Bulk>(product, tokens, weights, second);
}
