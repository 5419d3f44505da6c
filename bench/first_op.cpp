// The shortest program that computes something: bench/cpu/run times the whole process, from its start to its end.
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/matmul.h>
#include <capo/ops/reduce.h>

#include <cstdio>

int main() {
  const capo::Tensor x = capo::full({64, 64}, 0.125);
  const double total = capo::sum(capo::matmul(x, x) + x).item();
  std::printf("RESULT {\"bench\":\"first_op\",\"sum\":%g}\n", total);
}
