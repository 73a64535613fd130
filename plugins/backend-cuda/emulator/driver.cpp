// A `libcuda.so.1` over the emulator: the calls of the CUDA driver that the backend makes.
//
// A stream is a queue that runs as late as the API allows, when somebody waits for it: a host buffer that is
// changed or read too early shows as wrong data. Copies are checked against the allocations, whose ends are
// guarded; what a launch or copy writes behind one makes the stream fail with CUDA_ERROR_ILLEGAL_ADDRESS, as
// on a device. CUEMU_MEMORY sets the bytes of memory that the device has; to the file that CUEMU_LAUNCHES names go the names of
// kernels as they run.

#include "cuemu.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

using Result = int;
using Address = unsigned long long;

// Under AddressSanitizer nobody may touch what lies behind an allocation, not even to read it.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, bytes) (static_cast<void>(start), static_cast<void>(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(start, bytes) (static_cast<void>(start), static_cast<void>(bytes))
#endif

namespace {

enum : Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    CAPTURE_UNSUPPORTED = 900,
    ILLEGAL_STATE = 401,
    ILLEGAL_ADDRESS = 700,
};

constexpr size_t GUARD_BYTES = 256;
constexpr unsigned char GUARD = 0xA5;
constexpr unsigned char FRESH = 0xCD;
constexpr size_t MAX_SHARED = 227 << 10;

using Work = std::function<void()>;

struct Stream {
    std::deque<Work> queue;
    // Where work goes instead while it is captured.
    std::vector<Work> *captured = nullptr;
    std::thread::id capturing;

    void push(Work work) {
        if (captured) {
            captured->push_back(std::move(work));
        } else {
            queue.push_back(std::move(work));
        }
    }
};

struct Event {
    Stream *stream = nullptr;
    bool recorded = true;
    std::chrono::steady_clock::time_point time;
};

struct Function {
    cuemu::Kernel *kernel;
    std::string name;
    size_t max_shared = 48 << 10;
};

// Everything here is guarded by one lock: tests run on several threads, the device is one.
std::recursive_mutex lock;
std::map<Address, size_t> allocations;
std::map<uintptr_t, size_t> pinned;
size_t used = 0;
Result fault = SUCCESS;
Stream default_stream;
std::set<Stream *> streams{&default_stream};
thread_local void *current_context;

size_t memory_bytes() {
    static const size_t bytes = getenv("CUEMU_MEMORY") ? strtoull(getenv("CUEMU_MEMORY"), nullptr, 10) : 8ull << 30;
    return bytes;
}

void note_launch(const std::string &name) {
    static FILE *file = getenv("CUEMU_LAUNCHES") ? fopen(getenv("CUEMU_LAUNCHES"), "a") : nullptr;
    if (file) {
        fprintf(file, "%s\n", name.c_str());
        fflush(file);
    }
}

Stream &stream_of(void *stream) {
    return reinterpret_cast<uintptr_t>(stream) <= 2 ? default_stream : *static_cast<Stream *>(stream);
}

// Whether `bytes` from `start` lie in one allocation.
bool is_inside(Address start, size_t bytes) {
    auto next = allocations.upper_bound(start);
    if (next == allocations.begin()) {
        return false;
    }
    auto found = std::prev(next);
    return start + bytes <= found->first + found->second;
}

bool is_pinned(const void *start) {
    auto next = pinned.upper_bound(reinterpret_cast<uintptr_t>(start));
    if (next == pinned.begin()) {
        return false;
    }
    auto found = std::prev(next);
    return reinterpret_cast<uintptr_t>(start) < found->first + found->second;
}

void check_guards() {
#if defined(__SANITIZE_ADDRESS__)
    return;
#endif
    for (auto &[start, bytes] : allocations) {
        const unsigned char *guard = reinterpret_cast<unsigned char *>(start + bytes);
        for (size_t i = 0; i < GUARD_BYTES; i++) {
            if (guard[i] != GUARD) {
                fprintf(stderr, "cuemu: something was written %zu bytes behind an allocation of %zu\n", i, bytes);
                fault = ILLEGAL_ADDRESS;
                return;
            }
        }
    }
}

void drain(Stream &stream) {
    while (!stream.queue.empty()) {
        auto work = std::move(stream.queue.front());
        stream.queue.pop_front();
        work();
    }
    check_guards();
}

// Whether this thread captures a stream: what waits for a device is refused then.
bool is_capturing() {
    for (Stream *stream : streams) {
        if (stream->captured && stream->capturing == std::this_thread::get_id()) {
            return true;
        }
    }
    return false;
}

Result allocate(Address *place, size_t bytes) {
    if (bytes == 0) {
        return INVALID_VALUE;
    }
    if (bytes > memory_bytes() || used > memory_bytes() - bytes) {
        return OUT_OF_MEMORY;
    }
    char *memory = static_cast<char *>(aligned_alloc(256, (bytes + GUARD_BYTES + 255) / 256 * 256));
    if (!memory) {
        return OUT_OF_MEMORY;
    }
    memset(memory, FRESH, bytes);
    memset(memory + bytes, GUARD, GUARD_BYTES);
    ASAN_POISON_MEMORY_REGION(memory + bytes, GUARD_BYTES);
    *place = reinterpret_cast<Address>(memory);
    allocations[*place] = bytes;
    used += bytes;
    return SUCCESS;
}

Result release(Address place) {
    auto found = allocations.find(place);
    if (found == allocations.end()) {
        return INVALID_VALUE;
    }
    used -= found->second;
    ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<char *>(place) + found->second, GUARD_BYTES);
    allocations.erase(found);
    free(reinterpret_cast<void *>(place));
    return SUCCESS;
}

using Guard = std::lock_guard<std::recursive_mutex>;

} // namespace

extern "C" {

Result cuInit(unsigned) { return SUCCESS; }
Result cuDriverGetVersion(int *version) { return *version = 12080, SUCCESS; }
Result cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
Result cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal == 0 ? SUCCESS : INVALID_DEVICE; }
Result cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = memory_bytes(), SUCCESS; }

Result cuDeviceGetName(char *name, int length, int) {
    snprintf(name, length, "cuemu (CPU emulation)");
    return SUCCESS;
}

Result cuDeviceGetAttribute(int *value, int attribute, int) {
    switch (attribute) {
    case 16: *value = 4; break;                            // Multiprocessors.
    case 75: *value = 8; break;                            // Compute capability, major.
    case 76: *value = 0; break;                            // And minor.
    case 97: *value = static_cast<int>(MAX_SHARED); break; // Shared memory that a block can opt in to.
    case 115: *value = 1; break;                           // Memory pools.
    default: *value = 0;
    }
    return SUCCESS;
}

Result cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = reinterpret_cast<void *>(static_cast<uintptr_t>(0x1000 + device));
    return SUCCESS;
}
Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
Result cuCtxSetCurrent(void *context) { return current_context = context, SUCCESS; }
Result cuCtxGetCurrent(void **context) { return *context = current_context, SUCCESS; }

Result cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    Guard guard(lock);
    *total = memory_bytes();
    *free_bytes = *total - used;
    return SUCCESS;
}

Result cuStreamCreate(void **stream, unsigned) {
    Guard guard(lock);
    Stream *created = new Stream;
    streams.insert(created);
    *stream = created;
    return SUCCESS;
}

Result cuStreamSynchronize(void *stream) {
    Guard guard(lock);
    if (is_capturing()) {
        return CAPTURE_UNSUPPORTED;
    }
    drain(stream_of(stream));
    return fault;
}

Result cuStreamDestroy_v2(void *stream) {
    Guard guard(lock);
    drain(stream_of(stream));
    streams.erase(static_cast<Stream *>(stream));
    delete static_cast<Stream *>(stream);
    return SUCCESS;
}

Result cuEventCreate(void **event, unsigned) { return *event = new Event, SUCCESS; }

Result cuEventDestroy_v2(void *handle) {
    Guard guard(lock);
    Event *event = static_cast<Event *>(handle);
    if (!event->recorded) {
        drain(*event->stream);
    }
    delete event;
    return SUCCESS;
}

Result cuEventRecord(void *handle, void *stream) {
    Guard guard(lock);
    Event *event = static_cast<Event *>(handle);
    event->stream = &stream_of(stream);
    event->recorded = false;
    event->stream->queue.push_back([event] {
        event->recorded = true;
        event->time = std::chrono::steady_clock::now();
    });
    return SUCCESS;
}

Result cuEventSynchronize(void *handle) {
    Guard guard(lock);
    if (is_capturing()) {
        return CAPTURE_UNSUPPORTED;
    }
    Event *event = static_cast<Event *>(handle);
    while (!event->recorded && !event->stream->queue.empty()) {
        auto work = std::move(event->stream->queue.front());
        event->stream->queue.pop_front();
        work();
    }
    check_guards();
    return fault;
}

Result cuEventElapsedTime(float *milliseconds, void *start, void *end) {
    Event *from = static_cast<Event *>(start), *to = static_cast<Event *>(end);
    if (!from->recorded || !to->recorded) {
        return NOT_READY;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(to->time - from->time).count();
    return SUCCESS;
}

Result cuMemAlloc_v2(Address *place, size_t bytes) {
    Guard guard(lock);
    if (is_capturing()) {
        return CAPTURE_UNSUPPORTED;
    }
    return allocate(place, bytes);
}

// As the driver's, it waits for all work first.
Result cuMemFree_v2(Address place) {
    Guard guard(lock);
    if (is_capturing()) {
        return CAPTURE_UNSUPPORTED;
    }
    for (Stream *stream : streams) {
        drain(*stream);
    }
    return release(place);
}

Result cuMemHostAlloc(void **place, size_t bytes, unsigned) {
    Guard guard(lock);
    *place = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!*place) {
        return OUT_OF_MEMORY;
    }
    memset(*place, FRESH, bytes);
    pinned[reinterpret_cast<uintptr_t>(*place)] = bytes;
    return SUCCESS;
}

Result cuMemFreeHost(void *place) {
    Guard guard(lock);
    if (!pinned.erase(reinterpret_cast<uintptr_t>(place))) {
        return INVALID_VALUE;
    }
    free(place);
    return SUCCESS;
}

Result cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, void *stream) {
    Guard guard(lock);
    if (!is_inside(to, bytes)) {
        return INVALID_VALUE;
    }
    if (is_pinned(from)) {
        stream_of(stream).push([=] { memcpy(reinterpret_cast<void *>(to), from, bytes); });
        return SUCCESS;
    }
    // The driver stages memory that isn't pinned before it returns.
    auto staged = std::make_shared<std::vector<char>>(static_cast<const char *>(from),
                                                      static_cast<const char *>(from) + bytes);
    stream_of(stream).push([=] { memcpy(reinterpret_cast<void *>(to), staged->data(), bytes); });
    return SUCCESS;
}

Result cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, void *stream) {
    Guard guard(lock);
    if (!is_inside(from, bytes)) {
        return INVALID_VALUE;
    }
    stream_of(stream).push([=] { memcpy(to, reinterpret_cast<void *>(from), bytes); });
    if (!is_pinned(to)) {
        drain(stream_of(stream));
    }
    return SUCCESS;
}

Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void *stream) {
    Guard guard(lock);
    if (!is_inside(to, bytes) || !is_inside(from, bytes)) {
        return INVALID_VALUE;
    }
    stream_of(stream).push(
        [=] { memmove(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes); });
    return SUCCESS;
}

// An image is a name that the backend makes up for the emulator; the kernels are compiled in.
Result cuModuleLoadData(void **module, const void *image) {
    *module = reinterpret_cast<void *>(0x3000);
    return strncmp(static_cast<const char *>(image), "cuemu", 5) == 0 ? SUCCESS : INVALID_IMAGE;
}
Result cuModuleUnload(void *) { return SUCCESS; }

Result cuModuleGetFunction(void **function, void *, const char *name) {
    cuemu::Kernel *kernel = cuemu::find_kernel(name);
    if (!kernel) {
        return NOT_FOUND;
    }
    *function = new Function{kernel, name};
    return SUCCESS;
}

Result cuFuncGetAttribute(int *value, int, void *) { return *value = 32, SUCCESS; }

Result cuFuncSetAttribute(void *function, int attribute, int value) {
    if (attribute == 8) {
        if (value < 0 || static_cast<size_t>(value) > MAX_SHARED) {
            return INVALID_VALUE;
        }
        static_cast<Function *>(function)->max_shared = value;
    }
    return SUCCESS;
}

Result cuLaunchKernel(void *handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                      unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **parameters, void **) {
    Guard guard(lock);
    Function *function = static_cast<Function *>(handle);
    unsigned threads = block_x * block_y * block_z;
    if (!grid_x || !grid_y || !grid_z || grid_y > 65535 || grid_z > 65535 || !threads || threads > 1024 ||
        shared > function->max_shared) {
        return INVALID_VALUE;
    }
    auto values = std::make_shared<std::vector<std::vector<char>>>();
    for (size_t i = 0; i < function->kernel->parameter_bytes.size(); i++) {
        const char *value = static_cast<const char *>(parameters[i]);
        values->emplace_back(value, value + function->kernel->parameter_bytes[i]);
    }
    cuemu::Launch launch{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared};
    cuemu::Kernel *kernel = function->kernel;
    stream_of(stream).push([launch, kernel, values, name = function->name] {
        note_launch(name);
        std::vector<void *> places;
        for (auto &value : *values) {
            places.push_back(value.data());
        }
        cuemu::run(launch, [&] { kernel->call(places.data()); });
    });
    return SUCCESS;
}

struct LaunchConfig {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
    void *stream, *attributes;
    unsigned attribute_count;
};

// Attributes let kernels overlap; here they never do.
Result cuLaunchKernelEx(const LaunchConfig *config, void *handle, void **parameters, void **extra) {
    return cuLaunchKernel(handle, config->grid_x, config->grid_y, config->grid_z, config->block_x, config->block_y,
                          config->block_z, config->shared, config->stream, parameters, extra);
}

Result cuStreamBeginCapture_v2(void *stream, int) {
    Guard guard(lock);
    Stream &captured = stream_of(stream);
    if (captured.captured) {
        return ILLEGAL_STATE;
    }
    captured.captured = new std::vector<Work>;
    captured.capturing = std::this_thread::get_id();
    return SUCCESS;
}

Result cuStreamEndCapture(void *stream, void **graph) {
    Guard guard(lock);
    Stream &captured = stream_of(stream);
    if (!captured.captured) {
        return ILLEGAL_STATE;
    }
    *graph = captured.captured;
    captured.captured = nullptr;
    return SUCCESS;
}

Result cuGraphInstantiateWithFlags(void **instance, void *graph, unsigned long long) {
    *instance = new std::vector<Work>(*static_cast<std::vector<Work> *>(graph));
    return SUCCESS;
}

Result cuGraphLaunch(void *instance, void *stream) {
    Guard guard(lock);
    for (const Work &work : *static_cast<std::vector<Work> *>(instance)) {
        stream_of(stream).push(work);
    }
    return SUCCESS;
}

Result cuGraphDestroy(void *graph) { return delete static_cast<std::vector<Work> *>(graph), SUCCESS; }
Result cuGraphExecDestroy(void *instance) { return delete static_cast<std::vector<Work> *>(instance), SUCCESS; }

Result cuGetErrorName(Result error, const char **name) {
    switch (error) {
    case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
    case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case INVALID_IMAGE: *name = "CUDA_ERROR_INVALID_IMAGE"; break;
    case NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
    case CAPTURE_UNSUPPORTED: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
    case ILLEGAL_STATE: *name = "CUDA_ERROR_ILLEGAL_STATE"; break;
    case ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
    default: *name = "CUDA_ERROR_UNKNOWN";
    }
    return SUCCESS;
}
Result cuGetErrorString(Result error, const char **text) { return cuGetErrorName(error, text); }

} // extern "C"
