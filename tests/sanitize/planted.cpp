// The faults of planted_faults.h for a process that has a build with a sanitizer loaded, whose pool they use.
#include "planted_faults.h"

extern "C" bool make(const char* name) { return planted::make(name); }
