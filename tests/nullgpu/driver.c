/* What torch and Triton ask of the driver (libcuda): devices, expandable segments, modules. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nullgpu.h"

/* Of cuda.h, which declares functions with parameters that do not matter here. */
enum { OUT_OF_MEMORY = 2 };
enum {
    MAX_THREADS_PER_BLOCK = 1,
    MAX_SHARED_MEMORY = 8,
    WARP_SIZE = 10,
    MAX_REGISTERS = 12,
    MULTIPROCESSORS = 16,
    MAX_THREADS_PER_MULTIPROCESSOR = 39,
    MAJOR = 75,
    MINOR = 76,
    SHARED_MEMORY_PER_MULTIPROCESSOR = 81,
    MAX_SHARED_MEMORY_OPTIN = 97,
    VIRTUAL_MEMORY = 102,
};
typedef struct {
    int type, handle_types, location_type, device;
} AllocationProperties;

SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuPointerGetAttributes)
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cuLinkAddData_v2)
SUCCEEDS(cuLinkComplete)
SUCCEEDS(cuLinkCreate_v2)
static SUCCEEDS(nothing)

static int store(int *to, int value) {
    *to = value;
    return 0;
}

int cuDriverGetVersion(int *version) { return store(version, 13000); }
int cuDeviceGetCount(int *count) { return store(count, num_devices); }
int cuDeviceGet(int *device, int number) { return store(device, number); }
int cuCtxGetDevice(int *device) { return store(device, current_device); }

int cuDeviceGetName(char *name, int length) {
    snprintf(name, length, "a GPU that computes nothing");
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case MAJOR: return store(value, devices[device].capability / 10);
        case MINOR: return store(value, devices[device].capability % 10);
        case VIRTUAL_MEMORY: return store(value, 1);
        /* As an H100 has them. */
        case MAX_THREADS_PER_BLOCK: return store(value, 1024);
        case MAX_THREADS_PER_MULTIPROCESSOR: return store(value, 2048);
        case MULTIPROCESSORS: return store(value, 132);
        case WARP_SIZE: return store(value, 32);
        case MAX_REGISTERS: return store(value, 65536);
        case MAX_SHARED_MEMORY: return store(value, 48 << 10);
        case MAX_SHARED_MEMORY_OPTIN: return store(value, 227 << 10);
        case SHARED_MEMORY_PER_MULTIPROCESSOR: return store(value, 228 << 10);
        default: return store(value, 0);
    }
}

static int the_context(void **context) {
    *context = (void *)16;
    return 0;
}

int cuCtxGetCurrent(void **context) { return the_context(context); }
int cuDevicePrimaryCtxRetain(void **context) { return the_context(context); }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    return store(active, 1);
}

int cuCtxGetLimit(size_t *value) {
    *value = 0;
    return 0;
}

int cuGetErrorString(int error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : "error of the null GPU";
    return 0;
}

int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t address) {
    *value = address;
    return 0;
}

/* ---------------------------------------------------------------- memory in segments that grow */

static int get_granularity(size_t *bytes) {
    *bytes = 2 << 20;
    return 0;
}

static int reserve_addresses(char **address, size_t bytes) {
    *address = reserve(bytes);
    return 0;
}

typedef struct {
    int device;
    size_t bytes;
} Segment;

static int create_segment(Segment **handle, size_t bytes, const AllocationProperties *properties) {
    if (!take(properties->device, bytes)) return OUT_OF_MEMORY;
    *handle = malloc(sizeof **handle);
    **handle = (Segment){properties->device, bytes};
    count_call("cuMemCreate");
    return 0;
}

static int release_segment(Segment *segment) {
    give_back(segment->device, segment->bytes);
    free(segment);
    return 0;
}

static int get_range(uint64_t *begin, size_t *bytes, uint64_t address) {
    if (begin) *begin = address;
    if (bytes) *bytes = 1;
    return 0;
}

/* ---------------------------------------------------------------- Triton's kernels */

static int new_module(void **module) {
    *module = malloc(1);
    return 0;
}

int cuModuleLoad(void **module) { return new_module(module); }
int cuModuleLoadData(void **module) { return new_module(module); }
int cuModuleLoadDataEx(void **module) { return new_module(module); }

int cuModuleGetFunction(void **kernel, void *module, const char *name) {
    char *copy = malloc(strlen(name) + sizeof "triton: ");
    strcat(strcpy(copy, "triton: "), name);
    name_kernel(*kernel = copy, copy);
    return 0;
}

int cuFuncGetAttribute(int *value, int attribute) {
    return store(value, attribute == 0 ? 1024 /* threads */ : attribute == 4 ? 32 /* registers */ : 0);
}

int cuOccupancyMaxActiveClusters(int *count) { return store(count, 16); }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count) { return store(count, 2); }

int cuLaunchKernel(const void *kernel) {
    count_launch(kernel);
    return 0;
}

int cuLaunchCooperativeKernel(const void *kernel) { return cuLaunchKernel(kernel); }
int cuLaunchKernelEx(void *configuration, const void *kernel) { return cuLaunchKernel(kernel); }

/* ---------------------------------------------------------------- by which torch finds all this */

int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                     unsigned long long flags, int *result) {
    struct {
        const char *name;
        void *function;
    } known[] = {
        {"cuDeviceGet", cuDeviceGet},
        {"cuDeviceGetAttribute", cuDeviceGetAttribute},
        {"cuDevicePrimaryCtxGetState", cuDevicePrimaryCtxGetState},
        {"cuCtxGetCurrent", cuCtxGetCurrent},
        {"cuGetErrorString", cuGetErrorString},
        {"cuMemGetAllocationGranularity", get_granularity},
        {"cuMemAddressReserve", reserve_addresses},
        {"cuMemCreate", create_segment},
        {"cuMemRelease", release_segment},
        {"cuMemGetAddressRange", get_range},
    };
    *function = nothing;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name)) *function = known[i].function;
    if (result) *result = 0;
    return 0;
}
