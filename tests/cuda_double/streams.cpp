// Streams, events and capture. A stream works at once, or with double_defer as late as it may; while it captures,
// its operations become nodes of a graph.
#include "double_state.h"

namespace {

CUresult invalidate(Capture& capture, CUresult result) {
    capture.invalid = true;
    return result;
}

bool blocking(CUstream stream) { return (stream->flags & CU_STREAM_NON_BLOCKING) == 0; }

// Work in the default stream waits for all blocking streams, which is impossible while one of them captures.
CUresult refuse_default_stream_in_capture(CUcontext context) {
    for (auto& [handle, stream] : state().streams) {
        if (stream->context == context && stream->capture && blocking(stream.get())) {
            return invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
        }
    }
    return CUDA_SUCCESS;
}

CUresult drain_blocking(CUcontext context) {
    for (auto& [handle, stream] : state().streams) {
        if (stream->context == context && blocking(stream.get())) TRY(drain(stream.get(), stream->issued));
    }
    return drain(context->legacy, context->legacy->issued);
}

void leave_capture(const std::shared_ptr<Capture>& capture) {
    for (auto& [handle, stream] : state().streams) {
        if (stream->capture != capture) continue;
        stream->capture.reset();
        stream->frontier.clear();
    }
}

void add_missing(std::vector<CUgraphNode>& nodes, const std::vector<CUgraphNode>& more) {
    for (CUgraphNode node : more) {
        if (std::find(nodes.begin(), nodes.end(), node) == nodes.end()) nodes.push_back(node);
    }
}

// Whether all that other streams captured comes before the end of the stream that began the capture.
bool joined(const Capture& capture) {
    std::vector<CUgraphNode> before = capture.origin->frontier;
    for (size_t n = 0; n < before.size(); ++n) add_missing(before, std::vector<CUgraphNode>(before[n]->after));
    for (auto& [handle, stream] : state().streams) {
        if (stream->capture.get() != &capture) continue;
        for (CUgraphNode node : stream->frontier) {
            if (std::find(before.begin(), before.end(), node) == before.end()) return false;
        }
    }
    return true;
}

CUresult capture_info(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
                      const CUgraphNode** dependencies, size_t* count) {
    CUstream stream;
    TRY(resolve(handle, &stream));
    REFUSE_IF(status == nullptr, CUDA_ERROR_INVALID_VALUE);
    if (!stream->capture) {
        *status = CU_STREAM_CAPTURE_STATUS_NONE;
        return CUDA_SUCCESS;
    }
    *status = stream->capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    if (id != nullptr) *id = stream->capture->id;
    if (graph != nullptr) *graph = stream->capture->graph.get();
    if (dependencies != nullptr) *dependencies = stream->frontier.data();
    if (count != nullptr) *count = stream->frontier.size();
    return CUDA_SUCCESS;
}

CUresult create_stream(CUstream* stream, unsigned int flags, int priority) {
    REFUSE_IF(stream == nullptr || flags > CU_STREAM_NON_BLOCKING, CUDA_ERROR_INVALID_VALUE);
    *stream = state().streams.add(std::make_unique<CUstream_st>(CUstream_st{current_context(), flags, priority}));
    return CUDA_SUCCESS;
}

CUresult check_event(CUevent event) {
    return state().events.has(event) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

bool reached(CUevent event) {
    return event->stream == nullptr || !state().streams.has(event->stream) || event->stream->done >= event->mark;
}

float elapsed_ms(CUevent start, CUevent end) {
    return std::chrono::duration<float, std::milli>(end->time - start->time).count();
}

}  // namespace

CUresult resolve(CUstream handle, CUstream* stream) {
    if (handle == nullptr || handle == CU_STREAM_LEGACY || handle == CU_STREAM_PER_THREAD) {
        *stream = current_context()->legacy;
        return CUDA_SUCCESS;
    }
    REFUSE_IF(!state().streams.has(handle), CUDA_ERROR_INVALID_HANDLE);
    REFUSE_IF(handle->context != current_context(), CUDA_ERROR_INVALID_CONTEXT);
    *stream = handle;
    return CUDA_SUCCESS;
}

CUresult submit(CUstream stream, CUgraphNode_st node) {
    if (stream->capture) {
        REFUSE_IF(stream->capture->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        node.after = stream->frontier;
        stream->frontier = {stream->capture->graph->add(std::move(node))};
        return CUDA_SUCCESS;
    }
    CUcontext context = stream->context;
    if (stream == context->legacy) {
        TRY(refuse_default_stream_in_capture(context));
        TRY(drain_blocking(context));
    } else if (blocking(stream)) {
        TRY(drain(context->legacy, context->legacy->issued));
    }
    ++stream->issued;
    stream->pending.push_back({std::move(node)});
    return state().deferred ? CUDA_SUCCESS : drain(stream, stream->issued);
}

CUresult drain(CUstream stream, unsigned long long mark) {
    while (stream->done < mark) {
        CUstream_st::Item item = std::move(stream->pending.front());
        stream->pending.pop_front();
        ++stream->done;
        if (item.wait == nullptr) {
            TRY(perform(item.work));
        } else if (state().streams.has(item.wait)) {
            TRY(drain(item.wait, item.mark));
        }
    }
    return CUDA_SUCCESS;
}

CUresult drain_all() {
    for (auto& [handle, stream] : state().streams) TRY(drain(stream.get(), stream->issued));
    for (auto& [handle, context] : state().contexts) TRY(drain(context->legacy, context->legacy->issued));
    return CUDA_SUCCESS;
}

CUresult refuse_in_capture(bool also_relaxed) {
    for (auto& [handle, stream] : state().streams) {
        if (!stream->capture) continue;
        Capture& capture = *stream->capture;
        bool here = capture.thread == std::this_thread::get_id();
        bool refused = capture.mode == CU_STREAM_CAPTURE_MODE_GLOBAL ||
                       (here && (also_relaxed || capture.mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
        if (refused) return invalidate(capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    return CUDA_SUCCESS;
}

CUresult synchronous_call() {
    TRY(refuse_in_capture());
    TRY(refuse_default_stream_in_capture(current_context()));
    return drain_blocking(current_context());
}

EXPORT CUresult cuStreamCreate(CUstream* stream, unsigned int flags) {
    ENTER(CONTEXT);
    return create_stream(stream, flags, 0);
}

EXPORT CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned int flags, int priority) {
    ENTER(CONTEXT);
    return create_stream(stream, flags, priority);
}

EXPORT CUresult cuStreamDestroy_v2(CUstream stream) {
    ENTER(INITIALISED);
    REFUSE_IF(!state().streams.has(stream), CUDA_ERROR_INVALID_HANDLE);
    if (stream->capture) leave_capture(std::shared_ptr<Capture>(stream->capture));
    CUresult result = drain(stream, stream->issued);
    state().streams.remove(stream);
    return result;
}

EXPORT CUresult cuStreamSynchronize(CUstream handle) {
    ENTER(CONTEXT);
    CUstream stream;
    TRY(resolve(handle, &stream));
    if (stream->capture) return invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    if (stream == stream->context->legacy) {
        TRY(refuse_default_stream_in_capture(stream->context));
        return drain_blocking(stream->context);
    }
    return drain(stream, stream->issued);
}

EXPORT CUresult cuStreamQuery(CUstream handle) {
    ENTER(CONTEXT);
    CUstream stream;
    TRY(resolve(handle, &stream));
    if (stream->capture) return invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    if (stream->done == stream->issued) return CUDA_SUCCESS;
    TRY(drain(stream, stream->done + 1));  // so that whoever asks again and again gets there
    return CUDA_ERROR_NOT_READY;
}

EXPORT CUresult cuStreamGetCtx(CUstream handle, CUcontext* context) {
    ENTER(CONTEXT);
    CUstream stream;
    TRY(resolve(handle, &stream));
    *context = stream->context;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamGetFlags(CUstream handle, unsigned int* flags) {
    ENTER(CONTEXT);
    CUstream stream;
    TRY(resolve(handle, &stream));
    *flags = stream->flags;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamGetPriority(CUstream handle, int* priority) {
    ENTER(CONTEXT);
    CUstream stream;
    TRY(resolve(handle, &stream));
    *priority = stream->priority;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned int flags) {
    ENTER(CONTEXT);
    CUstream stream;
    TRY(resolve(handle, &stream));
    TRY(check_event(event));
    REFUSE_IF(flags > 1, CUDA_ERROR_INVALID_VALUE);
    if (event->capture) {
        REFUSE_IF(event->capture->graph == nullptr, CUDA_ERROR_INVALID_VALUE);  // that capture has ended
        REFUSE_IF(stream == stream->context->legacy, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
        if (stream->capture && stream->capture != event->capture) {
            invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_MERGE);
            return invalidate(*event->capture, CUDA_ERROR_STREAM_CAPTURE_MERGE);
        }
        stream->capture = event->capture;
        add_missing(stream->frontier, event->frontier);
        return CUDA_SUCCESS;
    }
    if (stream->capture) return invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    if (!reached(event) && event->stream != stream) {
        ++stream->issued;
        stream->pending.push_back({{}, event->stream, event->mark});
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    ENTER(CONTEXT);
    CUstream stream;
    TRY(resolve(handle, &stream));
    REFUSE_IF(mode > CU_STREAM_CAPTURE_MODE_RELAXED, CUDA_ERROR_INVALID_VALUE);
    REFUSE_IF(stream == stream->context->legacy, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    REFUSE_IF(stream->capture != nullptr, CUDA_ERROR_ILLEGAL_STATE);
    static unsigned long long captures = 0;
    stream->capture = std::make_shared<Capture>(
        Capture{++captures, mode, std::this_thread::get_id(), stream, std::make_unique<CUgraph_st>()});
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    ENTER(CONTEXT);
    CUstream stream;
    TRY(resolve(handle, &stream));
    REFUSE_IF(graph == nullptr, CUDA_ERROR_INVALID_VALUE);
    REFUSE_IF(!stream->capture, CUDA_ERROR_ILLEGAL_STATE);
    std::shared_ptr<Capture> capture = stream->capture;
    REFUSE_IF(capture->origin != stream, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && capture->thread != std::this_thread::get_id()) {
        return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    }
    bool complete = joined(*capture);
    leave_capture(capture);
    std::unique_ptr<CUgraph_st> captured = std::move(capture->graph);
    *graph = nullptr;
    REFUSE_IF(capture->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    REFUSE_IF(!complete, CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
    *graph = state().graphs.add(std::move(captured));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
    ENTER(CONTEXT);
    return capture_info(handle, status, nullptr, nullptr, nullptr, nullptr);
}

EXPORT CUresult cuStreamGetCaptureInfo_v2(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id,
                                          CUgraph* graph, const CUgraphNode** dependencies, size_t* count) {
    ENTER(CONTEXT);
    return capture_info(stream, status, id, graph, dependencies, count);
}

EXPORT CUresult cuStreamGetCaptureInfo_v3(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id,
                                          CUgraph* graph, const CUgraphNode** dependencies,
                                          const CUgraphEdgeData** edges, size_t* count) {
    ENTER(CONTEXT);
    if (edges != nullptr) *edges = nullptr;
    return capture_info(stream, status, id, graph, dependencies, count);
}

EXPORT CUresult cuEventCreate(CUevent* event, unsigned int flags) {
    ENTER(CONTEXT);
    REFUSE_IF(event == nullptr, CUDA_ERROR_INVALID_VALUE);
    *event = state().events.add(std::make_unique<CUevent_st>(CUevent_st{current_context(), flags}));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventDestroy_v2(CUevent event) {
    ENTER(INITIALISED);
    TRY(check_event(event));
    state().events.remove(event);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventRecord(CUevent event, CUstream handle) {
    ENTER(CONTEXT);
    CUstream stream;
    TRY(resolve(handle, &stream));
    TRY(check_event(event));
    if (stream->capture) {
        REFUSE_IF(stream->capture->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        event->capture = stream->capture;
        event->frontier = stream->frontier;
        return CUDA_SUCCESS;
    }
    event->capture.reset();
    event->stream = stream;
    event->mark = stream->issued;
    event->time = std::chrono::steady_clock::now();
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventSynchronize(CUevent event) {
    ENTER(CONTEXT);
    TRY(check_event(event));
    if (event->capture) return invalidate(*event->capture, CUDA_ERROR_CAPTURED_EVENT);
    TRY(refuse_in_capture());
    return reached(event) ? CUDA_SUCCESS : drain(event->stream, event->mark);
}

EXPORT CUresult cuEventQuery(CUevent event) {
    ENTER(CONTEXT);
    TRY(check_event(event));
    if (event->capture) return invalidate(*event->capture, CUDA_ERROR_CAPTURED_EVENT);
    TRY(refuse_in_capture());
    if (reached(event)) return CUDA_SUCCESS;
    TRY(drain(event->stream, event->stream->done + 1));
    return CUDA_ERROR_NOT_READY;
}

EXPORT CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
    ENTER(CONTEXT);
    TRY(check_event(start));
    TRY(check_event(end));
    bool timed = ((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING) == 0;
    REFUSE_IF(!timed || start->stream == nullptr || end->stream == nullptr, CUDA_ERROR_INVALID_HANDLE);
    REFUSE_IF(!reached(start) || !reached(end), CUDA_ERROR_NOT_READY);
    *milliseconds = elapsed_ms(start, end);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}
