// The products of codes.cuh for one weight format, for up to so many rows.

#include "codes.cuh"

#define DEFINE_CODES(NAME, TOKENS, BLOCKS)                                                                             \
    DENSE_KERNEL_OF(128, BLOCKS, NAME, Product product) { multiply_codes<FORMAT, TOKENS>(product); }

DEFINE_CODES(JOIN(codes_8, FORMAT), 8, 3)
DEFINE_CODES(JOIN(codes_16, FORMAT), 16, 3)
DEFINE_CODES(JOIN(codes_32, FORMAT), 32, 2)

#undef DEFINE_CODES
