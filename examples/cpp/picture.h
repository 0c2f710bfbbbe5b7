// PNG files as 8-bit pixels, by libpng's simplified interface. Link with png.
#pragma once

#include <png.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {
    uint32_t width = 0, height = 0, channels = 0;  // channels: 3 (RGB) or 1 (grey)
    std::vector<uint8_t> pixels;                   // (height, width, channels)
};

inline std::string size_of(uint32_t width, uint32_t height) {
    return std::to_string(width) + "x" + std::to_string(height);
}

// Any PNG with this many channels; transparent parts are put on white.
inline Picture read_png(const std::string &path, uint32_t channels) {
    if (channels != 1 && channels != 3) {
        throw std::runtime_error("the model has " + std::to_string(channels) + " channels; pictures have 3 or 1");
    }
    png_image image = {};
    image.version = PNG_IMAGE_VERSION;
    if (!png_image_begin_read_from_file(&image, path.c_str())) throw std::runtime_error(path + ": " + image.message);
    image.format = channels == 3 ? PNG_FORMAT_RGB : PNG_FORMAT_GRAY;
    Picture picture{image.width, image.height, channels, std::vector<uint8_t>(PNG_IMAGE_SIZE(image))};
    const png_color white = {255, 255, 255};
    if (!png_image_finish_read(&image, &white, picture.pixels.data(), 0, nullptr)) {
        throw std::runtime_error(path + ": " + image.message);
    }
    return picture;
}

// The same, of exactly this size: these programs leave resizing to the host.
inline Picture read_png(const std::string &path, uint32_t channels, uint32_t width, uint32_t height) {
    Picture picture = read_png(path, channels);
    if (picture.width != width || picture.height != height) {
        throw std::runtime_error(path + ": is " + size_of(picture.width, picture.height) + "; the model wants " +
                                 size_of(width, height));
    }
    return picture;
}

inline void write_png(const std::string &path, const Picture &picture) {
    png_image image = {};
    image.version = PNG_IMAGE_VERSION;
    image.width = picture.width;
    image.height = picture.height;
    image.format = picture.channels == 3 ? PNG_FORMAT_RGB : PNG_FORMAT_GRAY;
    if (!png_image_write_to_file(&image, path.c_str(), 0, picture.pixels.data(), 0, nullptr)) {
        throw std::runtime_error(path + ": " + image.message);
    }
}
