// Device and pinned memory, in host memory. All of it starts and ends as NaN (every byte 0xFF), between guard zones.
#include <cstdlib>

#include "double_state.h"

namespace {

constexpr size_t GUARD_BYTES = 256;  // also the alignment that the real driver gives
constexpr size_t TOTAL_BYTES = size_t{8} << 30;
constexpr size_t KEPT_AFTER_FREE = size_t{64} << 20;

size_t guarded_bytes(size_t bytes) { return GUARD_BYTES + (bytes + 2 * GUARD_BYTES - 1) / GUARD_BYTES * GUARD_BYTES; }

unsigned char* block_of(const Allocation& allocation) { return allocation.start - GUARD_BYTES; }

CUresult allocate(size_t bytes, bool on_host, unsigned int flags, uintptr_t* address) {
    State& s = state();
    REFUSE_IF(bytes == 0, CUDA_ERROR_INVALID_VALUE);
    REFUSE_IF(!on_host && bytes > TOTAL_BYTES - s.live_bytes, CUDA_ERROR_OUT_OF_MEMORY);
    void* block = std::aligned_alloc(GUARD_BYTES, guarded_bytes(bytes));
    REFUSE_IF(block == nullptr, CUDA_ERROR_OUT_OF_MEMORY);
    std::memset(block, 0xFF, guarded_bytes(bytes));
    unsigned char* start = static_cast<unsigned char*>(block) + GUARD_BYTES;
    *address = reinterpret_cast<uintptr_t>(start);
    s.memory[*address] = {current_context(), bytes, on_host, flags, start};
    if (!on_host) {
        s.live_bytes += bytes;
        s.peak_bytes = std::max(s.peak_bytes, s.live_bytes);
    }
    return CUDA_SUCCESS;
}

void release(std::map<uintptr_t, Allocation>::iterator it) {
    State& s = state();
    Allocation allocation = it->second;
    s.memory.erase(it);
    std::memset(block_of(allocation), 0xFF, guarded_bytes(allocation.bytes));
    if (!allocation.on_host) s.live_bytes -= allocation.bytes;
    s.freed.push_back(allocation);
    s.freed_bytes += allocation.bytes;
    while (s.freed_bytes > KEPT_AFTER_FREE) {
        s.freed_bytes -= s.freed.front().bytes;
        std::free(block_of(s.freed.front()));
        s.freed.pop_front();
    }
}

CUresult release(uintptr_t address, bool on_host) {
    auto it = state().memory.find(address);
    REFUSE_IF(it == state().memory.end() || it->second.on_host != on_host, CUDA_ERROR_INVALID_VALUE);
    TRY(refuse_in_capture(true));
    TRY(drain_all());
    release(it);
    return CUDA_SUCCESS;
}

enum Place { HOST, DEVICE, ANY };

// Whether a copy may touch it. Host memory that is not the double's own can be anywhere.
bool valid(uintptr_t address, size_t bytes, Place place) {
    Allocation* whole = allocation_of(address, bytes);
    bool device = whole != nullptr && !whole->on_host;
    bool touches_device = device;
    for (auto& [start, allocation] : state().memory) {
        if (!allocation.on_host && address < start + allocation.bytes && start < address + bytes) touches_device = true;
    }
    bool host = address != 0 && !touches_device;
    return place == DEVICE ? device : place == HOST ? host : host || device;
}

CUresult copy_node(uintptr_t target, Place to, uintptr_t source, Place from, size_t bytes, CUgraphNode_st* node) {
    REFUSE_IF(bytes != 0 && !(valid(target, bytes, to) && valid(source, bytes, from)), CUDA_ERROR_INVALID_VALUE);
    node->type = CU_GRAPH_NODE_TYPE_MEMCPY;
    node->target = reinterpret_cast<unsigned char*>(target);
    node->source = reinterpret_cast<const unsigned char*>(source);
    node->bytes = bytes;
    return CUDA_SUCCESS;
}

CUresult copy_now(uintptr_t target, Place to, uintptr_t source, Place from, size_t bytes) {
    CUgraphNode_st node{};
    TRY(copy_node(target, to, source, from, bytes, &node));
    TRY(synchronous_call());
    return perform(node);
}

CUresult copy_in(CUstream handle, uintptr_t target, Place to, uintptr_t source, Place from, size_t bytes) {
    CUgraphNode_st node{};
    CUstream stream;
    TRY(resolve(handle, &stream));
    TRY(copy_node(target, to, source, from, bytes, &node));
    return submit(stream, std::move(node));
}

CUresult fill_node(CUdeviceptr target, unsigned int value, size_t value_bytes, size_t count, CUgraphNode_st* node) {
    REFUSE_IF(target % value_bytes != 0, CUDA_ERROR_INVALID_VALUE);
    REFUSE_IF(count != 0 && !valid(target, count * value_bytes, DEVICE), CUDA_ERROR_INVALID_VALUE);
    node->type = CU_GRAPH_NODE_TYPE_MEMSET;
    node->target = reinterpret_cast<unsigned char*>(target);
    node->bytes = count * value_bytes;
    node->value = value;
    node->value_bytes = value_bytes;
    return CUDA_SUCCESS;
}

CUresult fill_now(CUdeviceptr target, unsigned int value, size_t value_bytes, size_t count) {
    CUgraphNode_st node{};
    TRY(fill_node(target, value, value_bytes, count, &node));
    TRY(synchronous_call());
    return perform(node);
}

CUresult fill_in(CUstream handle, CUdeviceptr target, unsigned int value, size_t value_bytes, size_t count) {
    CUgraphNode_st node{};
    CUstream stream;
    TRY(resolve(handle, &stream));
    TRY(fill_node(target, value, value_bytes, count, &node));
    return submit(stream, std::move(node));
}

uintptr_t number(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

template <typename T>
void put(void* where, T value) {
    std::memcpy(where, &value, sizeof(value));
}

CUresult pointer_attribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
    Allocation* allocation = allocation_of(address, 1);
    REFUSE_IF(allocation == nullptr, CUDA_ERROR_INVALID_VALUE);
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_CONTEXT: put(value, allocation->context); break;
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            put<unsigned int>(value, allocation->on_host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE);
            break;
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: put(value, address); break;
        case CU_POINTER_ATTRIBUTE_HOST_POINTER:
            REFUSE_IF(!allocation->on_host, CUDA_ERROR_INVALID_VALUE);
            put(value, address);
            break;
        case CU_POINTER_ATTRIBUTE_IS_MANAGED: put<unsigned int>(value, 0); break;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: put<int>(value, 0); break;
        case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: put(value, number(allocation->start)); break;
        case CU_POINTER_ATTRIBUTE_RANGE_SIZE: put(value, allocation->bytes); break;
        default: return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}

}  // namespace

Allocation* allocation_of(uintptr_t address, size_t bytes) {
    auto after = state().memory.upper_bound(address);
    if (after == state().memory.begin()) return nullptr;
    auto& [start, allocation] = *std::prev(after);
    size_t offset = address - start;
    return offset < allocation.bytes && bytes <= allocation.bytes - offset ? &allocation : nullptr;
}

bool guard_zones_intact() {
    auto untouched = [](const unsigned char* from, const unsigned char* to) {
        return std::all_of(from, to, [](unsigned char byte) { return byte == 0xFF; });
    };
    for (auto& [address, allocation] : state().memory) {
        const unsigned char *block = block_of(allocation), *after = block + guarded_bytes(allocation.bytes);
        if (!untouched(block, allocation.start) || !untouched(allocation.start + allocation.bytes, after)) return false;
    }
    return true;
}

void free_memory_of(CUcontext context) {
    for (auto it = state().memory.begin(); it != state().memory.end();) {
        auto next = std::next(it);
        if (it->second.context == context) release(it);
        it = next;
    }
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    ENTER(INITIALISED);
    REFUSE_IF(device != 0, CUDA_ERROR_INVALID_DEVICE);
    *bytes = TOTAL_BYTES;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER(CONTEXT);
    *free = TOTAL_BYTES - state().live_bytes;
    *total = TOTAL_BYTES;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
    ENTER(CONTEXT);
    TRY(refuse_in_capture());
    uintptr_t where;
    TRY(allocate(bytes, false, 0, &where));
    *address = where;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTER(CONTEXT);
    REFUSE_IF(address == 0, CUDA_SUCCESS);
    return release(address, false);
}

EXPORT CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned int flags) {
    ENTER(CONTEXT);
    TRY(refuse_in_capture());
    uintptr_t where;
    TRY(allocate(bytes, true, flags, &where));
    *address = reinterpret_cast<void*>(where);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAllocHost_v2(void** address, size_t bytes) {
    ENTER(CONTEXT);
    TRY(refuse_in_capture());
    uintptr_t where;
    TRY(allocate(bytes, true, 0, &where));
    *address = reinterpret_cast<void*>(where);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemFreeHost(void* address) {
    ENTER(CONTEXT);
    return release(number(address), true);
}

EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* address, void* host, unsigned int flags) {
    ENTER(CONTEXT);
    Allocation* allocation = allocation_of(number(host), 1);
    REFUSE_IF(flags != 0 || allocation == nullptr || !allocation->on_host, CUDA_ERROR_INVALID_VALUE);
    *address = number(host);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemHostGetFlags(unsigned int* flags, void* host) {
    ENTER(CONTEXT);
    Allocation* allocation = allocation_of(number(host), 1);
    REFUSE_IF(allocation == nullptr || !allocation->on_host, CUDA_ERROR_INVALID_VALUE);
    *flags = allocation->flags | CU_MEMHOSTALLOC_DEVICEMAP;  // as the driver has it under unified addressing
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr* start, size_t* bytes, CUdeviceptr address) {
    ENTER(CONTEXT);
    Allocation* allocation = allocation_of(address, 1);
    REFUSE_IF(allocation == nullptr, CUDA_ERROR_NOT_FOUND);
    if (start != nullptr) *start = number(allocation->start);
    if (bytes != nullptr) *bytes = allocation->bytes;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
    ENTER(CONTEXT);
    return pointer_attribute(value, attribute, address);
}

EXPORT CUresult cuPointerGetAttributes(unsigned int count, CUpointer_attribute* attributes, void** values,
                                       CUdeviceptr address) {
    ENTER(CONTEXT);
    for (unsigned int n = 0; n < count; ++n) {
        // An address that the driver does not know is not an error here: its attributes are null.
        if (pointer_attribute(values[n], attributes[n], address) == CUDA_SUCCESS) continue;
        switch (attributes[n]) {
            case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: put<int>(values[n], -2); break;
            case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            case CU_POINTER_ATTRIBUTE_IS_MANAGED: put<unsigned int>(values[n], 0); break;
            default: put<uint64_t>(values[n], 0);
        }
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemcpy(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
    ENTER(CONTEXT);
    return copy_now(target, ANY, source, ANY, bytes);
}

EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr target, const void* source, size_t bytes) {
    ENTER(CONTEXT);
    return copy_now(target, DEVICE, number(source), HOST, bytes);
}

EXPORT CUresult cuMemcpyDtoH_v2(void* target, CUdeviceptr source, size_t bytes) {
    ENTER(CONTEXT);
    return copy_now(number(target), HOST, source, DEVICE, bytes);
}

EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
    ENTER(CONTEXT);
    return copy_now(target, DEVICE, source, DEVICE, bytes);
}

EXPORT CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
    ENTER(CONTEXT);
    return copy_in(stream, target, ANY, source, ANY, bytes);
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void* source, size_t bytes, CUstream stream) {
    ENTER(CONTEXT);
    return copy_in(stream, target, DEVICE, number(source), HOST, bytes);
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void* target, CUdeviceptr source, size_t bytes, CUstream stream) {
    ENTER(CONTEXT);
    return copy_in(stream, number(target), HOST, source, DEVICE, bytes);
}

EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
    ENTER(CONTEXT);
    return copy_in(stream, target, DEVICE, source, DEVICE, bytes);
}

EXPORT CUresult cuMemsetD8_v2(CUdeviceptr target, unsigned char value, size_t count) {
    ENTER(CONTEXT);
    return fill_now(target, value, 1, count);
}

EXPORT CUresult cuMemsetD16_v2(CUdeviceptr target, unsigned short value, size_t count) {
    ENTER(CONTEXT);
    return fill_now(target, value, 2, count);
}

EXPORT CUresult cuMemsetD32_v2(CUdeviceptr target, unsigned int value, size_t count) {
    ENTER(CONTEXT);
    return fill_now(target, value, 4, count);
}

EXPORT CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, CUstream stream) {
    ENTER(CONTEXT);
    return fill_in(stream, target, value, 1, count);
}

EXPORT CUresult cuMemsetD16Async(CUdeviceptr target, unsigned short value, size_t count, CUstream stream) {
    ENTER(CONTEXT);
    return fill_in(stream, target, value, 2, count);
}

EXPORT CUresult cuMemsetD32Async(CUdeviceptr target, unsigned int value, size_t count, CUstream stream) {
    ENTER(CONTEXT);
    return fill_in(stream, target, value, 4, count);
}
