// What libmtlkernels.so lets others use: the Python module _C.
#pragma once

#define MTLK_API __attribute__((visibility("default")))
