/* A libcuda.so.1 that does nothing and always succeeds: what Triton's launchers and its helper
   module call. Pointers are taken as they are, launches lead nowhere. */
#include <stddef.h>

typedef int Result;

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}
Result cuGetErrorString(Result error, const char **text) {
    *text = "stub";
    return 0;
}
Result cuCtxGetCurrent(void **context) {
    *context = (void *)1;
    return 0;
}
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuCtxGetDevice(int *device) {
    *device = 0;
    return 0;
}
Result cuStreamIsCapturing(void *stream, int *status) {
    *status = 0;
    return 0;
}
Result cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return 0;
}
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = 0;
    return 0;
}
Result cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = (void *)1;
    return 0;
}
Result cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = 0;
    return 0;
}
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuModuleLoadData(void **module, const void *image) {
    *module = (void *)1;
    return 0;
}
Result cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = (void *)1;
    return 0;
}
Result cuModuleUnload(void *module) { return 0; }
Result cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
    *(unsigned long long *)data = pointer;
    return 0;
}
Result cuTensorMapEncodeTiled() { return 0; }
Result cuCtxGetLimit(size_t *value, int limit) {
    *value = 0;
    return 0;
}
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) {
    *count = 0;
    return 0;
}
Result cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
    return 0;
}
