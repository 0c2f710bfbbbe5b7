// Initialisation, one device, contexts, and what errors are called.
#include "double_state.h"

namespace {

constexpr int DRIVER_VERSION = 13000;
thread_local std::vector<CUcontext> context_stack;

const std::map<int, int>& default_attributes() {
    static const std::map<int, int> values = {
        {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
        {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
        {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024},
        {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
        {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 2147483647},
        {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
        {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49152},
        {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
        {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
        {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
        {CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 1},
        {CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS, 1},
        {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 2048},
        {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 3},
        {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
        {CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED, 1},
    };
    return values;
}

int device_attribute(int attribute) {
    auto set = state().attributes.find(attribute);
    if (set != state().attributes.end()) return set->second;
    auto found = default_attributes().find(attribute);
    return found == default_attributes().end() ? 0 : found->second;  // 0: the device has none of whatever it is
}

CUcontext make_context(bool primary, unsigned int flags) {
    auto context = std::make_unique<CUctx_st>(CUctx_st{primary, flags, nullptr});
    context->legacy = new CUstream_st{context.get(), 0, 0};
    CUcontext handle = context.get();
    state().contexts[handle] = std::move(context);
    return handle;
}

void destroy_context(CUcontext context) {
    State& s = state();
    drain_all();
    s.streams.remove_of(context);
    s.events.remove_of(context);
    s.functions.remove_of(context);
    s.modules.remove_of(context);
    s.executables.remove_of(context);
    free_memory_of(context);
    delete context->legacy;
    s.contexts.erase(context);
}

bool live(CUcontext context) { return state().contexts.count(context) != 0; }

CUresult create_context(CUcontext* context, unsigned int flags, CUdevice device) {
    REFUSE_IF(context == nullptr, CUDA_ERROR_INVALID_VALUE);
    REFUSE_IF(device != 0, CUDA_ERROR_INVALID_DEVICE);
    *context = make_context(false, flags);
    context_stack.push_back(*context);
    return CUDA_SUCCESS;
}

struct Error {
    CUresult code;
    const char *name, *meaning;
};

const Error errors[] = {
#define ERROR(name, meaning) {name, #name, meaning}
    ERROR(CUDA_SUCCESS, "no error"),
    ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    ERROR(CUDA_ERROR_DEINITIALIZED, "driver shutting down"),
    ERROR(CUDA_ERROR_STUB_LIBRARY, "stub library"),
    ERROR(CUDA_ERROR_DEVICE_UNAVAILABLE, "device busy or unavailable"),
    ERROR(CUDA_ERROR_NO_DEVICE, "no device"),
    ERROR(CUDA_ERROR_INVALID_DEVICE, "no such device"),
    ERROR(CUDA_ERROR_INVALID_IMAGE, "not a kernel image"),
    ERROR(CUDA_ERROR_INVALID_CONTEXT, "no valid context"),
    ERROR(CUDA_ERROR_NO_BINARY_FOR_GPU, "image has no kernel for this device"),
    ERROR(CUDA_ERROR_INVALID_PTX, "PTX does not compile"),
    ERROR(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "PTX is newer than the driver"),
    ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid handle"),
    ERROR(CUDA_ERROR_ILLEGAL_STATE, "illegal state"),
    ERROR(CUDA_ERROR_NOT_FOUND, "symbol not found"),
    ERROR(CUDA_ERROR_NOT_READY, "not ready"),
    ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "illegal memory access"),
    ERROR(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources for a launch"),
    ERROR(CUDA_ERROR_LAUNCH_TIMEOUT, "launch took too long"),
    ERROR(CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE, "primary context is active"),
    ERROR(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed"),
    ERROR(CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address"),
    ERROR(CUDA_ERROR_LAUNCH_FAILED, "launch failed"),
    ERROR(CUDA_ERROR_NOT_PERMITTED, "not permitted"),
    ERROR(CUDA_ERROR_NOT_SUPPORTED, "not supported"),
    ERROR(CUDA_ERROR_SYSTEM_NOT_READY, "system not ready"),
    ERROR(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "driver does not match its kernel module"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "not permitted while a stream is capturing"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "capture was invalidated by an earlier error"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_MERGE, "would merge two captures"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture did not begin in this stream"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "capture has work that was not joined"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "capture would depend on work outside it"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "the default stream would join a capture"),
    ERROR(CUDA_ERROR_CAPTURED_EVENT, "event belongs to a capture"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "capture was begun by another thread"),
    ERROR(CUDA_ERROR_UNKNOWN, "unknown error"),
#undef ERROR
};

const Error* find_error(CUresult code) {
    for (const Error& error : errors) {
        if (error.code == code) return &error;
    }
    return nullptr;
}

}  // namespace

CUcontext current_context() {
    return !context_stack.empty() && live(context_stack.back()) ? context_stack.back() : nullptr;
}

EXPORT CUresult cuGetErrorName(CUresult code, const char** name) {
    const Error* error = find_error(code);
    *name = error ? error->name : nullptr;
    return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuGetErrorString(CUresult code, const char** meaning) {
    const Error* error = find_error(code);
    *meaning = error ? error->meaning : nullptr;
    return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuInit(unsigned int flags) {
    ENTER(NOTHING);
    REFUSE_IF(flags != 0, CUDA_ERROR_INVALID_VALUE);
    state().initialised = true;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDriverGetVersion(int* version) {
    ENTER(NOTHING);
    *version = DRIVER_VERSION;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int* count) {
    ENTER(INITIALISED);
    *count = 1;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    ENTER(INITIALISED);
    REFUSE_IF(ordinal != 0, CUDA_ERROR_INVALID_DEVICE);
    *device = 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
    ENTER(INITIALISED);
    REFUSE_IF(device != 0, CUDA_ERROR_INVALID_DEVICE);
    REFUSE_IF(length < 1, CUDA_ERROR_INVALID_VALUE);
    std::strncpy(name, "driver double (not a GPU)", length);
    name[length - 1] = '\0';
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    ENTER(INITIALISED);
    REFUSE_IF(device != 0, CUDA_ERROR_INVALID_DEVICE);
    std::memcpy(uuid->bytes, "driver double 00", sizeof(uuid->bytes));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }

EXPORT CUresult cuDeviceGetPCIBusId(char* text, int length, CUdevice device) {
    ENTER(INITIALISED);
    REFUSE_IF(device != 0, CUDA_ERROR_INVALID_DEVICE);
    REFUSE_IF(length < 13, CUDA_ERROR_INVALID_VALUE);
    std::strcpy(text, "0000:00:00.0");
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    ENTER(INITIALISED);
    REFUSE_IF(device != 0, CUDA_ERROR_INVALID_DEVICE);
    REFUSE_IF(value == nullptr || attribute < 1, CUDA_ERROR_INVALID_VALUE);
    *value = device_attribute(attribute);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice device) {
    ENTER(INITIALISED);
    REFUSE_IF(device != 0, CUDA_ERROR_INVALID_DEVICE);
    *major = device_attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
    *minor = device_attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    ENTER(INITIALISED);
    REFUSE_IF(device != 0, CUDA_ERROR_INVALID_DEVICE);
    State& s = state();
    if (s.primary_retained++ == 0) s.primary = make_context(true, s.primary_flags);
    *context = s.primary;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER(INITIALISED);
    REFUSE_IF(device != 0, CUDA_ERROR_INVALID_DEVICE);
    State& s = state();
    REFUSE_IF(s.primary_retained == 0, CUDA_ERROR_INVALID_CONTEXT);
    if (--s.primary_retained == 0) {
        destroy_context(s.primary);
        s.primary = nullptr;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned int* flags, int* active) {
    ENTER(INITIALISED);
    REFUSE_IF(device != 0, CUDA_ERROR_INVALID_DEVICE);
    *flags = state().primary_flags;
    *active = state().primary_retained > 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned int flags) {
    ENTER(INITIALISED);
    REFUSE_IF(device != 0, CUDA_ERROR_INVALID_DEVICE);
    state().primary_flags = flags;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxCreate_v2(CUcontext* context, unsigned int flags, CUdevice device) {
    ENTER(INITIALISED);
    return create_context(context, flags, device);
}

EXPORT CUresult cuCtxCreate_v4(CUcontext* context, CUctxCreateParams*, unsigned int flags, CUdevice device) {
    ENTER(INITIALISED);
    return create_context(context, flags, device);
}

EXPORT CUresult cuCtxDestroy_v2(CUcontext context) {
    ENTER(INITIALISED);
    REFUSE_IF(!live(context) || context->primary, CUDA_ERROR_INVALID_CONTEXT);
    if (!context_stack.empty() && context_stack.back() == context) context_stack.pop_back();
    destroy_context(context);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
    ENTER(INITIALISED);
    REFUSE_IF(!live(context), CUDA_ERROR_INVALID_CONTEXT);
    context_stack.push_back(context);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    ENTER(INITIALISED);
    REFUSE_IF(context_stack.empty(), CUDA_ERROR_INVALID_CONTEXT);
    if (context != nullptr) *context = context_stack.back();
    context_stack.pop_back();
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    ENTER(INITIALISED);
    REFUSE_IF(context != nullptr && !live(context), CUDA_ERROR_INVALID_CONTEXT);
    if (!context_stack.empty()) context_stack.pop_back();
    if (context != nullptr) context_stack.push_back(context);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
    ENTER(INITIALISED);
    *context = current_context();
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
    ENTER(CONTEXT);
    *device = 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetFlags(unsigned int* flags) {
    ENTER(CONTEXT);
    *flags = current_context()->flags;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetApiVersion(CUcontext context, unsigned int* version) {
    ENTER(INITIALISED);
    REFUSE_IF(context == nullptr ? current_context() == nullptr : !live(context), CUDA_ERROR_INVALID_CONTEXT);
    *version = 3020;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER(CONTEXT);
    if (least != nullptr) *least = 0;
    if (greatest != nullptr) *greatest = -5;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSynchronize() {
    ENTER(CONTEXT);
    TRY(refuse_in_capture(true));
    return drain_all();
}
