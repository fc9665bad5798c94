// A library with the functions of libcublasLt that bench/cublaslt.py calls, on a CPU.  It checks what it is given and multiplies; of its
// algorithms the first is slow, the second fails, the third is not to be had, the fourth needs 1 MiB of workspace and is right, the fifth is wrong.
#include <stdint.h>
#include <string.h>
#include <unistd.h>

enum { kSuccess, kInvalid = 7, kFailed = 13, kNotSupported = 15 };
typedef struct { int compute, scale, transpose_a; } Operation;
typedef struct { int type; uint64_t rows, columns; int64_t stride; } Layout;
typedef struct { uint64_t data[8]; } Algorithm;
typedef struct { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; } Found;
static int handle, runs[5];
static Operation operations[64];
static Layout layouts[64];
static uint64_t most_workspace;
static int n_operations, n_layouts;

int fake_runs(int algorithm) { return runs[algorithm]; }

int cublasLtCreate(void** it) { return *it = &handle, kSuccess; }

int cublasLtMatmulDescCreate(void** it, int compute, int scale) {
  if (compute != 68 || scale != 0) return kInvalid;
  operations[n_operations] = (Operation){compute, scale, 0};
  return *it = &operations[n_operations++], kSuccess;
}

int cublasLtMatmulDescSetAttribute(void* it, int attribute, const void* value, size_t bytes) {
  if (attribute != 3 || bytes != sizeof(int32_t)) return kInvalid;
  return ((Operation*)it)->transpose_a = *(const int32_t*)value, kSuccess;
}

int cublasLtMatrixLayoutCreate(void** it, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  if (type != 2) return kInvalid;
  layouts[n_layouts] = (Layout){type, rows, columns, stride};
  return *it = &layouts[n_layouts++], kSuccess;
}

int cublasLtMatmulPreferenceCreate(void** it) { return *it = &most_workspace, kSuccess; }

int cublasLtMatmulPreferenceSetAttribute(void* it, int attribute, const void* value, size_t bytes) {
  if (it != &most_workspace || attribute != 1 || bytes != sizeof(uint64_t)) return kInvalid;
  return most_workspace = *(const uint64_t*)value, kSuccess;
}

static int fits(const Operation* o, const Layout* a, const Layout* b, const Layout* c, const Layout* d) {
  return o->transpose_a == 1 && a->rows == b->rows && c == d && d->rows == a->columns && d->columns == b->columns && a->stride == (int64_t)a->rows &&
         b->stride == (int64_t)b->rows && d->stride == (int64_t)d->rows;
}

int cublasLtMatmulAlgoGetHeuristic(void* h, void* o, void* a, void* b, void* c, void* d, void* preference, int most, Found* found, int* count) {
  if (h != &handle || preference != &most_workspace || most < 5 || !fits(o, a, b, c, d)) return kInvalid;
  for (uint64_t i = 0; i < 5; ++i) {
    memset(&found[i], 0, sizeof(Found));
    found[i].algorithm.data[7] = 100 + i;
    found[i].workspace = i == 3 ? 1 << 20 : 0;
    found[i].state = i == 2 ? kNotSupported : kSuccess;
    found[i].waves = 0.5f;
  }
  return *count = 5, kSuccess;
}

int cublasLtMatmul(void* h, void* o, const float* alpha, const _Float16* A, void* a, const _Float16* B, void* b, const float* beta, const _Float16* C, void* c,
                   _Float16* D, void* d, const Algorithm* algorithm, void* workspace, size_t bytes, void* stream) {
  const Layout *la = a, *lb = b;
  int number = (int)algorithm->data[7] - 100;
  if (h != &handle || *alpha != 1 || *beta != 0 || C != D || !fits(o, a, b, c, d) || stream || !workspace || bytes != most_workspace) return kInvalid;
  if (number < 0 || number > 4 || number == 2) return kInvalid;
  ++runs[number];
  if (number == 0) usleep(20000);
  if (number == 1) return kFailed;
  ((char*)workspace)[bytes - 1] = 1;
  for (uint64_t m = 0; m < lb->columns; ++m)
    for (uint64_t n = 0; n < la->columns; ++n) {
      float sum = number == 4 ? 100 : 0;
      for (uint64_t k = 0; k < la->rows; ++k) sum += (float)A[n * la->stride + k] * (float)B[m * lb->stride + k];
      D[m * la->columns + n] = (_Float16)sum;
    }
  if (number == 4) usleep(10000);
  return kSuccess;
}
