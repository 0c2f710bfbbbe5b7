// What examples/cpp/edit_trt.cpp uses of TensorRT, in TensorRT's place: engines that run the linear network of the
// driver double. It shows what the program does with its plan; that the real headers have these names, it does not.
#pragma once

#include <cstddef>
#include <cstdint>

typedef struct CUstream_st *cudaStream_t;

namespace nvinfer1 {

struct Dims {
    int32_t nbDims;
    int64_t d[8];
};

struct Dims4 : Dims {
    Dims4(int64_t d0, int64_t d1, int64_t d2, int64_t d3) : Dims{4, {d0, d1, d2, d3}} {}
};

class ILogger {
   public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, const char *message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IExecutionContext {
   public:
    virtual bool setInputShape(const char *name, const Dims &shape) noexcept = 0;
    virtual bool setTensorAddress(const char *name, void *address) noexcept = 0;
    virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
    virtual ~IExecutionContext() = default;
};

class ICudaEngine {
   public:
    virtual IExecutionContext *createExecutionContext() noexcept = 0;
    virtual ~ICudaEngine() = default;
};

class IRuntime {
   public:
    virtual ICudaEngine *deserializeCudaEngine(const void *plan, std::size_t bytes) noexcept = 0;
    virtual ~IRuntime() = default;
};

IRuntime *createInferRuntime(ILogger &logger) noexcept;

}  // namespace nvinfer1
