// The products of hopper.cuh for one weight format.

#include "hopper.cuh"

#define DEFINE_HOPPER(NAME, TILE, BLOCKS)                                                                              \
    DENSE_KERNEL_OF(TILE::threads, BLOCKS, NAME, Product product) { hopper_matmul<FORMAT, TILE>(product); }

DEFINE_HOPPER(JOIN(hopper_slim, FORMAT), Slim, 4)
DEFINE_HOPPER(JOIN(hopper_small, FORMAT), Small, 2)
DEFINE_HOPPER(JOIN(hopper_even, FORMAT), Even, 1)
DEFINE_HOPPER(JOIN(hopper_large, FORMAT), Large, 1)

#undef DEFINE_HOPPER
