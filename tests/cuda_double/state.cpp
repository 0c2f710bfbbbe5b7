// The state itself, the guard of a call, and the functions by which tests look in and interfere.
#include "double_state.h"

State& state() {
    static State* const kept = new State;  // never destroyed: objects of Python outlive the library's statics
    return *kept;
}

Call::Call(const char* symbol, Needs needs) : hold_(state().lock) {
    State& s = state();
    std::string name = symbol;
    size_t suffix = name.rfind("_v");
    if (suffix != std::string::npos) name.resize(suffix);
    s.calls += name + "\n";
    std::vector<Failure>& failures = s.failures[name];
    for (Failure& failure : failures) --failure.calls_left;
    auto due = std::find_if(failures.begin(), failures.end(), [](auto& failure) { return failure.calls_left <= 0; });
    if (due != failures.end()) {
        refused = due->result;
        failures.erase(due);
        return;
    }
    if (needs >= INITIALISED && !s.initialised) {
        refused = CUDA_ERROR_NOT_INITIALIZED;
    } else if (needs == CONTEXT) {
        refused = current_context() == nullptr ? CUDA_ERROR_INVALID_CONTEXT : s.corrupted;
    }
}

namespace {

std::lock_guard<std::recursive_mutex> locked() { return std::lock_guard<std::recursive_mutex>(state().lock); }

const char* text(std::string answer) {  // valid until the thread's next question
    thread_local std::string kept;
    kept = std::move(answer);
    return kept.c_str();
}

}  // namespace

EXPORT const char* double_log() {
    auto hold = locked();
    return text(state().calls);
}

EXPORT const char* double_work() {
    auto hold = locked();
    return text(state().work);
}

EXPORT void double_reset() {
    auto hold = locked();
    State& s = state();
    s.calls.clear();
    s.work.clear();
    s.failures.clear();
    s.attributes.clear();
    s.corrupted = CUDA_SUCCESS;
    s.backwards = false;
    drain_all();
    s.deferred = false;
    s.peak_bytes = s.live_bytes;
}

EXPORT void double_fail(const char* call, int result, int nth) {
    auto hold = locked();
    state().failures[call].push_back({static_cast<CUresult>(result), nth});
}

EXPORT void double_set_attribute(int attribute, int value) {
    auto hold = locked();
    state().attributes[attribute] = value;
}

EXPORT void double_defer(int on) {
    auto hold = locked();
    drain_all();
    state().deferred = on != 0;
}

EXPORT void double_run_backwards(int on) {
    auto hold = locked();
    state().backwards = on != 0;
}

EXPORT size_t double_live_bytes() {
    auto hold = locked();
    return state().live_bytes;
}

EXPORT size_t double_peak_bytes() {
    auto hold = locked();
    return state().peak_bytes;
}

EXPORT const char* double_live_objects() {
    auto hold = locked();
    State& s = state();
    size_t contexts = s.primary_retained, device = 0, host = 0;
    for (auto& context : s.contexts) contexts += !context.second->primary;
    for (auto& allocation : s.memory) ++(allocation.second.on_host ? host : device);
    std::string lines;
    auto line = [&](const char* kind, size_t count) { lines += kind + (" " + std::to_string(count)) + "\n"; };
    line("contexts", contexts);
    line("streams", s.streams.count());
    line("events", s.events.count());
    line("modules", s.modules.count());
    line("graphs", s.graphs.count());
    line("executables", s.executables.count());
    line("device_allocations", device);
    line("host_allocations", host);
    return text(lines);
}
