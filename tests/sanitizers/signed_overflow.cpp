// Must be stopped by UndefinedBehaviorSanitizer.
#include <cstdio>
#include <limits>

int main(int argc, char**) {
  volatile int big = std::numeric_limits<int>::max();
  std::printf("not noticed: %d\n", big + argc);
}
