// The whole test framework of the native tests. A test file defines any number of
//
//   TEST(name) { EXPECT(condition); EXPECT_EQ(found, expected); EXPECT_THROWS(expression, Type); }
//
// and ends with TEST_MAIN(). Every test runs, a failed check goes on with the next one, and the
// process exits with 1 if any check failed or a test threw. A framework from outside was rejected:
// torch ships none, and three macros do not pay for a download at configure time. They are not
// named CHECK because torch's own headers define that.
#pragma once

#include <cstdio>
#include <exception>
#include <iostream>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};

// Filled before main() by the objects that TEST defines. Static, never freed.
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

// Counted by the thread that runs the tests; checks made by other threads would race.
inline int& failures() {
  static int count = 0;
  return count;
}

inline std::ostream& fail(const char* file, int line) {
  ++failures();
  return std::cerr << file << ':' << line << ": ";
}

template <typename Found, typename Expected>
void equal(const Found& found, const Expected& expected, const char* text, const char* file,
           int line) {
  if (!(found == expected)) {
    fail(file, line) << text << ": found " << found << ", expected " << expected << '\n';
  }
}

inline int run() {
  if (tests().empty()) {
    std::cerr << "no tests in this file\n";
    return 1;
  }
  for (const Test& test : tests()) {
    const int before = failures();
    try {
      test.body();
    } catch (const std::exception& error) {
      fail(test.name, 0) << "threw " << error.what() << '\n';
    } catch (...) {
      fail(test.name, 0) << "threw something that is no std::exception\n";
    }
    std::cout << (failures() == before ? "ok      " : "FAILED  ") << test.name << '\n';
  }
  return failures() == 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                   \
  static void test_##name();                                         \
  static const check::Register register_##name(#name, &test_##name); \
  static void test_##name()

#define EXPECT(condition)                                                    \
  do {                                                                       \
    if (!(condition)) check::fail(__FILE__, __LINE__) << #condition << '\n'; \
  } while (false)

#define EXPECT_EQ(found, expected) \
  check::equal((found), (expected), #found " == " #expected, __FILE__, __LINE__)

#define EXPECT_THROWS(expression, Type)                                                       \
  do {                                                                                        \
    bool thrown = false;                                                                      \
    try {                                                                                     \
      (void)(expression);                                                                     \
    } catch (const Type&) {                                                                   \
      thrown = true;                                                                          \
    }                                                                                         \
    if (!thrown) check::fail(__FILE__, __LINE__) << #expression " did not throw " #Type "\n"; \
  } while (false)

#define TEST_MAIN() \
  int main() { return check::run(); }
