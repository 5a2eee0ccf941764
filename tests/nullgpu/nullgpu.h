/* What the stand-ins share: how they count, and what their devices are. */
#pragma once
#include <stddef.h>

/* A function that needs to do nothing but say that it went well. */
#define SUCCEEDS(name) \
    int name() { return 0; }
/* One of which it also matters how often it is called. */
#define COUNTED(name)        \
    int name() {             \
        count_call(#name);   \
        return 0;            \
    }

#define MAX_DEVICES 16
typedef struct {
    int capability; /* 90 for 9.0 */
    size_t memory, used;
} Device;
extern Device devices[MAX_DEVICES];
extern int num_devices;
extern __thread int current_device;

void count_call(const char *name);
/* Kernels are known by the address of the function on the host that launches them. */
void name_kernel(const void *kernel, const char *name);
void count_launch(const void *kernel);

/* Memory that only has addresses; on a device with too little left, NULL. */
char *reserve(size_t bytes);
int take(int device, size_t bytes);
void give_back(int device, size_t bytes);
