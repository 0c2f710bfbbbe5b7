// Runs a grid on the CPU: the threads of a block are fibers, so that a barrier can suspend one and go on with the
// next. A fiber is made once (ucontext) and then switched to by setjmp and longjmp, which enter no system call.
#include <csetjmp>
#include <csignal>
#include <map>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <ucontext.h>
#include <vector>

#include "cuda_shim.h"
#include "driver_abi.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

extern "C" {
// The linker's names for the ends of the section that holds __shared__ variables; absent where there are none.
extern unsigned char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));
}

namespace cuda_shim {
namespace {

constexpr size_t STACK_BYTES = 64 * 1024;

struct Fiber {
    enum State { READY, WAITING, DONE } state = READY;
    bool alive = false;  // its stack holds a suspended entry()
    int line = 0;        // of the barrier it waits at
    uint3 index{};
    unsigned char* stack = nullptr;
    jmp_buf where;
};

// Launches come one at a time: the double holds its lock over them.
std::vector<Fiber> fibers(1024);
Fiber* current;
jmp_buf scheduler;
const Kernel* running;
const void* running_argument;
int fault;

// Ends the launch from within a kernel.
void fail(int result) {
    fault = result;
    _longjmp(scheduler, 1);
}

// For the time of a launch, a kernel's bad pointer is the launch's error instead of the end of the process.
class BadPointersAreErrors {
  public:
    BadPointersAreErrors() {
        thread_ = std::this_thread::get_id();
        struct sigaction action = {};
        action.sa_handler = [](int) {
            if (std::this_thread::get_id() == thread_) fail(CUDA_ERROR_ILLEGAL_ADDRESS);
            std::signal(SIGSEGV, SIG_DFL);  // not the kernel: the access is repeated, and ends the process
        };
        action.sa_flags = SA_NODEFER;  // the handler does not return
        sigaction(SIGSEGV, &action, &before_);
    }
    ~BadPointersAreErrors() { sigaction(SIGSEGV, &before_, nullptr); }

  private:
    static std::thread::id thread_;
    struct sigaction before_;
};
std::thread::id BadPointersAreErrors::thread_;

void suspend() {
    if (_setjmp(current->where) == 0) _longjmp(scheduler, 1);
}

void entry() {
    for (;;) {
        running->call(running_argument);
        current->state = Fiber::DONE;
        suspend();
    }
}

void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx = fiber.index;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.alive) _longjmp(fiber.where, 1);
    fiber.alive = true;
    if (fiber.stack == nullptr) {
        void* memory =
            mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
        if (memory == MAP_FAILED) abort();
        fiber.stack = static_cast<unsigned char*>(memory);
    }
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&context, entry, 0);
    setcontext(&context);
}

int run_block(size_t threads, bool backwards) {
    std::fill(__start_cuda_shared, __stop_cuda_shared, 0xFF);
    for (size_t n = 0; n < threads; ++n) fibers[n].state = Fiber::READY;
    for (;;) {
        size_t done = 0;
        for (size_t n = 0; n < threads; ++n) {
            Fiber& fiber = fibers[backwards ? threads - 1 - n : n];
            resume(fiber);
            if (fault != 0) return fault;
            done += fiber.state == Fiber::DONE;
        }
        if (done == threads) return 0;
        for (size_t n = 0; n < threads; ++n) {
            if (fibers[n].state == Fiber::DONE || fibers[n].line != fibers[0].line) return CUDA_ERROR_LAUNCH_FAILED;
            fibers[n].state = Fiber::READY;
        }
    }
}

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> registered;
    return registered;
}

}  // namespace

Registration::Registration(Kernel kernel) { kernels()[kernel.name] = kernel; }

const Kernel* find(const char* name) {
    auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

void barrier(int line) {
    current->line = line;
    current->state = Fiber::WAITING;
    suspend();
}

int run(const Kernel& kernel, dim3 grid, dim3 block, const void* argument, bool backwards) {
    BadPointersAreErrors guard;
    running = &kernel;
    running_argument = argument;
    gridDim = grid;
    blockDim = block;
    fault = 0;
    size_t threads = size_t{block.x} * block.y * block.z, blocks = size_t{grid.x} * grid.y * grid.z;
    for (size_t n = 0; n < threads; ++n) {
        unsigned int row = n / block.x;
        fibers[n].index = {static_cast<unsigned int>(n % block.x), row % block.y, row / block.y};
    }
    for (size_t n = 0; n < blocks && fault == 0; ++n) {
        size_t number = backwards ? blocks - 1 - n : n;
        size_t row = number / grid.x;
        blockIdx = {static_cast<unsigned int>(number % grid.x), static_cast<unsigned int>(row % grid.y),
                    static_cast<unsigned int>(row / grid.y)};
        fault = run_block(threads, backwards);
    }
    if (fault != 0) {  // fibers were left in the middle of the kernel: start them afresh next time
        for (Fiber& fiber : fibers) fiber.alive = false;
    }
    return fault;
}

}  // namespace cuda_shim

// Kernels are compiled with -fsanitize=alignment, which calls these before a misaligned access.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) {
    cuda_shim::fail(CUDA_ERROR_MISALIGNED_ADDRESS);
}
extern "C" void __ubsan_handle_type_mismatch_v1_abort(void* data, void* pointer) {
    __ubsan_handle_type_mismatch_v1(data, pointer);
}
