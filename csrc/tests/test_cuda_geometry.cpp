// How rows are laid over a GPU, for vocabularies from 1 to 2^20: everything is covered, nothing exceeds the device.
#include "../cuda/geometry.h"
#include "check.h"

namespace {

using namespace kd;
using namespace kd::cuda;

constexpr unsigned kAll = kStatistics | kTerms | kGradient;
const Device kHopper{9, 232448, 233472, 1024}, kAmpere{8, 166912, 167936, 1024};

RowDivergence job(int64_t vocab, Dtype student, Dtype teacher) {
  RowDivergence result;
  result.n = 4096;
  result.vocab = vocab;
  result.student.dtype = student;
  result.teacher.dtype = teacher;
  return result;
}

void check_vocabulary(int64_t vocab, Dtype student, Dtype teacher) {
  const RowDivergence call = job(vocab, student, teacher);
  const Geometry all = geometry(call, kAll, kHopper);
  const int v = static_cast<int>(vocab);
  CHECK(all.width * all.ranks >= vocab, "V=%d: %d blocks leave some of it out", v, all.ranks);
  CHECK(all.width % kSliceMultiple == 0, "V=%d: slices of %d", v, int(all.width));
  CHECK(all.shared_bytes <= kHopper.shared_bytes, "V=%d: %d bytes", v, int(all.shared_bytes));
  CHECK(all.ranks >= 1 && all.ranks <= kMostRanks && (all.ranks & (all.ranks - 1)) == 0, "V=%d", v);
  CHECK(all.rows * all.ranks < int64_t{1} << 31 && all.rows > 0, "V=%d: a grid too large", v);
  if (all.held) {
    const int64_t student_bytes = all.width * bytes_of(student), teacher_bytes = all.width * bytes_of(teacher);
    CHECK(all.student_bytes % 16 == 0 && all.student_bytes >= student_bytes + 15, "V=%d: room of the student", v);
    CHECK(all.shared_bytes >= kScratchBytes + all.student_bytes + teacher_bytes + 15, "V=%d: of the teacher", v);
    if (all.ranks > 1) {
      const Geometry fewer = cut(call, all.ranks / 2);
      CHECK(fewer.shared_bytes > (kHopper.shared_of_all / 2 - 1024), "V=%d: %d blocks would do", v, all.ranks / 2);
    }
  } else {
    CHECK(all.ranks == 1 && all.shared_bytes == kScratchBytes, "V=%d: not held", v);
  }
  for (unsigned phases : {unsigned{kStatistics}, unsigned{kTerms}, unsigned{kGradient}, kStatistics | kTerms}) {
    const Geometry apart = geometry(call, phases, kHopper);
    CHECK(apart.ranks == all.ranks && apart.width == all.width, "V=%d: other sums in phase %u", v, phases);
    CHECK(!apart.held || (phases & (phases - 1)), "V=%d: holds what is read once", v);
  }
  const Geometry older = geometry(call, kAll, kAmpere);
  CHECK(!older.held && older.ranks == 1 && older.width >= vocab, "V=%d on sm_80", v);
}

void test_vocabularies() {
  const Dtype dtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float64};
  for (Dtype student : dtypes)
    for (Dtype teacher : dtypes)
      for (int64_t vocab = 1; vocab <= int64_t{1} << 20; vocab += vocab < 4096 ? 1 : 911)
        check_vocabulary(vocab, student, teacher);
}

void test_known_ones() {
  const struct {
    int64_t vocab;
    Dtype dtype;
    int ranks;
    bool held;
  } known[] = {
      {1, Dtype::bfloat16, 1, true},       {32000, Dtype::bfloat16, 2, true},   {128256, Dtype::bfloat16, 8, true},
      {151936, Dtype::bfloat16, 8, true},  {262144, Dtype::bfloat16, 16, true}, {32000, Dtype::float32, 4, true},
      {128256, Dtype::float32, 16, true},  {151936, Dtype::float32, 16, true},  {262144, Dtype::float32, 16, true},
      {463104, Dtype::float32, 16, true},  {463232, Dtype::float32, 1, false},  {926208, Dtype::bfloat16, 16, true},
      {926336, Dtype::bfloat16, 1, false}, {1 << 20, Dtype::float32, 1, false}, {1000, Dtype::float64, 1, false},
  };
  for (const auto& k : known) {
    const Geometry found = geometry(job(k.vocab, k.dtype, k.dtype), kAll, kHopper);
    CHECK(found.ranks == k.ranks && found.held == k.held, "V=%d: %d blocks, held %d", int(k.vocab), found.ranks,
          found.held);
  }
}

}  // namespace

int main() {
  test_vocabularies();
  test_known_ones();
  return check::finish();
}
