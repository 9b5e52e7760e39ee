// Refusing arguments: errors that are a ValueError or a TypeError to Python, and that the direct way tells apart from
// those of anything that goes wrong.
#pragma once

#include <c10/util/Exception.h>

#include <string>

#include "runtime/api.h"

namespace mtlk {

// The common base of what the checks throw.
class MTLK_API Refused {
 public:
  virtual ~Refused() = default;
};

template <typename Error>
class MTLK_API RefusedAs : public Error, public Refused {
 public:
  using Error::Error;
};

template <typename Error>
[[noreturn]] void refuse(const char* function, const char* file, uint32_t line, const std::string& message) {
  throw RefusedAs<Error>({function, file, line}, "mtlkernels: " + message);
}

}  // namespace mtlk

#define MTLK_CHECK_AS(error, holds, ...) \
  if (C10_UNLIKELY(!(holds)))            \
  ::mtlk::refuse<error>(__func__, __FILE__, static_cast<uint32_t>(__LINE__), ::c10::str(__VA_ARGS__))
#define MTLK_CHECK_VALUE(holds, ...) MTLK_CHECK_AS(::c10::ValueError, holds, __VA_ARGS__)
#define MTLK_CHECK_TYPE(holds, ...) MTLK_CHECK_AS(::c10::TypeError, holds, __VA_ARGS__)
