// The operations of one path (AVX-512, AVX2, portable) as a table of range functions, and their numbers for Python.
#pragma once

#include "threads.h"

enum Operation { QUANTIZE, DEQUANTIZE, FLAT_ENCODE, FLAT_SUM, TILE_QUANTIZE, TILE_DEQUANTIZE, ADAM, OPERATIONS };

struct Path {
    const char* name;
    RangeFunction operations[OPERATIONS];
};

// Defined by paths.cpp, compiled once for each; null where the compiler or the machine has no such path.
extern const Path path_avx512, path_avx2, path_portable;
// Defined by adam.cpp, compiled beside it.
extern const RangeFunction adam_avx512, adam_avx2, adam_portable;
