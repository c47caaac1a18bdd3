// The annotations that CUDA's public headers put on declarations, as a plain C++ compiler needs
// them: empty, or an alignment. The headers of the runtime come with torch, the file of this name
// comes with the CUDA compiler. Where that is installed too, its own file is found first, because
// the headers include it with quotes and it lies beside them.
#pragma once

#define __host__
#define __device__
#define __global__
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define CUDARTAPI
#define CUDARTAPI_CDECL
