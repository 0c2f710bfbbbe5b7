// Modules and libraries hold every kernel that was compiled into the double, whatever their image says; launches.
#include "double_state.h"

namespace {

bool is_image(const void* image) {
    static const char magics[][5] = {"\x50\xED\x55\xBA", "\xB1\x43\x62\x46", "\x7F" "ELF"};  // fatbin, its wrapper, cubin
    for (const char* magic : magics) {
        if (std::memcmp(image, magic, 4) == 0) return true;
    }
    auto text = static_cast<const char*>(image);
    return (*text == '/' || *text == '.' || *text == '\n') && std::strstr(text, ".version") != nullptr;  // PTX
}

CUresult load(CUcontext context, const void* image, CUmodule* module) {
    REFUSE_IF(module == nullptr || image == nullptr, CUDA_ERROR_INVALID_VALUE);
    REFUSE_IF(!is_image(image), CUDA_ERROR_INVALID_IMAGE);
    TRY(refuse_in_capture());
    *module = state().modules.add(std::make_unique<CUmod_st>(CUmod_st{context}));
    return CUDA_SUCCESS;
}

CUresult function_of(CUmodule module, const char* name, CUfunction* function) {
    REFUSE_IF(function == nullptr || name == nullptr, CUDA_ERROR_INVALID_VALUE);
    REFUSE_IF(!state().modules.has(module), CUDA_ERROR_INVALID_HANDLE);
    const cuda_shim::Kernel* kernel = cuda_shim::find(name);
    REFUSE_IF(kernel == nullptr, CUDA_ERROR_NOT_FOUND);
    *function = state().functions.add(std::make_unique<CUfunc_st>(CUfunc_st{module->context, module, kernel}));
    return CUDA_SUCCESS;
}

CUresult unload(CUmodule module) {
    REFUSE_IF(!state().modules.has(module), CUDA_ERROR_INVALID_HANDLE);
    TRY(refuse_in_capture(true));
    TRY(drain_all());
    std::vector<CUfunction> gone;
    for (auto& [handle, function] : state().functions) {
        if (function->module == module) gone.push_back(function.get());
    }
    for (CUfunction function : gone) state().functions.remove(function);
    state().modules.remove(module);
    return CUDA_SUCCESS;
}

// Where the one argument of a kernel lies, given the two ways to pass it.
CUresult argument_of(const cuda_shim::Kernel& kernel, void** parameters, void** extra, const unsigned char** argument) {
    REFUSE_IF((parameters == nullptr) == (extra == nullptr), CUDA_ERROR_INVALID_VALUE);
    if (parameters != nullptr) {
        *argument = static_cast<const unsigned char*>(parameters[0]);
    } else {
        *argument = nullptr;
        size_t bytes = 0;
        for (; *extra != CU_LAUNCH_PARAM_END; extra += 2) {
            if (extra[0] == CU_LAUNCH_PARAM_BUFFER_POINTER) {
                *argument = static_cast<const unsigned char*>(extra[1]);
            } else if (extra[0] == CU_LAUNCH_PARAM_BUFFER_SIZE) {
                bytes = *static_cast<const size_t*>(extra[1]);
            } else {
                return CUDA_ERROR_INVALID_VALUE;
            }
        }
        REFUSE_IF(bytes != kernel.argument_bytes, CUDA_ERROR_INVALID_VALUE);
    }
    return *argument == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

bool fits(dim3 grid, dim3 block) {
    auto within = [](dim3 d, unsigned int x, unsigned int y, unsigned int z) {
        return d.x >= 1 && d.x <= x && d.y >= 1 && d.y <= y && d.z >= 1 && d.z <= z;
    };
    return within(grid, 2147483647, 65535, 65535) && within(block, 1024, 1024, 64) &&
           size_t{block.x} * block.y * block.z <= 1024;
}

CUresult launch(CUfunction function, dim3 grid, dim3 block, unsigned int shared_bytes, CUstream handle,
                void** parameters, void** extra) {
    CUstream stream;
    REFUSE_IF(!state().functions.has(function), CUDA_ERROR_INVALID_HANDLE);
    bool elsewhere = function->context != nullptr && function->context != current_context();
    REFUSE_IF(elsewhere, CUDA_ERROR_INVALID_HANDLE);
    REFUSE_IF(!fits(grid, block), CUDA_ERROR_INVALID_VALUE);
    REFUSE_IF(shared_bytes != 0, CUDA_ERROR_NOT_SUPPORTED);  // not needed so far
    TRY(resolve(handle, &stream));
    const unsigned char* argument;
    TRY(argument_of(*function->kernel, parameters, extra, &argument));
    CUgraphNode_st node{CU_GRAPH_NODE_TYPE_KERNEL};
    node.kernel = function->kernel;
    node.grid = grid;
    node.block = block;
    node.argument.assign(argument, argument + function->kernel->argument_bytes);
    return submit(stream, std::move(node));
}

CUresult function_attribute(int* value, int attribute, CUfunction function) {
    REFUSE_IF(!state().functions.has(function), CUDA_ERROR_INVALID_HANDLE);
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;
        case CU_FUNC_ATTRIBUTE_PTX_VERSION:
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = 90; break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

// A library is a module that belongs to no context, a kernel a function of one.
CUmodule as_module(CUlibrary library) { return reinterpret_cast<CUmodule>(library); }
CUfunction as_function(CUkernel kernel) { return reinterpret_cast<CUfunction>(kernel); }

}  // namespace

EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    ENTER(CONTEXT);
    return load(current_context(), image, module);
}

EXPORT CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned int, CUjit_option*, void**) {
    ENTER(CONTEXT);
    return load(current_context(), image, module);
}

EXPORT CUresult cuModuleLoadFatBinary(CUmodule* module, const void* image) {
    ENTER(CONTEXT);
    return load(current_context(), image, module);
}

EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    ENTER(CONTEXT);
    return function_of(module, name, function);
}

EXPORT CUresult cuModuleUnload(CUmodule module) {
    ENTER(CONTEXT);
    return unload(module);
}

EXPORT CUresult cuLibraryLoadData(CUlibrary* library, const void* image, CUjit_option*, void**, unsigned int,
                                  CUlibraryOption*, void**, unsigned int) {
    ENTER(INITIALISED);
    return load(nullptr, image, reinterpret_cast<CUmodule*>(library));
}

EXPORT CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
    ENTER(INITIALISED);
    return function_of(as_module(library), name, reinterpret_cast<CUfunction*>(kernel));
}

EXPORT CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
    ENTER(CONTEXT);
    REFUSE_IF(!state().functions.has(kernel), CUDA_ERROR_INVALID_HANDLE);
    *function = as_function(kernel);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryUnload(CUlibrary library) {
    ENTER(INITIALISED);
    return unload(as_module(library));
}

EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    ENTER(CONTEXT);
    return function_attribute(value, attribute, function);
}

EXPORT CUresult cuKernelGetAttribute(int* value, CUfunction_attribute attribute, CUkernel kernel, CUdevice device) {
    ENTER(INITIALISED);
    REFUSE_IF(device != 0, CUDA_ERROR_INVALID_DEVICE);
    return function_attribute(value, attribute, as_function(kernel));
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                               unsigned int block_x, unsigned int block_y, unsigned int block_z,
                               unsigned int shared_bytes, CUstream stream, void** parameters, void** extra) {
    ENTER(CONTEXT);
    return launch(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, stream, parameters,
                  extra);
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
    ENTER(CONTEXT);
    REFUSE_IF(config == nullptr, CUDA_ERROR_INVALID_VALUE);
    return launch(function, {config->gridDimX, config->gridDimY, config->gridDimZ},
                  {config->blockDimX, config->blockDimY, config->blockDimZ}, config->sharedMemBytes, config->hStream,
                  parameters, extra);
}
