// gemm_bf16 against a double reference, for ragged shapes, every stride combination and padded rows. Buffers are
// of the exact size and on the heap, so that a sanitizer sees any access outside them.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../gemm.h"

namespace {

using i64 = int64_t;

int failures = 0;

void fail(const std::string& what) {
  if (++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

uint32_t random_bits() {
  static uint64_t state = 0x9e3779b97f4a7c15u;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}

float random_value() { return static_cast<float>(random_bits() % 20001) / 5000.0f - 2.0f; }

uint16_t to_bf16(float x) {  // truncated: any bfloat16 will do
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A matrix whose rows or columns lie `pad` elements further apart than they need, and which ends with its last
// element. It begins 2 bytes off what the allocator aligns to.
struct Matrix {
  i64 rows, cols, row, col;
  std::unique_ptr<uint16_t[]> memory;
  Matrix(i64 rows_, i64 cols_, bool row_major, i64 pad) : rows(rows_), cols(cols_) {
    row = row_major ? cols + pad : 1;
    col = row_major ? 1 : rows + pad;
    const i64 count = rows && cols ? (rows - 1) * row + (cols - 1) * col + 1 : 0;
    memory.reset(new uint16_t[static_cast<size_t>(count + 1)]);
    const uint16_t nan = to_bf16(std::numeric_limits<float>::quiet_NaN());
    for (i64 i = 0; i <= count; ++i) memory[i] = nan;  // so that a padding element read is an output spoilt
    for (i64 i = 0; i < rows; ++i)
      for (i64 j = 0; j < cols; ++j) at(i, j) = to_bf16(random_value());
  }
  uint16_t* data() const { return memory.get() + 1; }
  uint16_t& at(i64 i, i64 j) const { return data()[i * row + j * col]; }
};

struct Output {
  i64 rows, cols, ldc, size;
  std::unique_ptr<float[]> data;
  Output(i64 rows_, i64 cols_, i64 pad) : rows(rows_), cols(cols_), ldc(cols_ + pad) {
    size = rows && cols ? (rows - 1) * ldc + cols : 0;
    data.reset(new float[static_cast<size_t>(size)]);
    for (i64 i = 0; i < size; ++i) data[i] = static_cast<float>(i % 251) - 125.0f;
  }
};

void multiply(const Matrix& a, const Matrix& b, const Output& c, bool accumulate, int threads) {
  kd::GemmBf16 g;
  g.m = a.rows, g.n = b.cols, g.k = a.cols;
  g.a = a.data(), g.a_row = a.row, g.a_col = a.col;
  g.b = b.data(), g.b_row = b.row, g.b_col = b.col;
  g.c = c.data.get(), g.ldc = c.ldc;
  g.accumulate = accumulate, g.threads = threads;
  kd::gemm_bf16(g);
}

std::string name(i64 m, i64 n, i64 k, int form, const char* what) {
  return std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k) + " form " + std::to_string(form) +
         ": " + what;
}

// Bits of `form`: a row-major, b row-major, accumulate, padded leading dimensions.
void check(i64 m, i64 n, i64 k, int form) {
  const bool accumulate = form & 4;
  const i64 pad = form & 8 ? 3 : 0;
  const Matrix a(m, k, form & 1, pad), b(k, n, form & 2, pad);
  const Output before(m, n, pad), c(m, n, pad), again(m, n, pad);
  multiply(a, b, c, accumulate, 1);
  for (i64 i = 0; i < m; ++i) {
    for (i64 j = 0; j < n; ++j) {
      double sum = accumulate ? before.data[i * c.ldc + j] : 0.0, scale = std::abs(sum);
      for (i64 p = 0; p < k; ++p) {
        const double product = static_cast<double>(from_bf16(a.at(i, p))) * from_bf16(b.at(p, j));
        sum += product;
        scale += std::abs(product);
      }
      if (!(std::abs(c.data[i * c.ldc + j] - sum) <= 4e-6 * scale)) return fail(name(m, n, k, form, "wrong value"));
    }
    for (i64 j = n; n > 0 && j < c.ldc && i + 1 < m; ++j)
      if (c.data[i * c.ldc + j] != before.data[i * c.ldc + j]) return fail(name(m, n, k, form, "wrote between rows"));
  }
  for (const int threads : {2, 3, 7}) {
    std::memcpy(again.data.get(), before.data.get(), static_cast<size_t>(c.size) * 4);
    multiply(a, b, again, accumulate, threads);
    if (std::memcmp(again.data.get(), c.data.get(), static_cast<size_t>(c.size) * 4) != 0)
      fail(name(m, n, k, form, "depends on the number of threads"));
  }
}

void check_ragged() {
  const i64 sizes[] = {1, 2, 5, 13, 14, 15, 16, 17, 29, 31, 32, 33, 47, 64, 65, 85, 97, 129};
  for (const i64 m : sizes)
    for (const i64 n : sizes) {
      const i64 k = 1 + random_bits() % 100;
      check(m, n, k, static_cast<int>(random_bits() % 16));
    }
  for (i64 k = 1; k <= 70; ++k)
    for (int form = 0; form < 16; ++form) check(1 + random_bits() % 40, 1 + random_bits() % 80, k, form);
}

// Several depth blocks, column blocks, blocks of rows.
void check_large() {
  for (int form = 0; form < 16; ++form) {
    check(31, 35, 1024 + form, form);
    check(3, 37, 5000 + form, form);
    check(200 + form, 70, 33, form);
  }
  for (int form = 0; form < 4; ++form) {
    check(5, 1100 + form, 1023, form);  // more columns than are packed at once
    check(7, 100, 10241, form | 8);     // more depth than is packed at once
    check(20, 3, 2050 * form + 1, form | 4);
  }
}

void check_empty() {
  for (int form = 0; form < 16; ++form) {
    check(0, 5, 7, form);
    check(5, 0, 7, form);
    check(5, 7, 0, form);
    check(0, 0, 0, form);
  }
}

// A number that is not finite reaches its own row or column of c and no other element, also across the pair that
// an odd depth leaves half empty.
void check_isolation(i64 m, i64 n, i64 k, int form, float bad) {
  const Matrix a(m, k, form & 1, 1), b(k, n, form & 2, 1);
  const Output clean(m, n, 0), c(m, n, 0), d(m, n, 0);
  multiply(a, b, clean, false, 1);
  const i64 row = random_bits() % m, col = random_bits() % n, p = random_bits() % 2 ? k - 1 : random_bits() % k;
  const uint16_t kept = a.at(row, p);
  a.at(row, p) = to_bf16(bad);
  multiply(a, b, c, false, 2);
  a.at(row, p) = kept;
  b.at(p, col) = to_bf16(bad);
  multiply(a, b, d, false, 2);
  for (i64 i = 0; i < m; ++i)
    for (i64 j = 0; j < n; ++j) {
      const i64 at = i * n + j;
      if (i == row ? std::isfinite(c.data[at]) : c.data[at] != clean.data[at])
        return fail(name(m, n, k, form, "a value in a that is not finite"));
      if (j == col ? std::isfinite(d.data[at]) : d.data[at] != clean.data[at])
        return fail(name(m, n, k, form, "a value in b that is not finite"));
    }
}

// A row or column is the same wherever it stands among others.
void check_position() {
  const i64 m = 101, n = 75, k = 1301;
  const Matrix a(m, k, true, 0), b(k, n, true, 0);
  const Output all(m, n, 0);
  multiply(a, b, all, false, 2);
  for (const i64 first : {1, 13, 90}) {
    const Output part(m - first, n - 7, 0);
    kd::GemmBf16 g;
    g.m = m - first, g.n = n - 7, g.k = k;
    g.a = a.data() + first * a.row, g.a_row = a.row, g.a_col = 1;
    g.b = b.data() + 7, g.b_row = b.row, g.b_col = 1;
    g.c = part.data.get(), g.ldc = part.ldc;
    kd::gemm_bf16(g);
    for (i64 i = first; i < m; ++i)
      if (std::memcmp(&part.data[(i - first) * part.ldc], &all.data[i * n + 7], static_cast<size_t>(n - 7) * 4) != 0)
        return fail("depends on position, from row " + std::to_string(first));
  }
}

}  // namespace

int main() {
  if (!kd::gemm_bf16_available()) {
    std::printf("skipped: no AVX512_BF16\n");
    return 77;
  }
  check_empty();
  check_ragged();
  check_large();
  check_position();
  for (int form = 0; form < 4; ++form)
    for (i64 k = 1; k < 40; ++k) {
      check_isolation(20, 40, k, form, std::numeric_limits<float>::quiet_NaN());
      check_isolation(15, 33, k, form, std::numeric_limits<float>::infinity());
    }
  if (failures)
    std::printf("%d failures\n", failures);
  else
    std::printf("gemm_bf16: passed\n");
  return failures ? 1 : 0;
}
