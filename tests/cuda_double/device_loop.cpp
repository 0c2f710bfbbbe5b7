// The product's kernels, unmodified, and the linear network.
#include "cuda_shim.h"

#include "../../engine/cuda/sdedit.cu"
#include "linear.cu"

DOUBLE_KERNEL(sdedit_start, sdedit_edit)
DOUBLE_KERNEL(sdedit_step, sdedit_edit)
DOUBLE_KERNEL(sdedit_pixels, sdedit_edit)
DOUBLE_KERNEL(linear, linear_network)
