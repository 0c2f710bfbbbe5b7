// What the double remembers: contexts, memory, streams, graphs; and the guard that every driver function enters by.
#pragma once

#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda_shim.h"
#include "driver_abi.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

struct CUctx_st {
    bool primary;
    unsigned int flags;
    CUstream legacy;  // stream 0
};

struct CUmod_st {
    CUcontext context;
};

struct CUfunc_st {
    CUcontext context;
    CUmodule module;
    const cuda_shim::Kernel* kernel;
};

// One operation on the device: a node of a graph, or a piece of a stream's work.
struct CUgraphNode_st {
    CUgraphNodeType type;
    std::vector<CUgraphNode> after{};  // dependencies, in the same graph
    // kernel
    const cuda_shim::Kernel* kernel = nullptr;
    dim3 grid{}, block{};
    std::vector<unsigned char> argument{};
    // copy and fill
    unsigned char* target = nullptr;
    const unsigned char* source = nullptr;
    size_t bytes = 0;
    unsigned int value = 0;
    size_t value_bytes = 0;
    // child graph
    std::shared_ptr<CUgraph_st> child{};
};

struct CUgraph_st {
    std::vector<std::unique_ptr<CUgraphNode_st>> nodes{};

    CUgraphNode add(CUgraphNode_st node);
    bool has(CUgraphNode node) const;
    std::shared_ptr<CUgraph_st> clone() const;
};

struct CUgraphExec_st {
    CUcontext context;
    std::shared_ptr<CUgraph_st> graph;
    std::vector<CUgraphNode> order;  // children in place of the nodes that hold them
};

struct Capture {
    unsigned long long id;
    CUstreamCaptureMode mode;
    std::thread::id thread;
    CUstream origin;
    std::unique_ptr<CUgraph_st> graph;
    bool invalid = false;
};

struct CUevent_st {
    CUcontext context;
    unsigned int flags;
    CUstream stream = nullptr;     // where it was last recorded
    unsigned long long mark = 0;   // it is reached when this much of the stream's work is done
    std::chrono::steady_clock::time_point time{};
    std::shared_ptr<Capture> capture{};  // recorded in this capture, after these nodes
    std::vector<CUgraphNode> frontier{};
};

struct CUstream_st {
    CUcontext context;
    unsigned int flags;
    int priority;
    std::shared_ptr<Capture> capture{};
    std::vector<CUgraphNode> frontier{};  // what the next captured operation comes after

    struct Item {
        CUgraphNode_st work;
        CUstream wait = nullptr;  // instead of work: go on when that stream has done `mark` items
        unsigned long long mark = 0;
    };
    std::deque<Item> pending{};  // only with double_defer
    unsigned long long issued = 0, done = 0;
};

// Objects by their handles. A handle that is not here is refused.
template <typename T>
class Live {
  public:
    T* add(std::unique_ptr<T> object) {
        T* handle = object.get();
        objects_[handle] = std::move(object);
        return handle;
    }
    bool has(const void* handle) const { return objects_.count(handle) != 0; }
    bool remove(const void* handle) { return objects_.erase(handle) != 0; }
    void remove_of(CUcontext context) {
        for (auto it = objects_.begin(); it != objects_.end();) {
            it = it->second->context == context ? objects_.erase(it) : std::next(it);
        }
    }
    size_t count() const { return objects_.size(); }
    auto begin() { return objects_.begin(); }
    auto end() { return objects_.end(); }

  private:
    std::map<const void*, std::unique_ptr<T>> objects_;
};

struct Allocation {
    CUcontext context;
    size_t bytes;
    bool on_host;
    unsigned int flags;
    unsigned char* start;  // between guard zones
};

struct Failure {
    CUresult result;
    int calls_left;
};

struct State {
    std::recursive_mutex lock;
    bool initialised = false;
    bool deferred = false;   // streams work only when something waits for them
    bool backwards = false;  // kernels run their last block and last thread first
    CUresult corrupted = CUDA_SUCCESS;  // a kernel failed: as on a GPU, nothing works any more
    std::string calls, work;            // logs, a line each
    std::map<std::string, std::vector<Failure>> failures;
    std::map<int, int> attributes;  // set by a test
    std::map<const void*, std::unique_ptr<CUctx_st>> contexts;
    CUcontext primary = nullptr;
    int primary_retained = 0;
    unsigned int primary_flags = 0;
    Live<CUstream_st> streams;
    Live<CUevent_st> events;
    Live<CUmod_st> modules;
    Live<CUfunc_st> functions;
    Live<CUgraph_st> graphs;
    Live<CUgraphExec_st> executables;
    std::map<uintptr_t, Allocation> memory;
    std::deque<Allocation> freed;  // kept for a while, full of NaN, for whoever still reads them
    size_t live_bytes = 0, peak_bytes = 0, freed_bytes = 0;
};

State& state();
CUcontext current_context();  // nullptr where none is current or it was destroyed

// Holds the double's lock for one driver call, logs it, and says in `refused` why it must not go on.
class Call {
  public:
    enum Needs { NOTHING, INITIALISED, CONTEXT };
    Call(const char* symbol, Needs needs);
    CUresult refused = CUDA_SUCCESS;

  private:
    std::lock_guard<std::recursive_mutex> hold_;
};

#define ENTER(needs)                    \
    Call call(__func__, Call::needs);   \
    if (call.refused) return call.refused
#define REFUSE_IF(condition, result) \
    if (condition) return result
#define TRY(expression) \
    if (CUresult tried = (expression)) return tried

// memory.cpp
Allocation* allocation_of(uintptr_t address, size_t bytes);  // nullptr: not all inside one live allocation
bool guard_zones_intact();
void free_memory_of(CUcontext context);

// streams.cpp
CUresult resolve(CUstream handle, CUstream* stream);
CUresult submit(CUstream stream, CUgraphNode_st node);
CUresult drain(CUstream stream, unsigned long long mark);
CUresult drain_all();
CUresult refuse_in_capture(bool also_relaxed = false);
CUresult synchronous_call();  // what a copy or fill without a stream does first

// graphs.cpp
CUresult perform(const CUgraphNode_st& node);
