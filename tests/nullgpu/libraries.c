/* What torch calls of cuBLAS, cuDNN and NCCL: each call that computes is counted. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "nullgpu.h"

static int new_object(void **object) {
    *object = calloc(1, 64);
    return 0;
}

static int free_object(void *object) {
    free(object);
    return 0;
}

/* ---------------------------------------------------------------- matrix products */

COUNTED(cublasGemmEx)
COUNTED(cublasSgemmEx)
COUNTED(cublasSgemm_v2)
COUNTED(cublasGemmStridedBatchedEx)
COUNTED(cublasSgemmStridedBatched)
COUNTED(cublasSgemv_v2)
COUNTED(cublasSdot_v2)
COUNTED(cublasStrsm_v2)
COUNTED(cublasStrsmBatched)
COUNTED(cublasDotEx)
COUNTED(cublasLtMatmul)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetSmCountTarget)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cublasLtMatmulAlgoCheck)
SUCCEEDS(cublasLtMatmulAlgoConfigGetAttribute)
SUCCEEDS(cublasLtMatmulAlgoConfigSetAttribute)
SUCCEEDS(cublasLtMatmulAlgoInit)

int cublasCreate_v2(void **handle) { return new_object(handle); }
int cublasLtMatmulDescCreate(void **descriptor) { return new_object(descriptor); }
int cublasLtMatmulPreferenceCreate(void **preference) { return new_object(preference); }
int cublasLtMatrixLayoutCreate(void **layout) { return new_object(layout); }
int cublasDestroy_v2(void *handle) { return free_object(handle); }
int cublasLtMatmulDescDestroy(void *descriptor) { return free_object(descriptor); }
int cublasLtMatmulPreferenceDestroy(void *preference) { return free_object(preference); }
int cublasLtMatrixLayoutDestroy(void *layout) { return free_object(layout); }

int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }
size_t cublasLtGetVersion(void) { return 130101; }

typedef struct { /* cublasLtMatmulHeuristicResult_t */
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
} Heuristic;

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c,
                                   void *d, void *preference, int wanted, Heuristic *results,
                                   int *found) {
    memset(results, 0, sizeof *results);
    *found = 1;
    return 0;
}

/* ---------------------------------------------------------------- cuDNN: nothing here may use it */

int cudnnCreate(void **handle) { return new_object(handle); }
SUCCEEDS(cudnnSetStream)

int cudnnBackendCreateDescriptor(void) {
    count_call("cudnnBackendCreateDescriptor");
    return 3000; /* CUDNN_STATUS_NOT_SUPPORTED */
}

/* ---------------------------------------------------------------- NCCL: no rank waits for another */

COUNTED(ncclAllReduce)
COUNTED(ncclReduce)
COUNTED(ncclReduceScatter)
COUNTED(ncclAllGather)
COUNTED(ncclBroadcast)
COUNTED(ncclBcast)
COUNTED(ncclSend)
COUNTED(ncclRecv)
SUCCEEDS(ncclGroupStart)
SUCCEEDS(ncclGroupEnd)
SUCCEEDS(ncclCommFinalize)
SUCCEEDS(ncclCommRegister)
SUCCEEDS(ncclCommDeregister)
SUCCEEDS(ncclRedOpCreatePreMulSum)
SUCCEEDS(ncclRedOpDestroy)

typedef struct {
    int size, rank;
} *Group;
typedef struct {
    char bytes[128];
} UniqueId;

static int new_group(Group *group, int size, int rank) {
    *group = malloc(sizeof **group);
    (*group)->size = size;
    (*group)->rank = rank;
    return 0;
}

int ncclGetVersion(int *version) {
    *version = 23007;
    return 0;
}

int ncclGetUniqueId(UniqueId *id) {
    memset(id, 0, sizeof *id);
    return 0;
}

int ncclCommInitRankConfig(Group *group, int size, UniqueId id, int rank) {
    return new_group(group, size, rank);
}

int ncclCommInitRank(Group *group, int size, UniqueId id, int rank) {
    return new_group(group, size, rank);
}

int ncclCommInitRankScalable(Group *group, int size, int rank) {
    return new_group(group, size, rank);
}

int ncclCommSplit(Group group, int color, int key, Group *part) {
    return new_group(part, group->size, group->rank);
}

int ncclCommCount(Group group, int *size) {
    *size = group->size;
    return 0;
}

int ncclCommUserRank(Group group, int *rank) {
    *rank = group->rank;
    return 0;
}

int ncclCommGetAsyncError(Group group, int *error) { return *error = 0; }
int ncclCommDestroy(Group group) { return free_object(group); }
int ncclCommAbort(Group group) { return free_object(group); }
const char *ncclGetErrorString(int error) { return "error of the null GPU"; }
const char *ncclGetLastError(Group group) { return ""; }
