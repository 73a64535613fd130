// The products of codes.cuh for one weight format. THREADS is what a block and a multiprocessor have at most: more tokens
// take more registers.

#include "codes.cuh"

#define DEFINE_CODES(NAME, TOKENS, THREADS)                                                                            \
    DENSE_KERNEL_OF(THREADS, 1, NAME, Product product) { multiply_codes<FORMAT, TOKENS>(product); }

DEFINE_CODES(JOIN(codes_8, FORMAT), 8, 512)
DEFINE_CODES(JOIN(codes_16, FORMAT), 16, 384)
DEFINE_CODES(JOIN(codes_32, FORMAT), 32, 256)

#undef DEFINE_CODES
