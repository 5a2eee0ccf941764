/* libnvidia-ml, by which PyTorch asks how devices are connected: a library of its own, which
   libcuda.so.1 brings along. */
#include "nullgpu.h"

enum { NOT_SUPPORTED = 3 };
#define UNSUPPORTED(name) \
    int name() { return NOT_SUPPORTED; }

SUCCEEDS(nvmlInit)
SUCCEEDS(nvmlInit_v2)
SUCCEEDS(nvmlDeviceGetHandleByPciBusId_v2)
/* What it is given to fill in says already that no other machine can reach this memory. */
SUCCEEDS(nvmlDeviceGetGpuFabricInfoV)
UNSUPPORTED(nvmlDeviceGetNvLinkRemoteDeviceType)
UNSUPPORTED(nvmlDeviceGetNvLinkRemotePciInfo_v2)
UNSUPPORTED(nvmlSystemGetCudaDriverVersion_v2)

static int store(int *to, int value) {
    *to = value;
    return 0;
}

int nvmlDeviceGetCount_v2(int *count) { return store(count, num_devices); }
int nvmlDeviceGetComputeRunningProcesses(void *device, int *count) { return store(count, 0); }
