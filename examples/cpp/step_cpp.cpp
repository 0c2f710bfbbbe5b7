// The loop of an edit in C++: ONNX Runtime runs the network, the engine's header everything around it.
#include <onnxruntime_cxx_api.h>

#include <array>
#include <chrono>
#include <cmath>

#include "arguments.h"
#include "picture.h"
#include "sdedit.cuh"
#include "step_table.h"

namespace {

const char *const USAGE = "MODEL.onnx TABLE.json GUIDE.png OUT.png [--seed 0] [--threads 0] [--operators LIBRARY]";

// Standard normals for one use: the same bits as in Python and on a GPU.
void draw(uint64_t seed, uint32_t step, uint32_t elements, std::vector<float> &z) {
    for (uint32_t block = 0; 4 * block < elements; ++block) {
        const sdedit::normals four = sdedit::draw(seed, block, step, 0, sdedit::STREAM_STATE);
        std::copy(four.z, four.z + 4, z.begin() + 4 * (size_t)block);
    }
}

// The denoiser D(x; sigma), on memory that stays in place.
class Network {
   public:
    // operators: the library that the graph of `python -m sdedit.operators.graph` wants; none for a model as it is.
    Network(const std::string &path, int threads, const std::string &operators, const StepTable &table,
            std::vector<float> &x, std::vector<float> &denoised)
        : session_(environment_, path.c_str(), options(threads, operators)), binding_(session_) {
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        const std::array<int64_t, 4> shape = {1, table.channels, table.height, table.width};
        const int64_t one = 1;
        binding_.BindInput("x", Ort::Value::CreateTensor(memory, x.data(), x.size(), shape.data(), shape.size()));
        binding_.BindInput("sigma", Ort::Value::CreateTensor(memory, &sigma_, 1, &one, 1));
        binding_.BindOutput(
            "denoised", Ort::Value::CreateTensor(memory, denoised.data(), denoised.size(), shape.data(), shape.size()));
    }

    void run(float sigma) {
        sigma_ = sigma;
        session_.Run(Ort::RunOptions(), binding_);
    }

   private:
    static Ort::SessionOptions options(int threads, const std::string &operators) {
        Ort::SessionOptions options;
        options.SetIntraOpNumThreads(threads);
        if (!operators.empty()) {
            options.RegisterCustomOpsLibrary(operators.c_str());
            options.SetGraphOptimizationLevel(ORT_DISABLE_ALL);  // it has been optimised
        }
        return options;
    }

    Ort::Env environment_{ORT_LOGGING_LEVEL_ERROR, "step_cpp"};
    float sigma_ = 0;
    Ort::Session session_;
    Ort::IoBinding binding_;
};

void edit(const Arguments &arguments) {
    const StepTable table = read_step_table(arguments.names[1]);
    const uint32_t elements = table.elements(), plane = table.plane(), channels = table.channels;
    Picture picture = read_png(arguments.names[2], channels, table.width, table.height);
    std::vector<float> x(elements), denoised(elements), previous(elements), z(elements + 3);
    const auto operators = arguments.options.find("--operators");
    Network network(arguments.names[0], (int)arguments.threads,
                    operators == arguments.options.end() ? "" : operators->second, table, x, denoised);

    const auto began = std::chrono::steady_clock::now();
    for (uint32_t i = 0; i < elements; ++i) {  // pixels (H, W, C) -> x (C, H, W) in [-1, 1]
        x[i] = sdedit::sub((float)picture.pixels[i % plane * channels + i / plane] / 127.5f, 1.0f);
    }
    draw(arguments.seed, 0, elements, z);
    for (uint32_t i = 0; i < elements; ++i) x[i] = sdedit::add(x[i], sdedit::mul(table.rows[0].sigma, z[i]));

    for (uint32_t step = 1; step <= table.rows.size(); ++step) {
        const sdedit_row &row = table.rows[step - 1];
        network.run(row.sigma);
        if (row.c != 0) draw(arguments.seed, step, elements, z);
        for (uint32_t i = 0; i < elements; ++i) {
            if (!std::isfinite(denoised[i])) {
                throw std::runtime_error("the network returned NaN or Inf at step " + std::to_string(step));
            }
            x[i] = sdedit::update(row, x[i], denoised[i], previous[i], z[i]);
        }
        if (table.two_step()) previous = denoised;
    }
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - began;

    for (uint32_t i = 0; i < elements; ++i) picture.pixels[i % plane * channels + i / plane] = sdedit::pixel(x[i]);
    write_png(arguments.names[3], picture);
    std::cout << "edited in " << took.count() << " ms, " << table.rows.size() << " steps\n";
}

}  // namespace

int main(int argc, char **argv) {
    const Arguments arguments = read_arguments(argc, argv, USAGE, 4, {"--operators"});
    return run_reporting([&] { edit(arguments); });
}
