/* A GPU that computes nothing: counting, devices, memory, and CUDA's runtime (libcudart).

   Loaded before torch, its functions are found before those of the real libraries. Functions have
   no parameters where these do not matter, which C allows; types are CUDA's own. */
#define _GNU_SOURCE
#include "nullgpu.h"

#include <driver_types.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---------------------------------------------------------------- counting */

#define MAX_KERNELS (1 << 18) /* torch has some 60,000 */
#define MAX_CALLS 256
static struct {
    const void *kernel;
    const char *name;
    long count;
} kernels[MAX_KERNELS]; /* a hash table by address */
static struct {
    const char *name;
    long count;
} calls[MAX_CALLS];
/* The host waits for the device; operations launched, matrix products among them; copies. */
static long num_waits, num_launches, num_copies[4];
static const char *copy_names[4] = {"host_to_host", "host_to_device", "device_to_host",
                                    "device_to_device"};

static int slot_of(const void *kernel) {
    unsigned i = (unsigned)((uintptr_t)kernel >> 2) * 2654435761u % MAX_KERNELS;
    while (kernels[i].kernel && kernels[i].kernel != kernel) i = (i + 1) % MAX_KERNELS;
    kernels[i].kernel = kernel;
    return i;
}

void name_kernel(const void *kernel, const char *name) {
    pthread_mutex_lock(&lock);
    kernels[slot_of(kernel)].name = name;
    pthread_mutex_unlock(&lock);
}

void count_launch(const void *kernel) {
    pthread_mutex_lock(&lock);
    kernels[slot_of(kernel)].count++;
    num_launches++;
    pthread_mutex_unlock(&lock);
}

void count_call(const char *name) {
    pthread_mutex_lock(&lock);
    int i = 0;
    while (calls[i].name && strcmp(calls[i].name, name)) i++;
    if (i == MAX_CALLS - 1) abort();
    calls[i].name = name;
    calls[i].count++;
    /* cublasGemmEx, cublasLtMatmul, ...: each is an operation on the device. */
    num_launches += !strncmp(name, "cublas", 6);
    pthread_mutex_unlock(&lock);
}

/* Write all counts since the last call as JSON, and begin anew. */
void nullgpu_report(const char *path) {
    pthread_mutex_lock(&lock);
    FILE *file = fopen(path, "w");
    fprintf(file, "{\"waits\": %ld, \"launches\": %ld", num_waits, num_launches);
    for (int i = 1; i < 4; i++) fprintf(file, ", \"%s\": %ld", copy_names[i], num_copies[i]);
    fprintf(file, ",\n\"calls\": {\"\": 0");
    for (int i = 0; i < MAX_CALLS; i++)
        if (calls[i].count) fprintf(file, ", \"%s\": %ld", calls[i].name, calls[i].count);
    fprintf(file, "},\n\"kernels\": [[\"\", 0]");
    for (int i = 0; i < MAX_KERNELS; i++)
        if (kernels[i].count)
            fprintf(file, ",\n[\"%s\", %ld]", kernels[i].name ? kernels[i].name : "?",
                    kernels[i].count);
    fprintf(file, "]}\n");
    fclose(file);
    num_waits = num_launches = 0;
    memset(num_copies, 0, sizeof num_copies);
    for (int i = 0; i < MAX_CALLS; i++) calls[i].count = 0;
    for (int i = 0; i < MAX_KERNELS; i++) kernels[i].count = 0;
    pthread_mutex_unlock(&lock);
}

/* ---------------------------------------------------------------- devices */

Device devices[MAX_DEVICES];
int num_devices;
__thread int current_device;
static __thread int last_error;

static int fail(int error) { return last_error = error; }

/* NULLGPU_DEVICES is a list of capability:GiB, such as 80:80,120:32. */
__attribute__((constructor)) static void set_up_devices(void) {
    const char *text = getenv("NULLGPU_DEVICES");
    for (text = text ? text : "90:80"; text && num_devices < MAX_DEVICES;) {
        Device *device = &devices[num_devices++];
        double gib;
        if (sscanf(text, "%d:%lf", &device->capability, &gib) != 2) abort();
        device->memory = (size_t)(gib * (1 << 30));
        text = strchr(text, ',');
        if (text) text++;
    }
}

int cudaGetDeviceCount(int *count) {
    *count = num_devices;
    return 0;
}

int cudaGetDevice(int *device) {
    *device = current_device;
    return 0;
}

int cudaSetDevice(int device) {
    if (device < 0 || device >= num_devices) return fail(cudaErrorInvalidDevice);
    current_device = device;
    return 0;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "a GPU that computes nothing");
    p->major = devices[device].capability / 10;
    p->minor = devices[device].capability % 10;
    p->totalGlobalMem = devices[device].memory;
    p->uuid.bytes[0] = p->pciBusID = device + 1;
    /* As an H100 has them. */
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->reservedSharedMemPerBlock = 1024;
    p->totalConstMem = 65536;
    p->l2CacheSize = 50 << 20;
    p->memoryBusWidth = 5120;
    p->textureAlignment = 512;
    p->asyncEngineCount = 3;
    p->unifiedAddressing = p->concurrentKernels = p->canMapHostMemory = 1;
    return 0;
}

int cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
        case cudaDevAttrWarpSize: *value = p.warpSize; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
        default: *value = 0;
    }
    return 0;
}

int cudaDeviceGetPCIBusId(char *id, int length, int device) {
    snprintf(id, length, "0000:%02x:00.0", device + 1);
    return 0;
}

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return 0;
}

int cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 1;
    return 0;
}

int cudaDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}

int cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

int cudaGetLastError(void) {
    int error = last_error;
    last_error = 0;
    return error;
}

int cudaPeekAtLastError(void) { return last_error; }

const char *cudaGetErrorString(int error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "error of the null GPU";
}

const char *cudaGetErrorName(int error) { return cudaGetErrorString(error); }

SUCCEEDS(cudaDeviceEnablePeerAccess)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)

/* ---------------------------------------------------------------- memory

   Device memory is a range of addresses and nothing else: it takes none of the host's, reads as
   zeros, and a program that touches it from the host ends, as on a real machine. Addresses that
   are given back are not used again. */

#define SPACE (1ULL << 46)
#define MAX_BLOCKS 65536
#define GRANULARITY (2ULL << 20)
static char *space;
static size_t space_used;
typedef struct {
    char *begin;
    size_t bytes;
    int device;
} Block;
static Block device_blocks[MAX_BLOCKS], host_blocks[MAX_BLOCKS];

char *reserve(size_t bytes) {
    pthread_mutex_lock(&lock);
    if (!space) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        space = mmap(NULL, SPACE, PROT_NONE, flags, -1, 0);
        if (space == MAP_FAILED) abort();
    }
    char *begin = space + space_used;
    space_used += (bytes + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
    if (space_used > SPACE) abort();
    pthread_mutex_unlock(&lock);
    return begin;
}

int take(int device, size_t bytes) {
    pthread_mutex_lock(&lock);
    int fits = devices[device].used + bytes <= devices[device].memory;
    if (fits) devices[device].used += bytes;
    pthread_mutex_unlock(&lock);
    return fits;
}

void give_back(int device, size_t bytes) {
    pthread_mutex_lock(&lock);
    devices[device].used -= bytes;
    pthread_mutex_unlock(&lock);
}

static void note(Block *blocks, char *begin, size_t bytes) {
    pthread_mutex_lock(&lock);
    while (blocks->begin) blocks++;
    *blocks = (Block){begin, bytes, current_device};
    pthread_mutex_unlock(&lock);
}

static Block forget(Block *blocks, char *begin) {
    pthread_mutex_lock(&lock);
    for (int i = 0; blocks->begin != begin && i < MAX_BLOCKS - 1; i++) blocks++;
    Block block = *blocks;
    blocks->begin = NULL;
    pthread_mutex_unlock(&lock);
    return block;
}

static int is_on_device(const void *address) {
    return space && (char *)address >= space && (char *)address < space + SPACE;
}

int cudaMalloc(void **address, size_t bytes) {
    bytes = (bytes + 511) / 512 * 512;
    if (!take(current_device, bytes)) return fail(cudaErrorMemoryAllocation);
    *address = reserve(bytes);
    note(device_blocks, *address, bytes);
    count_call("cudaMalloc");
    return 0;
}

int cudaMallocAsync(void **address, size_t bytes) { return cudaMalloc(address, bytes); }

int cudaFree(void *address) {
    if (!address) return 0;
    Block block = forget(device_blocks, address);
    give_back(block.device, block.bytes);
    return 0;
}

int cudaFreeAsync(void *address) { return cudaFree(address); }

int cudaMemGetInfo(size_t *free, size_t *total) {
    *total = devices[current_device].memory;
    *free = *total - devices[current_device].used;
    return 0;
}

int cudaHostAlloc(void **address, size_t bytes) {
    if (posix_memalign(address, 4096, bytes ? bytes : 1)) return fail(cudaErrorMemoryAllocation);
    note(host_blocks, *address, bytes);
    count_call("cudaHostAlloc");
    return 0;
}

int cudaFreeHost(void *address) {
    forget(host_blocks, address);
    free(address);
    return 0;
}

int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = is_on_device(address) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    attributes->device = current_device;
    attributes->devicePointer = (void *)address;
    pthread_mutex_lock(&lock);
    for (Block *block = host_blocks; block < host_blocks + MAX_BLOCKS; block++)
        if (block->begin && (char *)address >= block->begin &&
            (char *)address < block->begin + block->bytes) {
            attributes->type = cudaMemoryTypeHost;
            attributes->hostPointer = (void *)address;
        }
    pthread_mutex_unlock(&lock);
    return 0;
}

int cudaMemcpyAsync(void *to, const void *from, size_t bytes) {
    pthread_mutex_lock(&lock);
    num_copies[2 * is_on_device(from) + is_on_device(to)]++;
    pthread_mutex_unlock(&lock);
    if (!is_on_device(to)) is_on_device(from) ? memset(to, 0, bytes) : memcpy(to, from, bytes);
    return 0;
}

int cudaMemcpy(void *to, const void *from, size_t bytes) {
    num_waits++;
    return cudaMemcpyAsync(to, from, bytes);
}

int cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes) {
    return cudaMemcpyAsync(to, from, bytes);
}

int cudaGetSymbolAddress(void **address, const void *symbol) { return cudaMalloc(address, 4096); }

COUNTED(cudaMemset)
COUNTED(cudaMemsetAsync)
SUCCEEDS(cudaMemcpyToSymbol)
SUCCEEDS(cudaHostRegister)
SUCCEEDS(cudaHostUnregister)

/* ---------------------------------------------------------------- streams and events */

static int new_handle(void **handle) {
    static uintptr_t last = 4096;
    *handle = (void *)__sync_add_and_fetch(&last, 16);
    return 0;
}

int cudaStreamCreate(void **stream) { return new_handle(stream); }
int cudaStreamCreateWithFlags(void **stream) { return new_handle(stream); }
int cudaStreamCreateWithPriority(void **stream) { return new_handle(stream); }
int cudaEventCreate(void **event) { return new_handle(event); }
int cudaEventCreateWithFlags(void **event) { return new_handle(event); }

static int wait_for_device(void) {
    num_waits++;
    return 0;
}

int cudaStreamSynchronize(void) { return wait_for_device(); }
int cudaEventSynchronize(void) { return wait_for_device(); }
int cudaDeviceSynchronize(void) { return wait_for_device(); }

int cudaStreamGetPriority(void *stream, int *priority) {
    *priority = 0;
    return 0;
}

int cudaStreamIsCapturing(void *stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return 0;
}

int cudaStreamGetCaptureInfo(void *stream, enum cudaStreamCaptureStatus *status,
                             unsigned long long *id, void *graph, void *dependencies, void *edges,
                             size_t *count) {
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (count) *count = 0;
    return 0;
}

int cudaEventElapsedTime(float *milliseconds) {
    *milliseconds = 1;
    return 0;
}

int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *argument) {
    function(argument);
    return 0;
}

int cudaStreamAddCallback(void *stream, void (*function)(void *, int, void *), void *argument) {
    function(stream, 0, argument);
    return 0;
}

SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaStreamQuery)
SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode)
SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cudaEventQuery)
SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventRecordWithFlags)

/* ---------------------------------------------------------------- kernels

   Compiled programs register theirs as they are loaded, by functions whose names begin with __. */

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[1];
    return handle;
}

void __cudaRegisterFunction(void **binary, const char *host_function, char *device_function,
                            const char *name) {
    name_kernel(host_function, name);
}

SUCCEEDS(__cudaRegisterFatBinaryEnd)
SUCCEEDS(__cudaUnregisterFatBinary)
SUCCEEDS(__cudaRegisterVar)

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return 0;
}

int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *stream = pushed.stream;
    return 0;
}

int __cudaGetKernel(const void **kernel, const void *host_function) {
    *kernel = host_function;
    return 0;
}

int cudaLaunchKernel(const void *kernel) {
    count_launch(kernel);
    return 0;
}

int __cudaLaunchKernel(const void *kernel) { return cudaLaunchKernel(kernel); }

int cudaLaunchKernelExC(const void *configuration, const void *kernel) {
    return cudaLaunchKernel(kernel);
}

int cudaLibraryLoadData(void **library) { return new_handle(library); }

int cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
    *kernel = strdup(name);
    name_kernel(*kernel, *kernel);
    return 0;
}

int cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
    int capability = devices[current_device].capability;
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->maxDynamicSharedSizeBytes = 227 << 10;
    /* PyTorch is compiled for 8.6, but not for 8.9. */
    attributes->binaryVersion = attributes->ptxVersion = capability == 89 ? 86 : capability;
    return 0;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *kernel,
                                                           int block_size) {
    *count = block_size <= 64 ? 32 : block_size >= 2048 ? 1 : 2048 / block_size;
    return 0;
}

SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaKernelSetAttributeForDevice)
SUCCEEDS(cudaLibraryUnload)
