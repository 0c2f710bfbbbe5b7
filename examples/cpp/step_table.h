// What `sdedit inspect --json --t0 0.5 --steps 20 MODEL.onnx` prints: the model's frame, and the rows of the edit.
#pragma once

#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "sdedit.cuh"

struct StepTable {
    uint32_t channels, height, width;
    std::vector<sdedit_row> rows;

    uint32_t plane() const { return height * width; }
    uint32_t elements() const { return channels * plane(); }
    bool two_step() const {  // whether a row looks back at the step before
        bool found = false;
        for (const sdedit_row &row : rows) found |= row.d != 0;
        return found;
    }
};

inline StepTable read_step_table(const std::string &path) {
    const char *const make_it = " (make it with: sdedit inspect --json --t0 0.5 --steps 20 MODEL.onnx)";
    std::ifstream file(path);
    if (!file) throw std::runtime_error(path + ": cannot be opened");
    try {
        const nlohmann::json described = nlohmann::json::parse(file);
        const nlohmann::json &image = described.at("metadata").at("image"), &table = described.at("table");
        const std::vector<std::string> columns = {"sigma", "a", "b", "c", "d", "sigma_next"};
        if (table.at("version") != 1 || table.at("columns") != columns) {
            throw std::runtime_error("the step table is of another version");
        }
        StepTable read{image.at("channels"), image.at("height"), image.at("width"), {}};
        for (const nlohmann::json &row : table.at("rows")) {
            const auto v = row.get<std::vector<double>>();
            if (v.size() != columns.size()) throw std::runtime_error("a row has too few or too many numbers");
            read.rows.push_back({(float)v[0], (float)v[1], (float)v[2], (float)v[3], (float)v[4], (float)v[5]});
        }
        if (read.rows.empty()) throw std::runtime_error("the step table is empty");
        return read;
    } catch (const nlohmann::json::parse_error &) {  // its text may hold any bytes of the file
        throw std::runtime_error(path + ": is not JSON" + make_it);
    } catch (const std::exception &error) {
        throw std::runtime_error(path + ": " + error.what() + make_it);
    }
}
