// An edit with ONNX Runtime alone: the file that `sdedit export --loop MODEL.onnx -o edit.onnx` writes holds all of it.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>

#include "arguments.h"
#include "picture.h"

namespace {

const char *const USAGE = "EDIT.onnx GUIDE.png OUT.png [--seed 0] [--threads 0] [--mask MASK.png]";

// The shape of a uint8 input of the graph; sizes that are open are -1.
std::vector<int64_t> shape_of(const Ort::Session &session, size_t input, const std::string &name) {
    const auto type = session.GetInputTypeInfo(input);
    const auto tensor = type.GetTensorTypeAndShapeInfo();
    if (tensor.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8) {
        throw std::runtime_error("input " + name + " is not uint8: export with the default form of the guide");
    }
    return tensor.GetShape();
}

void edit(const Arguments &arguments) {
    Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "edit_cpp");
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads((int)arguments.threads);
    Ort::Session session(environment, arguments.names[0].c_str(), options);

    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<std::string> names;
    for (size_t i = 0; i < session.GetInputCount(); ++i) {
        names.emplace_back(session.GetInputNameAllocated(i, allocator).get());
    }
    const auto find = [&](const std::string &name) { return std::find(names.begin(), names.end(), name); };
    if (find("guide") == names.end() || find("seed") == names.end()) {
        throw std::runtime_error(arguments.names[0] + ": is no edit (inputs guide and seed): sdedit export --loop");
    }
    const bool wants_mask = find("mask") != names.end(), has_mask = arguments.options.count("--mask") != 0;
    if (wants_mask != has_mask) {
        throw std::runtime_error(arguments.names[0] + (wants_mask ? ": wants --mask" : ": takes no --mask"));
    }
    if (names.size() != (wants_mask ? 3u : 2u)) {
        throw std::runtime_error(arguments.names[0] + ": has further inputs, which this program does not set");
    }

    std::vector<int64_t> shape = shape_of(session, find("guide") - names.begin(), "guide");  // (B, H, W, C)
    if (shape.size() != 4) throw std::runtime_error("input guide is not (batch, height, width, channels)");
    Picture guide = read_png(arguments.names[1], (uint32_t)shape[3]);
    const bool fits = (shape[1] < 0 || shape[1] == guide.height) && (shape[2] < 0 || shape[2] == guide.width);
    if (!fits) {
        throw std::runtime_error(arguments.names[1] + ": is " + size_of(guide.width, guide.height) +
                                 "; the model wants " + size_of((uint32_t)shape[2], (uint32_t)shape[1]));
    }
    shape = {1, guide.height, guide.width, guide.channels};

    // Tensors lie on our memory; inputs are found by name, so their order does not matter.
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const int64_t one = 1;
    uint64_t seed = arguments.seed;
    std::vector<const char *> inputs = {"guide", "seed"};
    std::vector<Ort::Value> values;
    values.push_back(Ort::Value::CreateTensor(memory, guide.pixels.data(), guide.pixels.size(), shape.data(), 4));
    values.push_back(Ort::Value::CreateTensor(memory, &seed, 1, &one, 1));
    Picture mask;
    if (has_mask) {
        mask = read_png(arguments.options.at("--mask"), 1, guide.width, guide.height);
        inputs.push_back("mask");
        values.push_back(Ort::Value::CreateTensor(memory, mask.pixels.data(), mask.pixels.size(), shape.data(), 3));
    }

    const auto began = std::chrono::steady_clock::now();
    const char *const output = "image";
    const auto images = session.Run(Ort::RunOptions(), inputs.data(), values.data(), values.size(), &output, 1);
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - began;

    const uint8_t *const pixels = images[0].GetTensorData<uint8_t>();
    Picture result = guide;
    std::copy(pixels, pixels + result.pixels.size(), result.pixels.begin());
    write_png(arguments.names[2], result);
    std::cout << "edited in " << took.count() << " ms\n";
}

}  // namespace

int main(int argc, char **argv) {
    const Arguments arguments = read_arguments(argc, argv, USAGE, 3, {"--mask"});
    return run_reporting([&] { edit(arguments); });
}
