"""The edit on an NVIDIA GPU: the CUDA driver, the fused kernels, and the loop that drives them.

For C++ hosts: sdedit.cu says what is launched in which order, sdedit.cuh how the parameters and the step table lie in
memory (interface version 1), and sdedit.fatbin is the compiled module, for cuModuleLoadData.
"""
