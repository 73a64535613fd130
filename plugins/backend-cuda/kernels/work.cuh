// How the tiles of a product are shared out among blocks that stay for all of it: as many whole ones for each, and of those
// that are left the columns, evenly, so that all end together ("Stream-K", Osama et al., 2023). Blocks of a cluster take
// neighbouring outputs of the same tokens.
#pragma once

#include "tile.cuh"

struct StageOfTile {
    int tile, stage;
};

// A cluster's work: whole tiles, every `clusters`-th, and then its part of the stages of those that are left.
template <class TILE> struct Work {
    int stages, across, cluster, clusters, whole, begin, end;
    // Clusters that share the stages of the tiles that are left, and how many these are.
    int sharing;
    u32 left;

    __device__ __forceinline__ explicit Work(const Product &product)
        : stages((product.cols + TILE::columns - 1) / TILE::columns), across((product.tokens + TILE::tokens - 1) / TILE::tokens),
          cluster(blockIdx.x / TILE::cluster), clusters(gridDim.x / TILE::cluster) {
        int outputs = TILE::cluster * outputs_of(product);
        int tiles = across * ((product.outs + outputs - 1) / outputs);
        whole = tiles / clusters;
        left = static_cast<u32>(tiles - whole * clusters) * stages;
        sharing = min(clusters, max(static_cast<int>(left) / TILE::least_stages, 1));
        begin = bound(min(cluster, sharing)), end = bound(min(cluster + 1, sharing));
    }

    // Outputs of a block, of each matrix.
    static __device__ __forceinline__ int outputs_of(const Product &product) {
        return product.second ? TILE::outputs / 2 : TILE::outputs;
    }

    // Where the part of a cluster begins.
    __device__ __forceinline__ int bound(int cluster) const {
        return static_cast<int>(static_cast<u64>(left) * cluster / sharing);
    }

    // The cluster whose part a stage is in.
    __device__ __forceinline__ int owner(u32 stage) const {
        return static_cast<int>((static_cast<u64>(stage + 1) * sharing - 1) / left);
    }

    __device__ __forceinline__ int count() const { return whole * stages + end - begin; }

    // The tile and the stage in it that stage `at` of this cluster is.
    __device__ __forceinline__ StageOfTile locate(int at) const {
        if (at < whole * stages) {
            return {cluster + at / stages * clusters, at % stages};
        }
        int shared = begin + at - whole * stages;
        return {whole * clusters + shared / stages, shared % stages};
    }

    __device__ __forceinline__ int first_row(int tile) const { return tile % across * TILE::tokens; }
    // Of the block that is `rank` of its cluster.
    __device__ __forceinline__ int first_out(const Product &product, int tile, int rank) const {
        return (tile / across * TILE::cluster + rank) * outputs_of(product);
    }

    // Adds up what all blocks that share a tile have summed: whether this is the last, which then has it all.
    template <int DOWN, int ACROSS>
    __device__ __forceinline__ bool gather(const Product &product, int tile, int rank, float (&sums)[DOWN][ACROSS][4]) const {
        int number = tile - whole * clusters;
        int first = owner(number * stages), last = owner((number + 1) * stages - 1);
        // A cluster has parts of two such tiles at most: the end of one, and the beginning of another.
        auto sums_of = [&](int part) {
            size_t block = ((first + part) * 2 + (part == 0)) * TILE::cluster + rank;
            return product.partials + block * (TILE::tokens * TILE::outputs);
        };
        u32 *arrived = product.arrived + number * TILE::cluster + rank;
        return gather_sums<TILE>(sums, last - first + 1, cluster - first, sums_of, arrived);
    }
};
