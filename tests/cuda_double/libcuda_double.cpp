// A double of libcuda.so.1 that runs on the CPU: it shows that a program packs arguments, orders calls, indexes and
// handles errors rightly. It is not a GPU. One translation unit, since that compiles fastest.
#include "state.cpp"
#include "device.cpp"
#include "memory.cpp"
#include "streams.cpp"
#include "graphs.cpp"
#include "modules.cpp"
#include "proc_address.cpp"
#include "absent.cpp"
#include "run_grid.cpp"
