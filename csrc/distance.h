// The distance kernel's contract: distances between n points relative to their mean, student's against teacher's, from
// squared distances, with the gradient. kd_kernels/rows.py (DistanceJob) states the same.
#pragma once
#include <cstdint>

#include "rows.h"

namespace kd {

constexpr int kDistancePadding = 8;  // `ld` is a multiple of it

// What stands in Distance::numbers; the shifts are sum(slope x) / (how many x != 0).
enum DistanceNumber { kBeta, kEps, kStudentMean, kTeacherMean, kStudentShift, kTeacherShift };

// Matrices are [n, ld], of squared distances s. The distance d is 0 where s < 0, which says that there is no pair
// (columns from n on are such), sqrt(eps) where 0 <= s <= eps, and sqrt(s) elsewhere, also where s is NaN. With
// x = d / mean, h the smooth L1 of student's less teacher's x and slope its derivative,
//   kStatistics writes of each row to statistics [4, n]: sum d, how many d != 0; of the student, then the teacher;
//   kTerms writes of each row to terms [3, n]: sum h, sum slope x of the student, sum slope x of the teacher;
//   kGradient writes the derivatives of the sum of all h with respect to s, through the means, s_ij and s_ji as two
//   variables: of the student (slope - shift) / (2 mean d) where d = sqrt(s), else 0; of the teacher less the same.
struct Distance {
  int64_t n = 0;
  int64_t ld = 0;
  const double* numbers = nullptr;
  const double* student = nullptr;
  const double* teacher = nullptr;
  double* statistics = nullptr;
  double* terms = nullptr;
  double* student_grad = nullptr;  // null: not wanted; columns from n on become 0
  double* teacher_grad = nullptr;
  int threads = 1;
};

// Runs the phases one after the other: between two of them the caller fills in `numbers`. Results do not depend on
// `threads`.
void distance(const Distance& args, unsigned phases);

}  // namespace kd
