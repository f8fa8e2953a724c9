// The whole test framework: CHECK counts, prints and goes on; finish() is main's result.
#pragma once
#include <cstdio>

namespace check {

inline int& failures() {
  static int count = 0;
  return count;
}

inline int& checks() {
  static int count = 0;
  return count;
}

inline int finish() {
  std::printf("%d checks, %d failures\n", checks(), failures());
  return failures() == 0 ? 0 : 1;
}

}  // namespace check

// The message says which case failed, printf-like.
#define CHECK(condition, ...)                                     \
  do {                                                            \
    ++check::checks();                                            \
    if (!(condition) && ++check::failures() <= 20) {              \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)
