// Linear layers and experts on tensor cores, for one weight format: three sizes of tiles, for a step's worth of decoding
// sessions up to long prompts. Of the formats F32 has none: its products are exact.

#include "matmul.cuh"

#define DEFINE_MATMUL(NAME, TILE, BLOCKS)                                                                              \
    DENSE_KERNEL_OF(TILE::threads, BLOCKS, NAME, Product product) { matmul<FORMAT, TILE>(product); }

DEFINE_MATMUL(JOIN(matmul_wide, FORMAT), Wide, 2)
DEFINE_MATMUL(JOIN(matmul_middle, FORMAT), Middle, 3)
DEFINE_MATMUL(JOIN(matmul_narrow, FORMAT), Narrow, 4)

#undef DEFINE_MATMUL
