// What a codec is given of a stream.
#pragma once

#include <cstdint>

namespace fusedstep {

struct Stream {
    void* items;
    void* extras;  // what the format keeps beside them
};

}  // namespace fusedstep
