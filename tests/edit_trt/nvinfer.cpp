// A plan here is the text "linear C H W SLOPE OFFSET": the network D = slope x + offset / (1 + sigma), as a kernel of
// the driver double, for images of that size.
#include "NvInfer.h"

#include <cuda.h>

#include <map>
#include <sstream>
#include <string>

#include "linear_network.h"

namespace {

struct Told {
    int64_t channels, height, width;
    float slope, offset;
};

class Context : public nvinfer1::IExecutionContext {
   public:
    explicit Context(const Told &told) : told_(told) {
        CUmodule module;
        if (cuModuleLoadData(&module, "\x7f" "ELF the double looks at no more than this") != CUDA_SUCCESS ||
            cuModuleGetFunction(&function_, module, "linear") != CUDA_SUCCESS) {
            function_ = nullptr;
        }
    }

    bool setInputShape(const char *name, const nvinfer1::Dims &shape) noexcept override {
        if (std::string(name) == "sigma") return shape.nbDims == 1 && shape.d[0] == 1;
        return std::string(name) == "x" && shape.nbDims == 4 && shape.d[0] == 1 && shape.d[1] == told_.channels &&
               shape.d[2] == told_.height && shape.d[3] == told_.width;
    }

    bool setTensorAddress(const char *name, void *address) noexcept override {
        addresses_[name] = address;
        return addresses_.size() <= 3;
    }

    bool enqueueV3(cudaStream_t stream) noexcept override {
        const auto elements = (uint32_t)(told_.channels * told_.height * told_.width);
        linear_network network = {
            (float *)addresses_["x"], (float *)addresses_["sigma"], (float *)addresses_["denoised"],
            told_.slope,              told_.offset,                 1,
            elements,
        };
        void *parameters[] = {&network};
        return function_ && cuLaunchKernel(function_, (elements + 255) / 256, 1, 1, 256, 1, 1, 0, stream, parameters,
                                           nullptr) == CUDA_SUCCESS;
    }

   private:
    Told told_;
    CUfunction function_;
    std::map<std::string, void *> addresses_;
};

class Engine : public nvinfer1::ICudaEngine {
   public:
    explicit Engine(const Told &told) : told_(told) {}
    nvinfer1::IExecutionContext *createExecutionContext() noexcept override { return new Context(told_); }

   private:
    Told told_;
};

class Runtime : public nvinfer1::IRuntime {
   public:
    explicit Runtime(nvinfer1::ILogger &logger) : logger_(logger) {}

    nvinfer1::ICudaEngine *deserializeCudaEngine(const void *plan, std::size_t bytes) noexcept override {
        std::istringstream text(std::string((const char *)plan, bytes));
        std::string kind;
        Told told;
        if (text >> kind >> told.channels >> told.height >> told.width >> told.slope >> told.offset &&
            kind == "linear") {
            return new Engine(told);
        }
        logger_.log(nvinfer1::ILogger::Severity::kERROR, "the engine was made by another version");
        return nullptr;
    }

   private:
    nvinfer1::ILogger &logger_;
};

}  // namespace

nvinfer1::IRuntime *nvinfer1::createInferRuntime(ILogger &logger) noexcept { return new Runtime(logger); }
