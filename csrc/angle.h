// The angle kernel's contract: all angles between n points, student's against teacher's, from squared distances
// alone, with the gradient; the n^3 terms stay in registers. kd_kernels/rows.py (AngleJob) states the same.
#pragma once
#include <cstdint>

namespace kd {

constexpr int kAnglePadding = 8;  // `ld` is a multiple of it

// With s squared distances and r inverse ones, the cosine at the vertex i of the edges to j and k is
// (s_ij + s_ik - s_jk) r_ij r_ik / 2; h is the smooth L1 of student's less teacher's. An edge without length has
// r = 0, which makes its cosines 0 and silences its gradients. Matrices are [n, ld]; columns from n on are 0.
struct Angle {
  int64_t n = 0;
  int64_t ld = 0;
  double beta = 1.0;  // > 0
  const double* student = nullptr;
  const double* student_inverse = nullptr;
  const double* teacher = nullptr;
  const double* teacher_inverse = nullptr;
  double* sums = nullptr;  // [n] over all i and k of h(i; j, k)
  // Of the sum of all h with respect to s, s_ij and s_ji as two variables; null: not wanted. Columns from n on may
  // hold anything afterwards.
  double* student_grad = nullptr;
  double* teacher_grad = nullptr;
  int threads = 1;
};

// Results do not depend on `threads`.
void angle(const Angle& args);

}  // namespace kd
