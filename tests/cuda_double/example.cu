// Small kernels to test the double itself with.
struct example_scale {
    const float* source;
    float* target;
    unsigned int count;
    float factor;
};

extern "C" __global__ void example_scale_kernel(example_scale edit) {
    unsigned int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index < edit.count) edit.target[index] = __fmul_rn(edit.source[index], edit.factor);
}

// The target need not be aligned to 16 bytes, as it would have to.
extern "C" __global__ void example_scale4_kernel(example_scale edit) {
    unsigned int index = blockIdx.x * blockDim.x + threadIdx.x;
    float4 v = reinterpret_cast<const float4*>(edit.source)[index];
    reinterpret_cast<float4*>(edit.target)[index] =
        make_float4(v.x * edit.factor, v.y * edit.factor, v.z * edit.factor, v.w * edit.factor);
}

struct example_sum {
    const unsigned int* source;
    unsigned int* partial;
    unsigned int* ticket;  // 0 before and after
    unsigned int* total;
};

// Each block sums its elements in shared memory; the block that finishes last adds up the blocks.
extern "C" __global__ void example_sum_kernel(example_sum edit) {
    __shared__ unsigned int values[256];
    __shared__ bool last;
    values[threadIdx.x] = edit.source[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    for (unsigned int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        edit.partial[blockIdx.x] = values[0];
        __threadfence();
        last = atomicAdd(edit.ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        unsigned int total = 0;
        for (unsigned int block = 0; block < gridDim.x; ++block) total += edit.partial[block];
        *edit.total = total;
        *edit.ticket = 0;
    }
}

struct example_mistake {
    float* target;
    unsigned int kind;
};

extern "C" __global__ void example_mistake_kernel(example_mistake edit) {
    __shared__ float unwritten;
    if (edit.kind == 0) edit.target[-1] = 1.0f;
    if (edit.kind == 1) edit.target[threadIdx.x] = unwritten;
    if (edit.kind == 2 && threadIdx.x != 0) __syncthreads();
    if (edit.kind == 4) *static_cast<volatile float*>(nullptr) = 1.0f;
    if (edit.kind == 3) {
        if (threadIdx.x == 0) {
            __syncthreads();
        } else {
            __syncthreads();
        }
    }
}
