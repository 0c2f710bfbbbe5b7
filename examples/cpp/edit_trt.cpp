// An edit on an NVIDIA GPU: TensorRT runs the network, the engine's kernels everything around it, and both together
// are one CUDA graph, launched once. The plan: sdedit build; the kernels: sdedit.fatbin beside sdedit.cuh.
#include <NvInfer.h>
#include <cuda.h>

#include <chrono>
#include <fstream>
#include <iterator>
#include <memory>

#include "arguments.h"
#include "picture.h"
#include "step_table.h"

namespace {

const char *const USAGE = "MODEL.plan GUIDE.png OUT.png --fatbin sdedit.fatbin --table TABLE.json [--seed 0]";

void check(CUresult result, const char *call) {
    if (result == CUDA_SUCCESS) return;
    const char *meaning = nullptr;
    cuGetErrorString(result, &meaning);
    throw std::runtime_error(std::string(call) + ": " + (meaning ? meaning : "unknown error"));
}
#define CHECK(call) check(call, #call)

class Logger : public nvinfer1::ILogger {
    void log(Severity severity, const char *message) noexcept override {
        if (severity <= Severity::kERROR) std::cerr << "TensorRT: " << message << "\n";
    }
};

std::vector<char> read_bytes(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + ": cannot be opened");
    return {std::istreambuf_iterator<char>(file), {}};
}

// The GPU's primary context, which TensorRT uses too, and a stream. The process owns what they hold, to its end.
CUstream open_stream() {
    CUdevice device;
    CUcontext context;
    CUstream stream;
    CHECK(cuInit(0));
    CHECK(cuDeviceGet(&device, 0));
    CHECK(cuDevicePrimaryCtxRetain(&context, device));
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    return stream;
}

template <typename T>
T *allocate(size_t count) {
    CUdeviceptr address;
    CHECK(cuMemAlloc(&address, count * sizeof(T)));
    return reinterpret_cast<T *>(address);
}

CUdeviceptr address_of(const void *memory) { return reinterpret_cast<CUdeviceptr>(memory); }

template <typename T>
T *upload(const std::vector<T> &values) {
    T *const memory = allocate<T>(values.size());
    CHECK(cuMemcpyHtoD(address_of(memory), values.data(), values.size() * sizeof(T)));
    return memory;
}

// The network on its stream, its tensors at the addresses that the kernels use.
class Network {
   public:
    Network(const std::string &path, const StepTable &table, const sdedit_edit &edit) {
        const std::vector<char> plan = read_bytes(path);
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        if (runtime_) engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
        if (!engine_) throw std::runtime_error(path + ": is no plan for this TensorRT and this GPU");
        context_.reset(engine_->createExecutionContext());
        if (!context_) throw std::runtime_error(path + ": not enough memory on the GPU");
        const int channels = (int)table.channels, height = (int)table.height, width = (int)table.width;
        const bool bound = context_->setInputShape("x", nvinfer1::Dims4(1, channels, height, width)) &&
                           context_->setInputShape("sigma", nvinfer1::Dims{1, {1}}) &&
                           context_->setTensorAddress("x", edit.x) && context_->setTensorAddress("sigma", edit.sigma) &&
                           context_->setTensorAddress("denoised", const_cast<float *>(edit.denoised));
        if (!bound) throw std::runtime_error(path + ": does not take one image of the size in the table");
    }

    void enqueue(CUstream stream) {
        if (!context_->enqueueV3(reinterpret_cast<cudaStream_t>(stream))) {
            throw std::runtime_error("TensorRT could not run the network");
        }
    }

   private:
    Logger logger_;  // outlives the others
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

void edit(const Arguments &arguments) {
    const StepTable table = read_step_table(arguments.options.at("--table"));
    const uint32_t elements = table.elements(), plane = table.plane(), channels = table.channels;
    Picture picture = read_png(arguments.names[1], channels, table.width, table.height);
    std::vector<float> guide(elements);
    for (uint32_t i = 0; i < elements; ++i) {  // pixels (H, W, C) -> (C, H, W) in [-1, 1]
        guide[i] = sdedit::sub((float)picture.pixels[i % plane * channels + i / plane] / 127.5f, 1.0f);
    }

    const CUstream stream = open_stream();
    CUmodule module;
    CUfunction start, step, to_pixels;
    CHECK(cuModuleLoadData(&module, read_bytes(arguments.options.at("--fatbin")).data()));
    CHECK(cuModuleGetFunction(&start, module, "sdedit_start"));
    CHECK(cuModuleGetFunction(&step, module, "sdedit_step"));
    CHECK(cuModuleGetFunction(&to_pixels, module, "sdedit_pixels"));

    sdedit_edit edit = {};
    edit.interface = SDEDIT_INTERFACE;
    edit.batch = edit.tables = 1;
    edit.elements = elements;
    edit.plane = plane;
    edit.steps = (uint32_t)table.rows.size();
    edit.x = upload(guide);  // any finite values: the network may be run once before the edit
    edit.sigma = upload(std::vector<float>{table.rows[0].sigma});
    edit.denoised = allocate<float>(elements);
    edit.previous = table.two_step() ? allocate<float>(elements) : nullptr;
    edit.guide = upload(guide);
    edit.table = reinterpret_cast<float *>(upload(table.rows));
    edit.seeds = upload(std::vector<uint64_t>{arguments.seed});
    edit.state = upload(std::vector<uint32_t>(4, 0));
    edit.pixels = allocate<uint8_t>(elements);
    Network network(arguments.names[0], table, edit);

    const auto launch = [&](CUfunction function, uint32_t blocks) {
        void *parameters[] = {&edit};
        CHECK(cuLaunchKernel(function, blocks, edit.batch, 1, 256, 1, 1, 0, stream, parameters, nullptr));
    };
    const uint32_t blocks = (elements + 1023) / 1024;

    CHECK(cuCtxSynchronize());  // the uploads went to another stream
    network.enqueue(stream);    // its first run may do what a graph cannot hold
    CHECK(cuStreamSynchronize(stream));
    CUgraph graph;
    CUgraphExec executable;
    CHECK(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    launch(start, blocks);
    for (uint32_t n = 0; n < edit.steps; ++n) {
        network.enqueue(stream);
        launch(step, blocks);
    }
    launch(to_pixels, (plane + 255) / 256);
    CHECK(cuStreamEndCapture(stream, &graph));
    CHECK(cuGraphInstantiate(&executable, graph, 0));

    // Another edit needs a new guide and seeds, state set to 0, and the same launch.
    const auto began = std::chrono::steady_clock::now();
    CHECK(cuGraphLaunch(executable, stream));
    CHECK(cuStreamSynchronize(stream));
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - began;

    sdedit_state state;
    CHECK(cuMemcpyDtoH(&state, address_of(edit.state), sizeof state));
    if (state.fault == SDEDIT_WRONG_INTERFACE) throw std::runtime_error("the fatbin has another interface version");
    if (state.fault) throw std::runtime_error("NaN or Inf at step " + std::to_string(state.fault));
    CHECK(cuMemcpyDtoH(picture.pixels.data(), address_of(edit.pixels), picture.pixels.size()));
    write_png(arguments.names[2], picture);
    std::cout << "edited in " << took.count() << " ms, " << edit.steps << " steps\n";
}

}  // namespace

int main(int argc, char **argv) {
    const Arguments arguments = read_arguments(argc, argv, USAGE, 3, {"--fatbin", "--table"});
    if (!arguments.options.count("--fatbin") || !arguments.options.count("--table")) {
        std::cerr << "error: --fatbin and --table are needed\nusage: " << argv[0] << " " << USAGE << "\n";
        return 2;
    }
    return run_reporting([&] { edit(arguments); });
}
