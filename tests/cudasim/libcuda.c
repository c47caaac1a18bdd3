// A libcuda.so.1 without a driver: it can be loaded, its symbols exist, and it has no device.
//
// torch links it twice over: libcaffe2_nvrtc.so needs the file to load, and libc10_cuda.so looks up
// the functions for virtual memory and stops if one is missing. Both only want to find them. The
// one that is called, cuDevicePrimaryCtxGetState, answers for the preloaded runtime (cudart.cpp):
// "inactive" until the device is used. To answer "inactive" always would be simpler, but torch asks
// whether a stream is being captured only on a device that has a context.
//
// Every other call is refused with CUDA_ERROR_NO_DEVICE, so that libraries which carry a runtime of
// their own (cuBLAS, cuDNN, NCCL) report that there is no device instead of using one.
//
// cuda.h is not included: it renames functions (cuLinkCreate is cuLinkCreate_v2) behind the names
// that have to be exported here.

#define _GNU_SOURCE  // RTLD_DEFAULT
#include <dlfcn.h>
#include <stddef.h>

enum { kSuccess = 0, kNoDevice = 100 };

int cuDevicePrimaryCtxGetState(int device, unsigned int* flags, int* active) {
  // Looked up once: a driver answers in some 50 ns, and this is asked all the time.
  static int (*has_context)(int);
  if (has_context == NULL) {
    has_context = (int (*)(int))dlsym(RTLD_DEFAULT, "cudasim_has_context");
  }
  *flags = 0;
  *active = has_context != NULL && has_context(device);
  return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return kSuccess;
}

int cuGetErrorString(int error, const char** text) {
  *text = error == kSuccess ? "no error" : "refused by the simulated driver";
  return kSuccess;
}

#define REFUSED(name) \
  int name(void) { return kNoDevice; }

REFUSED(cuInit)

// libcaffe2_nvrtc.so
REFUSED(cuCtxGetCurrent)
REFUSED(cuCtxSetCurrent)
REFUSED(cuDeviceGetAttribute)
REFUSED(cuDevicePrimaryCtxRetain)
REFUSED(cuFuncGetAttribute)
REFUSED(cuFuncSetAttribute)
REFUSED(cuFuncSetCacheConfig)
REFUSED(cuLaunchCooperativeKernel)
REFUSED(cuLaunchKernel)
REFUSED(cuLinkAddData_v2)
REFUSED(cuLinkComplete)
REFUSED(cuLinkCreate_v2)
REFUSED(cuModuleGetFunction)
REFUSED(cuModuleLoad)
REFUSED(cuModuleLoadData)
REFUSED(cuModuleLoadDataEx)
REFUSED(cuModuleUnload)
REFUSED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
REFUSED(cuPointerGetAttribute)
REFUSED(cuTensorMapEncodeTiled)

// libc10_cuda.so, by name at run time
REFUSED(cuMemAddressFree)
REFUSED(cuMemAddressReserve)
REFUSED(cuMemCreate)
REFUSED(cuMemExportToShareableHandle)
REFUSED(cuMemGetAddressRange)
REFUSED(cuMemGetAllocationGranularity)
REFUSED(cuMemGetAllocationPropertiesFromHandle)
REFUSED(cuMemImportFromShareableHandle)
REFUSED(cuMemMap)
REFUSED(cuMemRelease)
REFUSED(cuMemRetainAllocationHandle)
REFUSED(cuMemSetAccess)
REFUSED(cuMemUnmap)
REFUSED(cuMemsetD32Async)
REFUSED(cuStreamWriteValue32)
