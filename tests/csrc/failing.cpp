// Memory that runs out at a chosen allocation of some libraries, to be preloaded in front of the C library's.
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <link.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

extern "C" {
void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* memory, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);
}

namespace {

std::atomic<long> left{0};  // allocations up to the one that fails; 0: none does
std::atomic<long> failures{0};
std::atomic<bool> ever_after{false};
thread_local bool looking = false;

// Where a library's code and data lie.
struct Range {
  uintptr_t first = 0, last = 0;
  bool has(const void* address) const {
    const auto at = reinterpret_cast<uintptr_t>(address);
    return first <= at && at < last;
  }
};
Range libraries[4], openmp;
int watched = 0;

Range range_of(const dl_phdr_info& object) {
  Range range{UINTPTR_MAX, 0};
  for (int i = 0; i < object.dlpi_phnum; ++i) {
    const auto& segment = object.dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    const uintptr_t first = object.dlpi_addr + segment.p_vaddr, last = first + segment.p_memsz;
    if (first < range.first) range.first = first;
    if (last > range.last) range.last = last;
  }
  return range;
}

// Whether PyTorch allocates there for a node of autograd's graph, any node, in a function that must not throw: where it
// takes one apart, and where one has more than two outputs.
bool of_nodes(void* address) {
  struct Known {
    void* address;
    bool found;
  };
  static thread_local Known all[1024];  // as looking a name up takes milliseconds
  Known& known = all[reinterpret_cast<uintptr_t>(address) / 4 % 1024];
  if (known.address != address) {
    Dl_info symbol;
    const bool named = dladdr(address, &symbol) != 0 && symbol.dli_sname != nullptr;
    const auto is = [&](const char* name) { return named && std::strstr(symbol.dli_sname, name) != nullptr; };
    known = {address, is("Node17release_resources") || is("deleteNode") || is("SmallVectorBase")};
  }
  return known.found;
}

// Whether a watched library is among the callers, and nothing is that ends the process where it gets no memory: OpenMP,
// or PyTorch as above.
bool asked_by_library() {
  void* frames[48];
  const int count = backtrace(frames, 48);
  for (int i = 2; i < count; ++i) {
    if (openmp.has(frames[i])) return false;
    for (int k = 0; k < watched; ++k) {
      if (libraries[k].has(frames[i])) return !of_nodes(frames[i - 1]);
    }
  }
  return false;
}

bool fails() {
  if (left.load(std::memory_order_relaxed) == 0 || looking) return false;
  looking = true;
  const bool counts = asked_by_library();
  looking = false;
  if (!counts) return false;
  long before = left.load();
  while (before > 1 && !left.compare_exchange_weak(before, before - 1)) {
  }
  if (before != 1) return false;
  if (!ever_after && left.exchange(0) != 1) return false;
  ++failures;
  return true;
}

void* or_nothing(void* (*allocate)(size_t, size_t), size_t first, size_t second) {
  if (!fails()) return allocate(first, second);
  errno = ENOMEM;
  return nullptr;
}

}  // namespace

extern "C" {

void* malloc(size_t bytes) {
  return or_nothing([](size_t size, size_t) { return __libc_malloc(size); }, bytes, 0);
}
void* calloc(size_t count, size_t bytes) { return or_nothing(__libc_calloc, count, bytes); }
void* memalign(size_t alignment, size_t bytes) { return or_nothing(__libc_memalign, alignment, bytes); }
void* aligned_alloc(size_t alignment, size_t bytes) { return or_nothing(__libc_memalign, alignment, bytes); }
void* realloc(void* memory, size_t bytes) {
  if (!fails()) return __libc_realloc(memory, bytes);
  errno = ENOMEM;
  return nullptr;
}
int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  void* const found = fails() ? nullptr : __libc_memalign(alignment, bytes);
  if (!found) return ENOMEM;
  *memory = found;
  return 0;
}

// One library more, the one that an address of its code lies in; of four at most. Looks up what it needs once, before
// memory is short.
void watch(const void* address) {
  void* frames[4];
  backtrace(frames, 4);
  const auto visit = [](dl_phdr_info* object, size_t, void* wanted) {
    const Range range = range_of(*object);
    if (range.has(wanted)) libraries[watched++] = range;
    if (std::strstr(object->dlpi_name, "gomp")) openmp = range;
    return 0;
  };
  dl_iterate_phdr(visit, const_cast<void*>(address));
}

// The n-th allocation from now on fails, or all from there on do.
void arm(long n, bool all_after) {
  failures = 0;
  ever_after = all_after;
  left = n;
}

// No allocation fails any more; how many have.
long disarm() {
  left = 0;
  return failures;
}
}
