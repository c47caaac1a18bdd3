// A CUDA runtime without a GPU: preloaded before torch, it answers the calls of libcudart that
// torch makes, so that torch's own host code for CUDA runs as it is. For the tests alone.
//
// What is simulated
//   devices   8 alike (CUDASIM_DEVICES: fewer), with the limits of a compute capability 9.0 part:
//             torch derives launch sizes from them, and from those how far a draw moves Philox
//   contexts  a device has one from its first use on: cudaSetDevice, memory, a stream, an event
//   memory    zeroed pages of the host; copies and fills between them are real
//   streams   numbers; what is put on one is done before the call returns
//   events    one number, the tick of the last record
//   kernels   never run; a launch is counted, and so is a synchronisation and an allocation
//   capture   begin, end, launch; or "every stream is being captured" by a switch (see below).
//             A synchronisation in a capture is refused and spoils it, as in CUDA; so is
//             cudaMalloc, except in a thread that asked for the relaxed mode. A second stream does
//             not join a capture through an event.
//
// A call that is not defined here reaches the real libcudart.so, which finds no driver and returns
// an error: what is missing is seen, and never taken for a success.
//
// Symbols here have no version, and the loader takes such a symbol of a preloaded library for
// any version that torch asks for. The alternative, a whole libcudart.so.13 of our own, would have
// to define every symbol that any library needs, or nothing loads.
//
// The declarations come from the headers of the CUDA that torch was built with; a definition that
// does not fit one does not compile.

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

static_assert(CUDART_VERSION / 1000 == 13, "the structs of this file's callers are CUDA 13's");

namespace {

constexpr int kMostDevices = 8;
constexpr size_t kDeviceMemory = size_t{80} << 30;
constexpr int kMultiprocessors = 132;
constexpr int kThreadsPerMultiprocessor = 2048;
constexpr int kThreadsPerBlock = 1024;
constexpr int kBlocksPerMultiprocessor = 32;
constexpr int kWarp = 32;
constexpr int kCapabilityMajor = 9;
constexpr int kCapabilityMinor = 0;
constexpr int kRegisters = 65536;
constexpr int kSharedPerBlock = 48 << 10;
constexpr int kSharedPerBlockOptIn = 227 << 10;
constexpr int kSharedPerMultiprocessor = 228 << 10;
constexpr int kL2 = 50 << 20;
constexpr int kGridX = 0x7fffffff;
constexpr int kGridYZ = 65535;
constexpr int kBlockZ = 64;

int from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == '\0' ? otherwise : std::atoi(text);
}

struct Block {
  size_t size;
  cudaMemoryType type;
  int device;
  bool ours;  // mapped here, so unmapped when freed; false for cudaHostRegister
};

struct Capture {
  cudaGraph_t graph;
  unsigned long long id;
  cudaStreamCaptureMode mode;
  bool spoiled;
};

struct Simulation {
  const int devices =
      std::clamp(from_environment("CUDASIM_DEVICES", kMostDevices), 1, kMostDevices);
  std::atomic<bool> all_capture = from_environment("CUDASIM_CAPTURING", 0) != 0;
  std::atomic<uint64_t> launches = 0;
  std::atomic<uint64_t> synchronizations = 0;
  std::atomic<uint64_t> allocations = 0;
  std::atomic<uint64_t> capture_queries = 0;
  std::atomic<uint64_t> ticks = 0;
  std::atomic<bool> has_context[kMostDevices] = {};
  // Handles of streams, graphs and captures. 0 to 2 mean the default streams.
  std::atomic<uintptr_t> handles = 16;

  std::mutex mutex;  // for all that follows
  std::map<const char*, Block> blocks;
  size_t used[kMostDevices] = {};
  std::map<cudaStream_t, Capture> captures;
  std::map<cudaGraph_t, size_t> graphs;  // how many nodes each has
};

// Never destroyed: torch frees memory from static destructors, and from threads that outlive main.
Simulation& simulation() {
  static auto* const instance = new Simulation;
  return *instance;
}

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_memory = 0;
  cudaStream_t stream = nullptr;
};

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
thread_local LaunchShape pushed_shape;

cudaError_t fail(cudaError_t error) {
  last_error = error;
  return error;
}

template <typename Handle>
Handle new_handle() {
  return reinterpret_cast<Handle>(++simulation().handles);
}

// What makes a context in CUDA does so here.
Simulation& with_context() {
  Simulation& sim = simulation();
  sim.has_context[current_device] = true;
  return sim;
}

bool is_device(int device) { return device >= 0 && device < simulation().devices; }

// --- memory

cudaError_t allocate(void** pointer, size_t size, cudaMemoryType type) {
  Simulation& sim = with_context();
  *pointer = nullptr;
  if (size == 0) return cudaSuccess;
  ++sim.allocations;
  void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  const std::lock_guard lock(sim.mutex);
  sim.blocks[static_cast<const char*>(pages)] = {size, type, current_device, true};
  if (type == cudaMemoryTypeDevice) sim.used[current_device] += size;
  *pointer = pages;
  return cudaSuccess;
}

cudaError_t release(void* pointer, cudaMemoryType type) {
  Simulation& sim = with_context();
  if (pointer == nullptr) return cudaSuccess;
  Block block;
  {
    const std::lock_guard lock(sim.mutex);
    const auto found = sim.blocks.find(static_cast<const char*>(pointer));
    if (found == sim.blocks.end() || found->second.type != type) return fail(cudaErrorInvalidValue);
    block = found->second;
    sim.blocks.erase(found);
    if (type == cudaMemoryTypeDevice) sim.used[block.device] -= block.size;
  }
  if (block.ours) munmap(pointer, block.size);
  return cudaSuccess;
}

// --- capture

cudaStreamCaptureStatus status_of(const Simulation& sim, cudaStream_t stream) {
  if (sim.all_capture) return cudaStreamCaptureStatusActive;
  const auto found = sim.captures.find(stream);
  if (found == sim.captures.end()) return cudaStreamCaptureStatusNone;
  return found->second.spoiled ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

// Work for a stream: true if it is to be done now, false if it became a node of a graph.
bool done_now(cudaStream_t stream) {
  Simulation& sim = with_context();
  const std::lock_guard lock(sim.mutex);
  const auto found = sim.captures.find(stream);
  if (found != sim.captures.end()) ++sim.graphs[found->second.graph];
  return found == sim.captures.end() && !sim.all_capture;
}

// A wait of the host for one stream, or for all if `every`.
cudaError_t synchronize(cudaStream_t stream, bool every) {
  Simulation& sim = with_context();
  ++sim.synchronizations;
  const std::lock_guard lock(sim.mutex);
  bool refused = sim.all_capture;
  for (auto& [capturing, capture] : sim.captures) {
    if (every || capturing == stream) refused = capture.spoiled = true;
  }
  return refused ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

// The calls that CUDA forbids during a capture because they may synchronise, cudaMalloc first.
cudaError_t unsafe_call() {
  if (capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  Simulation& sim = simulation();
  const std::lock_guard lock(sim.mutex);
  bool refused = sim.all_capture;
  for (auto& [stream, capture] : sim.captures) {
    if (capture.mode == cudaStreamCaptureModeGlobal) refused = capture.spoiled = true;
  }
  return refused ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

cudaError_t launch(cudaStream_t stream) {
  ++simulation().launches;
  done_now(stream);
  return cudaSuccess;
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  if (done_now(stream)) std::memmove(to, from, bytes);
  return cudaSuccess;
}

uint64_t& tick_of(cudaEvent_t event) { return *reinterpret_cast<uint64_t*>(event); }

}  // namespace

extern "C" {

// --- the switch and the counters, for the tests (ctypes)

// While it is on, every stream answers that it is being captured.
void cudasim_set_capturing(int capturing) { simulation().all_capture = capturing != 0; }

// For our libcuda, which tells torch.
int cudasim_has_context(int device) {
  return is_device(device) && simulation().has_context[device] ? 1 : 0;
}

// Totals since the process started.
uint64_t cudasim_launches() { return simulation().launches; }
uint64_t cudasim_synchronizations() { return simulation().synchronizations; }
uint64_t cudasim_allocations() { return simulation().allocations; }
uint64_t cudasim_capture_queries() { return simulation().capture_queries; }

// --- errors and versions

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// The driver's functions refuse (see libcuda.c), but torch wants to have found them.
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned int,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  static void* const driver = dlopen("libcuda.so.1", RTLD_LAZY);
  *function = driver == nullptr ? nullptr : dlsym(driver, symbol);
  if (result != nullptr) {
    *result =
        *function == nullptr ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  }
  return cudaSuccess;
}

// --- devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = simulation().devices;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (!is_device(device)) return fail(cudaErrorInvalidDevice);
  current_device = device;
  with_context();
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (!is_device(device)) return fail(cudaErrorInvalidDevice);
  cudaDeviceProp p = {};
  std::snprintf(p.name, sizeof p.name, "Simulated CUDA device");
  std::memcpy(p.uuid.bytes, "simulated CUDA", 14);
  p.uuid.bytes[15] = static_cast<char>(device);
  p.totalGlobalMem = kDeviceMemory;
  p.sharedMemPerBlock = kSharedPerBlock;
  p.sharedMemPerBlockOptin = kSharedPerBlockOptIn;
  p.sharedMemPerMultiprocessor = kSharedPerMultiprocessor;
  p.reservedSharedMemPerBlock = 1 << 10;
  p.regsPerBlock = kRegisters;
  p.regsPerMultiprocessor = kRegisters;
  p.warpSize = kWarp;
  p.memPitch = 0x7fffffff;
  p.maxThreadsPerBlock = kThreadsPerBlock;
  p.maxThreadsPerMultiProcessor = kThreadsPerMultiprocessor;
  p.maxBlocksPerMultiProcessor = kBlocksPerMultiprocessor;
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = kThreadsPerBlock;
  p.maxThreadsDim[2] = kBlockZ;
  p.maxGridSize[0] = kGridX;
  p.maxGridSize[1] = p.maxGridSize[2] = kGridYZ;
  p.totalConstMem = 64 << 10;
  p.major = kCapabilityMajor;
  p.minor = kCapabilityMinor;
  p.multiProcessorCount = kMultiprocessors;
  p.textureAlignment = 512;
  p.texturePitchAlignment = 32;
  p.l2CacheSize = kL2;
  p.memoryBusWidth = 5120;
  p.asyncEngineCount = 3;
  p.pciBusID = device + 1;
  p.canMapHostMemory = p.unifiedAddressing = p.concurrentKernels = 1;
  p.streamPrioritiesSupported = p.cooperativeLaunch = p.computePreemptionSupported = 1;
  *properties = p;
  return cudaSuccess;
}

// What is not in the list is 0: not there, not supported.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!is_device(device)) return fail(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      *value = kThreadsPerBlock;
      break;
    case cudaDevAttrMaxBlockDimZ:
      *value = kBlockZ;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = kGridX;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *value = kGridYZ;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSharedPerBlock;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kSharedPerBlockOptIn;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = kSharedPerMultiprocessor;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = 1 << 10;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = kRegisters;
      break;
    case cudaDevAttrWarpSize:
      *value = kWarp;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = kThreadsPerMultiprocessor;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = kBlocksPerMultiprocessor;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = kCapabilityMajor;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = kCapabilityMinor;
      break;
    case cudaDevAttrL2CacheSize:
      *value = kL2;
      break;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrConcurrentKernels:
      *value = 1;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  if (!is_device(device)) return fail(cudaErrorInvalidDevice);
  std::snprintf(text, static_cast<size_t>(length), "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  if (!is_device(device) || !is_device(peer)) return fail(cudaErrorInvalidDevice);
  *can = device != peer;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned int) {
  return is_device(peer) ? cudaSuccess : fail(cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceSynchronize() { return synchronize(nullptr, /*every=*/true); }

// --- memory

cudaError_t cudaMalloc(void** pointer, size_t size) {
  if (const cudaError_t error = unsafe_call(); error != cudaSuccess) return error;
  return allocate(pointer, size, cudaMemoryTypeDevice);
}

cudaError_t cudaFree(void* pointer) { return release(pointer, cudaMemoryTypeDevice); }

cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned int) {
  if (const cudaError_t error = unsafe_call(); error != cudaSuccess) return error;
  return allocate(pointer, size, cudaMemoryTypeHost);
}

cudaError_t cudaFreeHost(void* pointer) { return release(pointer, cudaMemoryTypeHost); }

cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned int) {
  Simulation& sim = simulation();
  const std::lock_guard lock(sim.mutex);
  const Block block = {size, cudaMemoryTypeHost, current_device, false};
  const bool fresh = sim.blocks.emplace(static_cast<const char*>(pointer), block).second;
  return fresh ? cudaSuccess : fail(cudaErrorHostMemoryAlreadyRegistered);
}

cudaError_t cudaHostUnregister(void* pointer) { return release(pointer, cudaMemoryTypeHost); }

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  Simulation& sim = simulation();
  const std::lock_guard lock(sim.mutex);
  *total = kDeviceMemory;
  *available = kDeviceMemory - std::min(kDeviceMemory, sim.used[current_device]);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  Simulation& sim = simulation();
  const std::lock_guard lock(sim.mutex);
  *attributes = {};
  attributes->type = cudaMemoryTypeUnregistered;
  attributes->device = cudaInvalidDeviceId;
  auto after = sim.blocks.upper_bound(static_cast<const char*>(pointer));
  if (after == sim.blocks.begin()) return cudaSuccess;
  const auto& [start, block] = *--after;
  if (static_cast<const char*>(pointer) >= start + block.size) return cudaSuccess;
  attributes->type = block.type;
  attributes->device = block.device;
  attributes->devicePointer = const_cast<void*>(pointer);
  if (block.type == cudaMemoryTypeHost) attributes->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

// Copies that the host waits for.
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const cudaError_t error = synchronize(nullptr, /*every=*/true);
  return error == cudaSuccess ? copy(to, from, bytes, nullptr) : error;
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                               cudaMemcpyKind kind) {
  auto* const to = static_cast<char*>(const_cast<void*>(symbol)) + offset;
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return copy(to, from, bytes, stream);
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                cudaStream_t stream) {
  return copy(to, from, bytes, stream);
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (done_now(stream)) std::memset(to, value, bytes);
  return cudaSuccess;
}

// A device variable lives where the host's shadow of it does.
cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  *pointer = const_cast<void*>(symbol);
  return cudaSuccess;
}

// --- streams

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  with_context();
  *stream = new_handle<cudaStream_t>();
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int) {
  return cudaStreamCreate(stream);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned int, int) {
  return cudaStreamCreate(stream);
}

cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Simulation& sim = simulation();
  const std::lock_guard lock(sim.mutex);
  const bool captured = status_of(sim, stream) != cudaStreamCaptureStatusNone;
  return captured ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return synchronize(stream, /*every=*/false);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned int) { return cudaSuccess; }

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  if (done_now(stream)) function(data);
  return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data,
                                  unsigned int) {
  if (done_now(stream)) callback(stream, cudaSuccess, data);
  return cudaSuccess;
}

// --- events

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  with_context();
  *event = reinterpret_cast<cudaEvent_t>(new uint64_t{0});
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int) {
  return cudaEventCreate(event);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete &tick_of(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  tick_of(event) = ++with_context().ticks;
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned int) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaEventSynchronize(cudaEvent_t) {
  ++simulation().synchronizations;
  return cudaSuccess;
}

// Ticks, not milliseconds: there is no work whose time could be told.
cudaError_t cudaEventElapsedTime(float* elapsed, cudaEvent_t start, cudaEvent_t end) {
  *elapsed = static_cast<float>(tick_of(end)) - static_cast<float>(tick_of(start));
  return cudaSuccess;
}

// --- capture and graphs

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Simulation& sim = simulation();
  ++sim.capture_queries;
  const std::lock_guard lock(sim.mutex);
  *status = status_of(sim, stream);
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  Simulation& sim = simulation();
  ++sim.capture_queries;
  const std::lock_guard lock(sim.mutex);
  const auto found = sim.captures.find(stream);
  const bool known = found != sim.captures.end();
  *status = status_of(sim, stream);
  if (id != nullptr) *id = known ? found->second.id : 0;
  if (graph != nullptr) *graph = known ? found->second.graph : nullptr;
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(capture_mode, *mode);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  Simulation& sim = simulation();
  if (stream == nullptr) return fail(cudaErrorStreamCaptureUnsupported);
  const std::lock_guard lock(sim.mutex);
  if (status_of(sim, stream) != cudaStreamCaptureStatusNone) return fail(cudaErrorIllegalState);
  const auto graph = new_handle<cudaGraph_t>();
  sim.graphs[graph] = 0;
  sim.captures[stream] = {graph, ++sim.handles, mode, /*spoiled=*/false};
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  Simulation& sim = simulation();
  const std::lock_guard lock(sim.mutex);
  const auto found = sim.captures.find(stream);
  if (found == sim.captures.end()) return fail(cudaErrorIllegalState);
  const Capture capture = found->second;
  sim.captures.erase(found);
  *graph = capture.spoiled ? nullptr : capture.graph;
  return capture.spoiled ? fail(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  Simulation& sim = simulation();
  const std::lock_guard lock(sim.mutex);
  if (nodes != nullptr) return fail(cudaErrorNotSupported);  // only their number is known
  *count = sim.graphs[graph];
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t,
                                          unsigned long long) {
  *executable = new_handle<cudaGraphExec_t>();
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) { return launch(stream); }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

// --- kernels

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  return launch(config->stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t,
                                        cudaStream_t stream) {
  return launch(stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = kThreadsPerBlock;
  attributes->numRegs = kWarp;
  attributes->ptxVersion = kCapabilityMajor * 10 + kCapabilityMinor;
  attributes->binaryVersion = kCapabilityMajor * 10 + kCapabilityMinor;
  attributes->maxDynamicSharedSizeBytes = kSharedPerBlock;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) {
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int block_size,
                                                          size_t) {
  if (block_size < 1) return fail(cudaErrorInvalidValue);
  *blocks = std::min(kBlocksPerMultiprocessor, kThreadsPerMultiprocessor / block_size);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int block_size, size_t shared,
                                                                   unsigned int) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, block_size, shared);
}

// --- what nvcc puts into host code. No header that a C++ compiler can read declares these.

// One handle serves all: kernels and variables are looked up by the address of their host symbol.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}

// f<<<grid, block, shared, stream>>>(...): pushed at the call, popped by the stub of f.
unsigned int __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory,
                                         cudaStream_t stream) {
  pushed_shape = {grid, block, shared_memory, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_memory,
                                       void* stream) {
  *grid = pushed_shape.grid;
  *block = pushed_shape.block;
  *shared_memory = pushed_shape.shared_memory;
  *static_cast<cudaStream_t*>(stream) = pushed_shape.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(stream);
}

}  // extern "C"
