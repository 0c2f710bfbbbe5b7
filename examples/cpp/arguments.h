// The command line of these programs: so many names, then --option VALUE.
#pragma once

#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <map>
#include <string>
#include <vector>

struct Arguments {
    std::vector<std::string> names;
    std::map<std::string, std::string> options;
    uint64_t seed = 0;     // of --seed
    uint64_t threads = 0;  // of --threads; 0 leaves it to the runtime
};

// Prints `usage` and exits with 2 where the command line is not as it says.
inline Arguments read_arguments(int argc, char **argv, const std::string &usage, size_t names,
                                const std::vector<std::string> &options) {
    const auto refuse = [&](const std::string &why) {
        std::cerr << "error: " << why << "\nusage: " << argv[0] << " " << usage << "\n";
        std::exit(2);
    };
    Arguments read;
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        if (argument.rfind("--", 0) != 0) {
            read.names.push_back(argument);
            continue;
        }
        bool known = argument == "--seed" || argument == "--threads";
        for (const std::string &option : options) known |= argument == option;
        if (!known) refuse("unknown option " + argument);
        if (i + 1 == argc) refuse(argument + " wants a value");
        read.options[argument] = argv[++i];
    }
    if (read.names.size() != names) refuse("wanted " + std::to_string(names) + " file names");
    const auto whole = [&](const std::string &option, uint64_t most, uint64_t &value) {
        if (!read.options.count(option)) return;
        const std::string &text = read.options[option];
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        if (error != std::errc() || end != text.data() + text.size() || value > most) {
            refuse(option + " is " + text + "; wanted a whole number from 0 to " + std::to_string(most));
        }
    };
    whole("--seed", UINT64_MAX, read.seed);
    whole("--threads", 256, read.threads);
    return read;
}

// Runs the program; what it throws becomes one line and exit code 1.
template <class Program>
int run_reporting(Program program) {
    try {
        program();
    } catch (const std::exception &error) {
        std::cerr << "error: " << error.what() << "\n";
        return 1;
    }
    return 0;
}
