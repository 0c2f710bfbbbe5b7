#include "cuda_shim.h"
#include "example.cu"

DOUBLE_KERNEL(example_scale_kernel, example_scale)
DOUBLE_KERNEL(example_scale4_kernel, example_scale)
DOUBLE_KERNEL(example_sum_kernel, example_sum)
DOUBLE_KERNEL(example_mistake_kernel, example_mistake)
