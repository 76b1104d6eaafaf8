/* A CUDA runtime in host memory: what ONNX Runtime's CUDA provider calls, counted.

   Device memory is host memory, copies are copies, kernels are launched and counted but compute nothing. So structure can
   be seen (which node runs where; allocations, copies, launches, graph replays of a call), numbers and speed cannot.
   Functions that are not written here return success; fake_libraries.py adds them. */
#include "driver_types.h"
#include "vector_types.h"
#include <stdlib.h>
#include <string.h>

typedef void *Pointer;

/* In the order of COUNTERS in fake_libraries.py. */
enum { ALLOCATIONS, FREES, TO_DEVICE, TO_HOST, ON_DEVICE, LAUNCHES, GRAPH_LAUNCHES, SYNCHRONIZATIONS, BYTES_TO_DEVICE,
       BYTES_TO_HOST, BYTES_ALLOCATED, COUNT };
static long counters[COUNT];
static const size_t MEMORY = (size_t)80 << 30;

void fakecuda_read(long *out) { memcpy(out, counters, sizeof counters); }

static int make_handle(Pointer *out) {
    *out = malloc(8);
    return 0;
}

static int allocate(Pointer *out, size_t size) {
    *out = aligned_alloc(256, (size + 255) / 256 * 256);
    return *out ? 0 : 2;
}

static int allocate_device(Pointer *out, size_t size) {
    counters[ALLOCATIONS]++;
    counters[BYTES_ALLOCATED] += size;
    return allocate(out, size);
}

static int release(Pointer memory) {
    counters[FREES]++;
    free(memory);
    return 0;
}

static int copy(Pointer to, const void *from, size_t size, int kind) {
    if (kind == cudaMemcpyHostToDevice) {
        counters[TO_DEVICE]++;
        counters[BYTES_TO_DEVICE] += size;
    } else if (kind == cudaMemcpyDeviceToHost) {
        counters[TO_HOST]++;
        counters[BYTES_TO_HOST] += size;
    } else {
        counters[ON_DEVICE]++;
    }
    memmove(to, from, size);
    return 0;
}

static int launch(void) {
    counters[LAUNCHES]++;
    return 0;
}

static int synchronize(void) {
    counters[SYNCHRONIZATIONS]++;
    return 0;
}

/* Memory */
int cudaMalloc(Pointer *out, size_t size) { return allocate_device(out, size); }
int cudaMallocAsync(Pointer *out, size_t size, Pointer stream) { return allocate_device(out, size); }
int cudaMallocFromPoolAsync(Pointer *out, size_t size, Pointer pool, Pointer stream) { return allocate_device(out, size); }
int cudaFree(Pointer memory) { return release(memory); }
int cudaFreeAsync(Pointer memory, Pointer stream) { return release(memory); }
int cudaMallocHost(Pointer *out, size_t size) { return allocate(out, size); }
int cudaHostAlloc(Pointer *out, size_t size, unsigned flags) { return allocate(out, size); }
int cudaFreeHost(Pointer memory) { free(memory); return 0; }
int cudaMemcpy(Pointer to, const void *from, size_t size, int kind) { return copy(to, from, size, kind); }
int cudaMemcpyAsync(Pointer to, const void *from, size_t size, int kind, Pointer stream) { return copy(to, from, size, kind); }
int cudaMemcpyFromSymbol(Pointer to, const void *symbol, size_t size, size_t offset, int kind) { memset(to, 0, size); return 0; }
int cudaMemset(Pointer to, int value, size_t size) { memset(to, value, size); return 0; }
int cudaMemsetAsync(Pointer to, int value, size_t size, Pointer stream) { memset(to, value, size); return 0; }
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = MEMORY; return 0; }
int cudaMemPoolCreate(Pointer *pool, const void *properties) { return make_handle(pool); }
int cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *pointer) {
    memset(out, 0, sizeof *out);
    out->type = cudaMemoryTypeDevice;
    out->devicePointer = (Pointer)pointer;
    return 0;
}

/* The device: compute capability 8.0 */
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
    memset(out, 0, sizeof *out);
    strcpy(out->name, "a device that computes nothing");
    out->major = 8;
    out->multiProcessorCount = 108;
    out->warpSize = 32;
    out->maxThreadsPerBlock = 1024;
    out->maxThreadsPerMultiProcessor = 2048;
    out->sharedMemPerBlock = 48 << 10;
    out->sharedMemPerBlockOptin = 163 << 10;
    out->sharedMemPerMultiprocessor = 164 << 10;
    out->totalGlobalMem = MEMORY;
    out->l2CacheSize = 40 << 20;
    out->regsPerBlock = 65536;
    out->maxGridSize[0] = 2147483647;
    out->maxGridSize[1] = out->maxGridSize[2] = 65535;
    out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
    out->maxThreadsDim[2] = 64;
    return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 108; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 163 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 164 << 10; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 1;
    }
    return 0;
}

/* Streams, events, graphs */
int cudaStreamCreate(Pointer *stream) { return make_handle(stream); }
int cudaStreamCreateWithFlags(Pointer *stream, unsigned flags) { return make_handle(stream); }
int cudaStreamSynchronize(Pointer stream) { return synchronize(); }
int cudaDeviceSynchronize(void) { return synchronize(); }
int cudaStreamIsCapturing(Pointer stream, int *status) { *status = 0; return 0; }
int cudaEventCreate(Pointer *event) { return make_handle(event); }
int cudaEventCreateWithFlags(Pointer *event, unsigned flags) { return make_handle(event); }
int cudaEventElapsedTime(float *milliseconds, Pointer begin, Pointer end) { *milliseconds = 1; return 0; }
int cudaStreamEndCapture(Pointer stream, Pointer *graph) { return make_handle(graph); }
int cudaGraphInstantiate(Pointer *executable, Pointer graph, unsigned long long flags) { return make_handle(executable); }
int cudaGraphLaunch(Pointer executable, Pointer stream) { counters[GRAPH_LAUNCHES]++; return 0; }

/* Kernels */
int cudaLaunchKernel(const void *f, dim3 grid, dim3 block, Pointer *arguments, size_t shared, Pointer stream) { return launch(); }
int cudaLaunchKernelExC(const void *config, const void *f, Pointer *arguments) { return launch(); }
int cudaLaunchCooperativeKernel(const void *f, dim3 grid, dim3 block, Pointer *arguments, size_t shared, Pointer stream) { return launch(); }
int __cudaLaunchKernel(Pointer kernel, dim3 grid, dim3 block, Pointer *arguments, size_t shared, Pointer stream) { return launch(); }
int __cudaGetKernel(Pointer *kernel, const void *f) { *kernel = (Pointer)f; return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f, int size, size_t shared, unsigned flags) { *blocks = 2; return 0; }
int cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *f) {
    memset(out, 0, sizeof *out);
    out->maxThreadsPerBlock = 1024;
    out->binaryVersion = out->ptxVersion = 80;
    return 0;
}
int cudaGetDriverEntryPointByVersion(const char *symbol, Pointer *out, unsigned version, unsigned long long flags, int *status) {
    *out = 0;
    if (status) *status = 1;
    return 0;
}
const char *cudaGetErrorName(int error) { return "error of the fake CUDA runtime"; }
const char *cudaGetErrorString(int error) { return "error of the fake CUDA runtime"; }

/* What the compiler's own start-up code calls */
Pointer *__cudaRegisterFatBinary(Pointer binary) { static Pointer handle; return &handle; }
void __cudaRegisterFatBinaryEnd(Pointer *handle) {}
void __cudaUnregisterFatBinary(Pointer *handle) {}
void __cudaRegisterFunction(Pointer *h, const char *f, char *d, const char *n, int l, Pointer a, Pointer b, Pointer c, Pointer e, int *s) {}
void __cudaRegisterVar(Pointer *h, char *v, char *d, const char *n, int e, size_t s, int c, int g) {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, Pointer stream) { return 0; }
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, Pointer *stream) {
    grid->x = grid->y = grid->z = block->x = block->y = block->z = 1;
    *shared = 0;
    *stream = 0;
    return 0;
}
