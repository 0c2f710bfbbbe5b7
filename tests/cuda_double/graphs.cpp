// Graphs, and what performing one of their nodes does. Nodes that do not depend on each other run in the opposite
// of the order in which they were added, so that a forgotten dependency shows.
#include <set>

#include "double_state.h"

namespace {

void flatten(const CUgraph_st& graph, std::vector<CUgraphNode>& order) {
    std::map<CUgraphNode, size_t> number;
    for (size_t n = 0; n < graph.nodes.size(); ++n) number[graph.nodes[n].get()] = n;
    std::vector<size_t> waiting_for(graph.nodes.size());
    std::vector<std::vector<size_t>> followers(graph.nodes.size());
    std::set<size_t> ready;
    for (size_t n = 0; n < graph.nodes.size(); ++n) {
        waiting_for[n] = graph.nodes[n]->after.size();
        for (CUgraphNode before : graph.nodes[n]->after) followers[number.at(before)].push_back(n);
        if (waiting_for[n] == 0) ready.insert(n);
    }
    while (!ready.empty()) {
        size_t last = *ready.rbegin();
        ready.erase(last);
        CUgraphNode node = graph.nodes[last].get();
        if (node->child) {
            flatten(*node->child, order);
        } else {
            order.push_back(node);
        }
        for (size_t follower : followers[last]) {
            if (--waiting_for[follower] == 0) ready.insert(follower);
        }
    }
}

CUresult instantiate(CUgraphExec* executable, CUgraph graph) {
    REFUSE_IF(executable == nullptr, CUDA_ERROR_INVALID_VALUE);
    REFUSE_IF(!state().graphs.has(graph), CUDA_ERROR_INVALID_HANDLE);
    auto made = std::make_unique<CUgraphExec_st>(CUgraphExec_st{current_context(), graph->clone(), {}});
    flatten(*made->graph, made->order);
    *executable = state().executables.add(std::move(made));
    return CUDA_SUCCESS;
}

// The driver's way to answer with a list: without room, only how many there are.
CUresult answer(const std::vector<CUgraphNode>& found, CUgraphNode* nodes, size_t* count) {
    REFUSE_IF(count == nullptr, CUDA_ERROR_INVALID_VALUE);
    if (nodes != nullptr) {
        for (size_t n = 0; n < *count; ++n) nodes[n] = n < found.size() ? found[n] : nullptr;
    }
    *count = nodes == nullptr ? found.size() : std::min(*count, found.size());
    return CUDA_SUCCESS;
}

bool inside(const Allocation& allocation, const unsigned char* address) {
    return address >= allocation.start && address < allocation.start + allocation.bytes;
}

// A recorded copy may outlive its memory.
bool freed(const unsigned char* address) {
    if (allocation_of(reinterpret_cast<uintptr_t>(address), 1) != nullptr) return false;
    const std::deque<Allocation>& all = state().freed;
    return std::any_of(all.begin(), all.end(), [=](const Allocation& one) { return inside(one, address); });
}

const char* place(const unsigned char* address) {
    Allocation* allocation = allocation_of(reinterpret_cast<uintptr_t>(address), 1);
    return allocation != nullptr && !allocation->on_host ? "device" : "host";
}

std::string size(dim3 d) {
    return std::to_string(d.x) + "x" + std::to_string(d.y) + "x" + std::to_string(d.z);
}

CUresult corrupt(CUresult result) { return state().corrupted = result; }

}  // namespace

CUgraphNode CUgraph_st::add(CUgraphNode_st node) {
    nodes.push_back(std::make_unique<CUgraphNode_st>(std::move(node)));
    return nodes.back().get();
}

bool CUgraph_st::has(CUgraphNode node) const {
    return std::any_of(nodes.begin(), nodes.end(), [=](auto& own) { return own.get() == node; });
}

std::shared_ptr<CUgraph_st> CUgraph_st::clone() const {
    auto copy = std::make_shared<CUgraph_st>();
    std::map<CUgraphNode, CUgraphNode> copies;
    for (auto& node : nodes) {
        copies[node.get()] = copy->add(*node);
        for (CUgraphNode& before : copy->nodes.back()->after) before = copies.at(before);
    }
    return copy;
}

CUresult perform(const CUgraphNode_st& node) {
    State& s = state();
    REFUSE_IF(s.corrupted != CUDA_SUCCESS, s.corrupted);
    switch (node.type) {
        case CU_GRAPH_NODE_TYPE_KERNEL:
            s.work += std::string("kernel ") + node.kernel->name + " " + size(node.grid) + " " + size(node.block) + "\n";
            if (int fault = cuda_shim::run(*node.kernel, node.grid, node.block, node.argument.data(), s.backwards)) {
                return corrupt(static_cast<CUresult>(fault));
            }
            return guard_zones_intact() ? CUDA_SUCCESS : corrupt(CUDA_ERROR_ILLEGAL_ADDRESS);
        case CU_GRAPH_NODE_TYPE_MEMCPY:
            s.work += std::string("copy ") + place(node.source) + " to " + place(node.target) + " " +
                      std::to_string(node.bytes) + "\n";
            if (freed(node.source) || freed(node.target)) return corrupt(CUDA_ERROR_ILLEGAL_ADDRESS);
            std::memmove(node.target, node.source, node.bytes);
            return CUDA_SUCCESS;
        case CU_GRAPH_NODE_TYPE_MEMSET:
            s.work += "fill " + std::to_string(node.bytes) + "\n";
            if (freed(node.target)) return corrupt(CUDA_ERROR_ILLEGAL_ADDRESS);
            for (size_t n = 0; n < node.bytes; n += node.value_bytes) {
                std::memcpy(node.target + n, &node.value, node.value_bytes);
            }
            return CUDA_SUCCESS;
        default: return CUDA_ERROR_NOT_SUPPORTED;
    }
}

EXPORT CUresult cuGraphCreate(CUgraph* graph, unsigned int flags) {
    ENTER(INITIALISED);
    REFUSE_IF(graph == nullptr || flags != 0, CUDA_ERROR_INVALID_VALUE);
    *graph = state().graphs.add(std::make_unique<CUgraph_st>());
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphDestroy(CUgraph graph) {
    ENTER(INITIALISED);
    return state().graphs.remove(graph) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

EXPORT CUresult cuGraphAddChildGraphNode(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies,
                                         size_t count, CUgraph child) {
    ENTER(INITIALISED);
    REFUSE_IF(node == nullptr || (count != 0 && dependencies == nullptr), CUDA_ERROR_INVALID_VALUE);
    REFUSE_IF(!state().graphs.has(graph) || !state().graphs.has(child), CUDA_ERROR_INVALID_HANDLE);
    CUgraphNode_st made{CU_GRAPH_NODE_TYPE_GRAPH};
    for (size_t n = 0; n < count; ++n) {
        REFUSE_IF(!graph->has(dependencies[n]), CUDA_ERROR_INVALID_VALUE);
        made.after.push_back(dependencies[n]);
    }
    made.child = child->clone();
    *node = graph->add(std::move(made));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode* nodes, size_t* count) {
    ENTER(INITIALISED);
    REFUSE_IF(!state().graphs.has(graph), CUDA_ERROR_INVALID_HANDLE);
    std::vector<CUgraphNode> found;
    for (auto& node : graph->nodes) found.push_back(node.get());
    return answer(found, nodes, count);
}

EXPORT CUresult cuGraphGetRootNodes(CUgraph graph, CUgraphNode* nodes, size_t* count) {
    ENTER(INITIALISED);
    REFUSE_IF(!state().graphs.has(graph), CUDA_ERROR_INVALID_HANDLE);
    std::vector<CUgraphNode> found;
    for (auto& node : graph->nodes) {
        if (node->after.empty()) found.push_back(node.get());
    }
    return answer(found, nodes, count);
}

EXPORT CUresult cuGraphNodeGetType(CUgraphNode node, CUgraphNodeType* type) {
    ENTER(INITIALISED);
    for (auto& [handle, graph] : state().graphs) {
        if (!graph->has(node)) continue;
        *type = node->type;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_HANDLE;
}

EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
    Call call("cuGraphInstantiate", Call::CONTEXT);  // its name in cuda.h and the bindings since CUDA 12
    if (call.refused) return call.refused;
    return instantiate(executable, graph);
}

EXPORT CUresult cuGraphInstantiate_v2(CUgraphExec* executable, CUgraph graph, CUgraphNode*, char*, size_t) {
    ENTER(CONTEXT);
    return instantiate(executable, graph);
}

EXPORT CUresult cuGraphUpload(CUgraphExec executable, CUstream handle) {
    ENTER(CONTEXT);
    CUstream stream;
    REFUSE_IF(!state().executables.has(executable), CUDA_ERROR_INVALID_HANDLE);
    return resolve(handle, &stream);
}

EXPORT CUresult cuGraphLaunch(CUgraphExec executable, CUstream handle) {
    ENTER(CONTEXT);
    CUstream stream;
    REFUSE_IF(!state().executables.has(executable), CUDA_ERROR_INVALID_HANDLE);
    TRY(resolve(handle, &stream));
    if (stream->capture) {
        CUgraphNode_st node{CU_GRAPH_NODE_TYPE_GRAPH};
        node.child = executable->graph;
        return submit(stream, std::move(node));
    }
    for (CUgraphNode node : executable->order) TRY(submit(stream, *node));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphExecDestroy(CUgraphExec executable) {
    ENTER(INITIALISED);
    return state().executables.remove(executable) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
