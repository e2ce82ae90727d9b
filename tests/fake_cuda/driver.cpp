// A CUDA driver, runtime, cuBLAS and cuDNN that keep memory and compute nothing: preloaded, they let a CUDA build of
// PyTorch run where there is no GPU. Device memory is the host's, touched only where it is copied to; kernels do not
// run.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cudnn.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <time.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#define CUDA(name, ...) extern "C" cudaError_t name(__VA_ARGS__)
#define DRIVER(name, ...) extern "C" CUresult name(__VA_ARGS__)
#define CUDNN(name, ...) extern "C" cudnnStatus_t name(__VA_ARGS__)
// functions of which nothing is expected; their callers do not look at arguments either
#define NOTHING(name)                            \
    extern "C" int null_##name() __asm__(#name); \
    int null_##name() { return 0; }

namespace {
std::mutex guard;
std::map<char*, size_t> on_device, pinned;
size_t in_use = 0, pinned_bytes = 0;
thread_local int current = 0;  // device, of which a process uses one
thread_local cudaError_t pending = cudaSuccess;

double setting(const char* name, double otherwise) {
    const char* text = getenv(name);
    return text ? atof(text) : otherwise;
}

// FAKE_CUDA_GB: a card's memory; FAKE_CUDA_PINNED_GB: what can be pinned of the host's; FAKE_CUDA_COPIES=0: what is
// large is not copied, so that it takes no memory
const int count = 4;  // devices
size_t total() { return 1e9 * setting("FAKE_CUDA_GB", 150); }

bool can_pin(size_t n) {
    if (pinned_bytes + n > 1e9 * setting("FAKE_CUDA_PINNED_GB", 1e6)) return pending = cudaErrorMemoryAllocation, false;
    return pinned_bytes += n, true;
}

template <typename P>
bool was_pinned(P p) {
    auto it = pinned.find((char*)p);
    if (it == pinned.end()) return false;
    return pinned_bytes -= it->second, pinned.erase(it), true;
}

void copy(void* to, const void* from, size_t n) {
    if (n < 1 << 20 || setting("FAKE_CUDA_COPIES", 1)) memmove(to, from, n);
}

bool within(std::map<char*, size_t>& blocks, const void* p) {
    std::lock_guard<std::mutex> hold(guard);
    auto it = blocks.upper_bound((char*)p);
    return it != blocks.begin() && (--it, (char*)p < it->first + it->second);
}

char* page(const void* p, bool up) { return (char*)(((size_t)p + (up ? 4095 : 0)) / 4096 * 4096); }

int attribute(int a) {  // of an H200, as PyTorch and Triton ask
    switch (a) {
        case cudaDevAttrComputeCapabilityMajor: return 9;
        case cudaDevAttrComputeCapabilityMinor: return 0;
        case cudaDevAttrMultiProcessorCount: return 132;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxThreadsPerBlock: return 1024;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrClockRate: return 1980000;
        case cudaDevAttrMemoryClockRate: return 3201000;
        case cudaDevAttrGlobalMemoryBusWidth: return 6144;
        case cudaDevAttrL2CacheSize: return 62914560;
        case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: return 1;
        case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED: return 0;
    }
    return 1;
}
}  // namespace

// ---- the device
CUDA(cudaGetDeviceCount, int* n) { return *n = count, cudaSuccess; }
CUDA(cudaGetDevice, int* d) { return *d = current, cudaSuccess; }
CUDA(cudaSetDevice, int d) { return d < count ? current = d, cudaSuccess : cudaErrorInvalidDevice; }
CUDA(cudaDeviceGetAttribute, int* v, cudaDeviceAttr a, int) { return *v = attribute(a), cudaSuccess; }
CUDA(cudaGetDeviceProperties, cudaDeviceProp* p, int) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H200, null");
    p->totalGlobalMem = total();
    p->major = 9;
    p->warpSize = 32;
    p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->l2CacheSize = 62914560;
    p->memPitch = 2147483647;
    p->textureAlignment = 512;
    p->totalConstMem = 65536;
    p->concurrentKernels = p->unifiedAddressing = p->managedMemory = 1;
    return cudaSuccess;
}
CUDA(cudaDeviceGetPCIBusId, char* s, int n, int) { return snprintf(s, n, "0000:01:00.0"), cudaSuccess; }
CUDA(cudaDeviceGetStreamPriorityRange, int* least, int* most) { return *least = 0, *most = -5, cudaSuccess; }
CUDA(cudaDeviceCanAccessPeer, int* can, int, int) { return *can = 0, cudaSuccess; }
CUDA(cudaDriverGetVersion, int* v) { return *v = CUDART_VERSION, cudaSuccess; }
CUDA(cudaRuntimeGetVersion, int* v) { return *v = CUDART_VERSION, cudaSuccess; }
CUDA(cudaPeekAtLastError, ) { return pending; }
CUDA(cudaGetLastError, ) {
    cudaError_t last = pending;
    return pending = cudaSuccess, last;
}
NOTHING(cudaDeviceSynchronize)

// ---- memory
CUDA(cudaMalloc, void** p, size_t n) {
    std::lock_guard<std::mutex> hold(guard);
    n = n ? (n + 511) / 512 * 512 : 512;
    if (in_use + n > total()) return cudaErrorMemoryAllocation;
    *p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*p == MAP_FAILED) return cudaErrorMemoryAllocation;
    on_device[(char*)*p] = n, in_use += n;
    return cudaSuccess;
}
CUDA(cudaFree, void* p) {
    std::lock_guard<std::mutex> hold(guard);
    auto it = on_device.find((char*)p);
    if (it == on_device.end()) return p ? cudaErrorInvalidValue : cudaSuccess;
    munmap(p, it->second), in_use -= it->second;
    on_device.erase(it);
    return cudaSuccess;
}
CUDA(cudaMemGetInfo, size_t* free, size_t* all) { return *all = total(), *free = *all - in_use, cudaSuccess; }
CUDA(cudaHostAlloc, void** p, size_t n, unsigned) {
    std::lock_guard<std::mutex> hold(guard);
    n = n ? (size_t)page((void*)n, true) : 4096;
    if (!can_pin(n)) return cudaErrorMemoryAllocation;
    pinned[(char*)(*p = aligned_alloc(4096, n))] = n;
    return cudaSuccess;
}
CUDA(cudaFreeHost, void* p) {
    std::lock_guard<std::mutex> hold(guard);
    return was_pinned(p), free(p), cudaSuccess;
}
CUDA(cudaHostRegister, void* p, size_t n, unsigned) {
    std::lock_guard<std::mutex> hold(guard);
    char *from = page(p, false), *to = page((char*)p + n, true);
    for (auto& [q, m] : pinned)
        if (q < to && from < q + m) return pending = cudaErrorHostMemoryAlreadyRegistered;
    if (!can_pin(to - from)) return cudaErrorMemoryAllocation;
    return pinned[from] = to - from, cudaSuccess;
}
CUDA(cudaHostUnregister, void* p) {
    std::lock_guard<std::mutex> hold(guard);
    return was_pinned(page(p, false)) ? cudaSuccess : cudaErrorHostMemoryNotRegistered;
}
CUDA(cudaPointerGetAttributes, cudaPointerAttributes* a, const void* p) {
    memset(a, 0, sizeof *a);
    a->device = current;
    if (within(on_device, p))
        a->type = cudaMemoryTypeDevice, a->devicePointer = (void*)p;
    else if (within(pinned, p))
        a->type = cudaMemoryTypeHost, a->devicePointer = a->hostPointer = (void*)p;
    else
        a->type = cudaMemoryTypeUnregistered, a->device = -2, a->hostPointer = (void*)p;
    return cudaSuccess;
}
CUDA(cudaMemcpy, void* to, const void* from, size_t n, cudaMemcpyKind) { return copy(to, from, n), cudaSuccess; }
CUDA(cudaMemcpyAsync, void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) {
    return copy(to, from, n), cudaSuccess;
}
CUDA(cudaMemcpy2DAsync, void* to, size_t dp, const void* from, size_t sp, size_t w, size_t h, cudaMemcpyKind,
     cudaStream_t) {
    for (size_t i = 0; i < h; i++) memmove((char*)to + i * dp, (const char*)from + i * sp, w);
    return cudaSuccess;
}
CUDA(cudaMemset, void* p, int v, size_t n) { return memset(p, v, n), cudaSuccess; }
CUDA(cudaMemsetAsync, void* p, int v, size_t n, cudaStream_t) {
    if (v || setting("FAKE_CUDA_COPIES", 1)) memset(p, v, n);
    return cudaSuccess;
}
NOTHING(cudaMemcpyToSymbol)
CUDA(cudaGetSymbolAddress, void** p, const void*) {
    static char symbol[1 << 20];
    return *p = symbol, cudaSuccess;
}

// ---- streams, events, graphs
namespace {
cudaStream_t capturing;
bool active = false;
unsigned long long captures = 0;
cudaStreamCaptureStatus status(cudaStream_t s) {
    return active && s == capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}
}  // namespace
CUDA(cudaStreamCreateWithPriority, cudaStream_t* s, unsigned, int) {
    static size_t next = 4096;
    return *s = (cudaStream_t)(next += 64), cudaSuccess;
}
CUDA(cudaStreamGetPriority, cudaStream_t, int* p) { return *p = 0, cudaSuccess; }
NOTHING(cudaStreamDestroy) NOTHING(cudaStreamQuery) NOTHING(cudaStreamSynchronize) NOTHING(cudaStreamWaitEvent)
NOTHING(cudaThreadExchangeStreamCaptureMode)
CUDA(cudaStreamIsCapturing, cudaStream_t s, cudaStreamCaptureStatus* out) { return *out = status(s), cudaSuccess; }
CUDA(cudaStreamGetCaptureInfo, cudaStream_t s, cudaStreamCaptureStatus* out, unsigned long long* id, cudaGraph_t*,
     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t* n) {
    *out = status(s);
    if (id) *id = captures;
    if (n) *n = 0;
    return cudaSuccess;
}
CUDA(cudaStreamBeginCapture, cudaStream_t s, cudaStreamCaptureMode) {
    return capturing = s, active = true, captures++, cudaSuccess;
}
CUDA(cudaStreamEndCapture, cudaStream_t, cudaGraph_t* g) { return active = false, *g = (cudaGraph_t)64, cudaSuccess; }
CUDA(cudaGraphInstantiateWithFlags, cudaGraphExec_t* e, cudaGraph_t, unsigned long long) {
    return *e = (cudaGraphExec_t)64, cudaSuccess;
}
CUDA(cudaGraphGetNodes, cudaGraph_t, cudaGraphNode_t*, size_t* n) { return *n = 1, cudaSuccess; }
NOTHING(cudaGraphLaunch) NOTHING(cudaGraphDestroy) NOTHING(cudaGraphExecDestroy)
CUDA(cudaEventCreateWithFlags, cudaEvent_t* e, unsigned) { return *e = (cudaEvent_t) new double(0), cudaSuccess; }
CUDA(cudaEventDestroy, cudaEvent_t e) { return delete (double*)e, cudaSuccess; }
CUDA(cudaEventRecord, cudaEvent_t e, cudaStream_t) { return *(double*)e = now(), cudaSuccess; }
CUDA(cudaEventRecordWithFlags, cudaEvent_t e, cudaStream_t, unsigned) { return *(double*)e = now(), cudaSuccess; }
CUDA(cudaEventElapsedTime, float* ms, cudaEvent_t a, cudaEvent_t b) {
    return *ms = *(double*)b - *(double*)a, cudaSuccess;
}
NOTHING(cudaEventQuery) NOTHING(cudaEventSynchronize)

// ---- kernels: registered, launched, not run
NOTHING(cudaLaunchKernel) NOTHING(__cudaLaunchKernel) NOTHING(cudaLaunchKernelExC) NOTHING(cudaFuncSetAttribute)
NOTHING(__cudaRegisterFatBinaryEnd) NOTHING(__cudaUnregisterFatBinary) NOTHING(__cudaRegisterFunction)
NOTHING(__cudaRegisterVar) NOTHING(__cudaInitModule)
extern "C" void** __cudaRegisterFatBinary(void*) {
    static void* handle[4];
    return handle;
}
CUDA(__cudaGetKernel, cudaKernel_t* k, const void* f) { return *k = (cudaKernel_t)f, cudaSuccess; }
namespace {
thread_local struct {
    dim3 grid, block;
    size_t shared;
    void* stream;
} launch;
}
extern "C" unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    return launch = {grid, block, shared, stream}, 0;
}
CUDA(__cudaPopCallConfiguration, dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = launch.grid, *block = launch.block, *shared = launch.shared, *(void**)stream = launch.stream;
    return cudaSuccess;
}
CUDA(cudaFuncGetAttributes, cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->binaryVersion = a->ptxVersion = 90;
    return cudaSuccess;
}
CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int* n, const void*, int, size_t, unsigned) {
    return *n = 2, cudaSuccess;
}
CUDA(cudaGetDriverEntryPointByVersion, const char* name, void** f, unsigned, unsigned long long,
     cudaDriverEntryPointQueryResult* result) {
    *f = dlsym(RTLD_DEFAULT, name);
    if (result) *result = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return *f ? cudaSuccess : cudaErrorSymbolNotFound;
}

// ---- the driver, as Triton and PyTorch's compiled kernels call it
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSynchronize) NOTHING(cuCtxSetLimit) NOTHING(cuModuleUnload)
NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuLaunchKernel) NOTHING(cuLaunchKernelEx)
NOTHING(cuLaunchCooperativeKernel) NOTHING(cuTensorMapEncodeTiled)
DRIVER(cuDriverGetVersion, int* v) { return *v = CUDA_VERSION, CUDA_SUCCESS; }
DRIVER(cuDeviceGet, CUdevice* d, int i) { return *d = i, CUDA_SUCCESS; }
DRIVER(cuDeviceGetCount, int* n) { return *n = count, CUDA_SUCCESS; }
DRIVER(cuDeviceGetAttribute, int* v, CUdevice_attribute a, CUdevice) { return *v = attribute(a), CUDA_SUCCESS; }
DRIVER(cuDevicePrimaryCtxGetState, CUdevice, unsigned* f, int* a) { return *f = 0, *a = 1, CUDA_SUCCESS; }
DRIVER(cuDevicePrimaryCtxRetain, CUcontext* c, CUdevice) { return *c = (CUcontext)64, CUDA_SUCCESS; }
DRIVER(cuCtxGetCurrent, CUcontext* c) { return *c = (CUcontext)64, CUDA_SUCCESS; }
DRIVER(cuCtxGetDevice, CUdevice* d) { return *d = current, CUDA_SUCCESS; }
DRIVER(cuCtxGetLimit, size_t* n, CUlimit) { return *n = 0, CUDA_SUCCESS; }
DRIVER(cuGetErrorString, CUresult, const char** s) { return *s = "null", CUDA_SUCCESS; }
DRIVER(cuModuleLoadData, CUmodule* m, const void*) { return *m = (CUmodule)64, CUDA_SUCCESS; }
DRIVER(cuModuleLoad, CUmodule* m, const char*) { return *m = (CUmodule)64, CUDA_SUCCESS; }
DRIVER(cuModuleGetFunction, CUfunction* f, CUmodule, const char*) { return *f = (CUfunction)64, CUDA_SUCCESS; }
DRIVER(cuFuncGetAttribute, int* v, CUfunction_attribute a, CUfunction) {
    return *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
DRIVER(cuOccupancyMaxActiveClusters, int* n, CUfunction, const CUlaunchConfig*) { return *n = 8, CUDA_SUCCESS; }
DRIVER(cuPointerGetAttribute, void* out, CUpointer_attribute, CUdeviceptr p) {
    if (!within(on_device, (void*)p) && !within(pinned, (void*)p)) return CUDA_ERROR_INVALID_VALUE;
    return *(CUdeviceptr*)out = p, CUDA_SUCCESS;
}

// memory that PyTorch's expandable segments map into addresses of their own; a handle is its size
NOTHING(cuMemMap) NOTHING(cuMemUnmap) NOTHING(cuMemSetAccess) NOTHING(cuMemsetD32Async) NOTHING(cuStreamWriteValue32)
NOTHING(cuMemExportToShareableHandle) NOTHING(cuMemImportFromShareableHandle) NOTHING(cuMemRetainAllocationHandle)
NOTHING(cuMemGetAllocationPropertiesFromHandle) NOTHING(cuMulticastAddDevice) NOTHING(cuMulticastBindMem)
NOTHING(cuMulticastCreate) NOTHING(cuMulticastUnbind) NOTHING(cuCtxFromGreenCtx) NOTHING(cuCtxPopCurrent)
NOTHING(cuCtxPushCurrent) NOTHING(cuDevResourceGenerateDesc) NOTHING(cuDevSmResourceSplitByCount)
NOTHING(cuDeviceGetDevResource) NOTHING(cuGreenCtxCreate) NOTHING(cuGreenCtxDestroy) NOTHING(cuGreenCtxStreamCreate)
DRIVER(cuMemGetAllocationGranularity, size_t* n, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
    return *n = 2 << 20, CUDA_SUCCESS;
}
DRIVER(cuMemAddressReserve, CUdeviceptr* p, size_t n, size_t, CUdeviceptr, unsigned long long) {
    std::lock_guard<std::mutex> hold(guard);
    void* q = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (q == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    return on_device[(char*)q] = n, *p = (CUdeviceptr)q, CUDA_SUCCESS;
}
DRIVER(cuMemAddressFree, CUdeviceptr p, size_t n) {
    std::lock_guard<std::mutex> hold(guard);
    return munmap((void*)p, n), on_device.erase((char*)p), CUDA_SUCCESS;
}
DRIVER(cuMemCreate, CUmemGenericAllocationHandle* h, size_t n, const CUmemAllocationProp*, unsigned long long) {
    std::lock_guard<std::mutex> hold(guard);
    if (in_use + n > total()) return CUDA_ERROR_OUT_OF_MEMORY;
    return in_use += n, *h = n, CUDA_SUCCESS;
}
DRIVER(cuMemRelease, CUmemGenericAllocationHandle h) {
    std::lock_guard<std::mutex> hold(guard);
    return in_use -= h, CUDA_SUCCESS;
}

// ---- cuBLAS
NOTHING(cublasDestroy_v2) NOTHING(cublasSetStream_v2) NOTHING(cublasSetWorkspace_v2) NOTHING(cublasSetMathMode)
NOTHING(cublasSetPointerMode_v2) NOTHING(cublasGemmEx) NOTHING(cublasGemmStridedBatchedEx) NOTHING(cublasSgemm_v2)
NOTHING(cublasSgemmEx) NOTHING(cublasDgemm_v2) NOTHING(cublasSgemmStridedBatched) NOTHING(cublasDgemmStridedBatched)
NOTHING(cublasSgemv_v2) NOTHING(cublasDgemv_v2) NOTHING(cublasSdot_v2) NOTHING(cublasDotEx) NOTHING(cublasLtMatmul)
NOTHING(cublasLtMatmulDescSetAttribute) NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutSetAttribute)
#define DESCRIPTOR(name)                                                        \
    extern "C" int name##Create(void** d) { return *d = calloc(1, 512), 0; }    \
    extern "C" int name##Destroy(void* d) { return free(d), 0; }
DESCRIPTOR(cublasLtMatmulDesc)
DESCRIPTOR(cublasLtMatmulPreference)
DESCRIPTOR(cublasLtMatrixLayout)
extern "C" int cublasCreate_v2(void** h) { return *h = (void*)64, 0; }
extern "C" int cublasGetMathMode(void*, int* m) { return *m = 0; }
extern "C" int cublasGetPointerMode_v2(void*, int* m) { return *m = 0; }
extern "C" int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results,
                                              int* n) {
    return memset(results, 0, 96), *n = 1, 0;
}

// ---- cuDNN: one engine without knobs takes everything, and needs no workspace
NOTHING(cudnnDestroy) NOTHING(cudnnSetStream) NOTHING(cudnnBackendExecute) NOTHING(cudnnBackendFinalize)
NOTHING(cudnnBackendSetAttribute)
CUDNN(cudnnCreate, cudnnHandle_t* h) { return *h = (cudnnHandle_t)calloc(1, 4096), CUDNN_STATUS_SUCCESS; }
CUDNN(cudnnGetStream, cudnnHandle_t, cudaStream_t* s) { return *s = 0, CUDNN_STATUS_SUCCESS; }
CUDNN(cudnnBackendCreateDescriptor, cudnnBackendDescriptorType_t, cudnnBackendDescriptor_t* d) {
    return *d = (cudnnBackendDescriptor_t)calloc(1, 256), CUDNN_STATUS_SUCCESS;
}
CUDNN(cudnnBackendDestroyDescriptor, cudnnBackendDescriptor_t d) { return free(d), CUDNN_STATUS_SUCCESS; }
CUDNN(cudnnBackendGetAttribute, cudnnBackendDescriptor_t, cudnnBackendAttributeName_t name,
      cudnnBackendAttributeType_t type, int64_t, int64_t* count, void* out) {
    int64_t n = type == CUDNN_TYPE_BACKEND_DESCRIPTOR && name != CUDNN_ATTR_ENGINECFG_KNOB_CHOICES;
    const size_t size = type == CUDNN_TYPE_INT64 ? 8 : type == CUDNN_TYPE_INT32 ? 4 : 0;
    if (size) {
        n = 1;
        if (out) memset(out, 0, size);
    }
    if (count) *count = n;
    return CUDNN_STATUS_SUCCESS;
}
