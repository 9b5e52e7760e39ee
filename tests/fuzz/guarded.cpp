// PyTorch's memory for tensors between pages that may not be touched, to be preloaded in front of the C library's.
// Only what libc10 asks for while it is armed, as what others ask for has to lie where they said.
#include <dlfcn.h>
#include <errno.h>
#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

extern "C" {
void* __libc_memalign(size_t alignment, size_t bytes);
void __libc_free(void* memory);
}

namespace {

constexpr uintptr_t kPage = 4096;
constexpr uintptr_t kSpace = uintptr_t{1}
                             << 44;  // reserved, and never used twice, so that freed memory stays forbidden
std::atomic<uintptr_t> space{0}, next{0};
std::atomic<bool> armed{false};
std::atomic<long> made{0};
bool before = false;

bool of_tensors(void* caller) {
  static std::atomic<void*> yes{nullptr};  // of the one place that asks
  if (caller == yes) return true;
  Dl_info found;
  const bool is = dladdr(caller, &found) != 0 && std::strstr(found.dli_fname, "libc10") != nullptr;
  if (is) yes = caller;
  return is;
}

// A page that says how many bytes there are, a forbidden one, the bytes, a forbidden page. The address that is given
// back lies in the first of the bytes' pages.
void* between_pages(size_t bytes) {
  const uintptr_t inside = (bytes + kPage - 1) / kPage * kPage, at = next.fetch_add(inside + 3 * kPage);
  if (at + inside + 3 * kPage > kSpace) return nullptr;
  const uintptr_t start = space + at, first = start + 2 * kPage;
  if (mprotect(reinterpret_cast<void*>(start), kPage, PROT_READ | PROT_WRITE) != 0) return nullptr;
  if (mprotect(reinterpret_cast<void*>(first), inside, PROT_READ | PROT_WRITE) != 0) return nullptr;
  *reinterpret_cast<size_t*>(start) = inside;
  ++made;
  return reinterpret_cast<void*>(before ? first : first + inside - bytes);
}

}  // namespace

extern "C" {

// From now on, or no more; with the forbidden page right before the bytes, or right after.
void guard(bool on, bool in_front) {
  if (on && space == 0) {
    void* const found = mmap(nullptr, kSpace, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return;
    space = reinterpret_cast<uintptr_t>(found);
  }
  before = in_front;
  armed = on;
}

// How many tensors have been given such memory.
long guarded() { return made; }

int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  void* found = nullptr;
  if (armed && bytes != 0 && of_tensors(__builtin_return_address(0))) found = between_pages(bytes);
  if (!found) found = __libc_memalign(alignment, bytes);
  if (!found) return ENOMEM;
  *memory = found;
  return 0;
}

void free(void* memory) {
  const auto at = reinterpret_cast<uintptr_t>(memory);
  if (space == 0 || at < space || at >= space + kSpace) return __libc_free(memory);
  const uintptr_t first = at / kPage * kPage, start = first - 2 * kPage;
  const size_t whole = *reinterpret_cast<size_t*>(start) + 2 * kPage;
  madvise(reinterpret_cast<void*>(start), whole, MADV_DONTNEED);
  mprotect(reinterpret_cast<void*>(start), whole, PROT_NONE);
}
}
