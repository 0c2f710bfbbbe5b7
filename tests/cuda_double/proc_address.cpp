// How bindings look functions up: by plain name and the driver version whose form of the function they know.
#include <dlfcn.h>

#include "double_state.h"

namespace {

struct Form {
    const char* name;
    int since;
    const char* symbol;
};

// Functions of which the double has several forms with different arguments, oldest first.
const Form forms[] = {
    {"cuCtxCreate", 3020, "cuCtxCreate_v2"},
    {"cuCtxCreate", 12050, "cuCtxCreate_v4"},
    {"cuGetProcAddress", 11030, "cuGetProcAddress"},
    {"cuGetProcAddress", 12000, "cuGetProcAddress_v2"},
    {"cuGraphInstantiate", 11000, "cuGraphInstantiate_v2"},
    {"cuGraphInstantiate", 12000, "cuGraphInstantiateWithFlags"},
    {"cuStreamGetCaptureInfo", 11030, "cuStreamGetCaptureInfo_v2"},
    {"cuStreamGetCaptureInfo", 12030, "cuStreamGetCaptureInfo_v3"},
};

void* own_symbol(const std::string& name) {
    static void* const self = [] {
        Dl_info info;
        return dladdr(reinterpret_cast<void*>(&cuda_shim::find), &info) ? dlopen(info.dli_fname, RTLD_LAZY) : nullptr;
    }();
    return dlsym(self, name.c_str());
}

void* look_up(const std::string& name, int version) {
    const char* chosen = nullptr;
    bool several = false;
    for (const Form& form : forms) {
        if (name != form.name) continue;
        several = true;
        if (form.since <= version) chosen = form.symbol;
    }
    if (several) return chosen ? own_symbol(chosen) : nullptr;
    void* second = own_symbol(name + "_v2");  // the form since CUDA 3.2 or 4.0, of all that have one
    return second ? second : own_symbol(name);
}

}  // namespace

EXPORT CUresult cuGetProcAddress_v2(const char* name, void** address, int version, cuuint64_t,
                                    CUdriverProcAddressQueryResult* status) {
    REFUSE_IF(name == nullptr || address == nullptr, CUDA_ERROR_INVALID_VALUE);
    *address = look_up(name, version);
    if (status) *status = *address ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *address ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

EXPORT CUresult cuGetProcAddress(const char* name, void** address, int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(name, address, version, flags, nullptr);
}

EXPORT CUresult cuGetExportTable(const void** table, const CUuuid*) {
    *table = nullptr;
    return CUDA_ERROR_NOT_FOUND;
}
