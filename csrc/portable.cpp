// What is called of the C and C++ libraries that glibc 2.28 and the libstdc++ of GCC 8, on which wheels have to run, do
// not have. Compiled into wheels only; CMakeLists.txt names the functions that the linker replaces by those of here.

#include <new>
#include <sstream>
#include <string>

// Since GCC 9 and 11 the C++ library has these instances ready, so that nobody else makes them.
template std::ostringstream::basic_ostringstream();
template std::string std::stringbuf::str() const&;

#define MTLK_HIDDEN(name) __asm__(name) __attribute__((visibility("hidden")))
#define MTLK_OF(version, name, own) __asm__(".symver " #own "," #name "@" version)

extern "C" {

// Since glibc 2.29 and 2.34 these have versions of their own, of which nothing is used.
MTLK_OF("GLIBC_2.2.5", exp, mtlk_old_exp);
MTLK_OF("GLIBC_2.2.5", pthread_once, mtlk_old_pthread_once);
double mtlk_old_exp(double);
int mtlk_old_pthread_once(int*, void (*)());
double __wrap_exp(double x) { return mtlk_old_exp(x); }
int __wrap_pthread_once(int* control, void (*function)()) { return mtlk_old_pthread_once(control, function); }

// Of glibc 2.32, by which counters of references are spared atomic operations; false is right at any time.
extern char mtlk_single_threaded MTLK_HIDDEN("__libc_single_threaded");
char mtlk_single_threaded = false;

// Of GCC 11.
[[noreturn]] void mtlk_throw_bad_array_new_length() MTLK_HIDDEN("_ZSt28__throw_bad_array_new_lengthv");
void mtlk_throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// std::exception_ptr counts its references by these since GCC 11, and did it in the functions below before.
struct ExceptionPointer {
  void* object;
};
void mtlk_copy(ExceptionPointer*, const ExceptionPointer*) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void mtlk_destroy(ExceptionPointer*) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
void mtlk_add(ExceptionPointer*) MTLK_HIDDEN("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void mtlk_release(ExceptionPointer*) MTLK_HIDDEN("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void mtlk_add(ExceptionPointer* self) {
  ExceptionPointer copy;
  mtlk_copy(&copy, self);  // which is never destroyed
}
void mtlk_release(ExceptionPointer* self) {
  mtlk_destroy(self);
  self->object = nullptr;
}
}
