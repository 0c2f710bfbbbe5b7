/* As much of libcuda as it takes to ask which GPU is here. STUB_CUINIT is what cuInit returns, STUB_GPUS how many. */
#include <stdio.h>
#include <stdlib.h>

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuInit(unsigned flags) { return number("STUB_CUINIT", 0); }
int cuDeviceGetCount(int *count) { *count = number("STUB_GPUS", 1); return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Stub RTX %d", device); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 9 : -1;
    return 0;
}
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
