/* Runs one kernel on tensors from a file, and writes its outputs: what a kernel needs of TVM's runtime, in plain C.

   Usage: driver ARGUMENTS RESULTS

   ARGUMENTS: int64 tensors, int64 outputs (the last of the tensors), int64 sizes; for each tensor int64 bytes and its data;
   for each size its int64. RESULTS: the data of the outputs. Parallel loops run as three tasks, one after the other. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct { int32_t type, padding; int64_t value; } any; /* TVMFFIAny */
typedef struct { void *data; int32_t device[2]; int32_t rank; uint8_t code, bits; uint16_t lanes; int64_t *shape, *strides; uint64_t offset; } tensor; /* DLTensor */
typedef struct { void *sync; int32_t tasks; } group;

enum { NONE = 0, INTEGER = 1, TENSOR = 7, CPU = 1, TASKS = 3 };

int KERNEL(void *self, any *args, int32_t count, any *result);

static int launch(int (*body)(int, group *, void *), void *closure, int tasks) {
  group env = {0, tasks > 0 ? tasks : TASKS};
  for (int i = 0; i < env.tasks; i++)
    if (body(i, &env, closure)) return -1;
  return 0;
}

void *__TVMBackendParallelLaunch = launch;

static void *allocate(int kind, int device, uint64_t bytes, int code, int bits) {
  return aligned_alloc(64, (bytes + 127) / 64 * 64);
}
static int release(int kind, int device, void *p) { free(p); return 0; }
void *__TVMBackendAllocWorkspace = allocate;
void *__TVMBackendFreeWorkspace = release;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; i++) fputs(parts[i], stderr);
}

static int64_t number(FILE *f) {
  int64_t n = 0;
  if (fread(&n, sizeof n, 1, f) != 1) exit(3);
  return n;
}

int main(int argc, char **argv) {
  FILE *in = argc == 3 ? fopen(argv[1], "rb") : 0, *out = argc == 3 ? fopen(argv[2], "wb") : 0;
  if (!in || !out) return 2;
  int64_t tensors = number(in), outputs = number(in), sizes = number(in), bytes[64];
  any args[64], result = {NONE, 0, 0};
  static tensor all[64];
  for (int i = 0; i < tensors; i++) {
    bytes[i] = number(in);
    /* data lies as an element needs it, and no better: a kernel must not count on more */
    all[i] = (tensor){(char *)allocate(CPU, 0, bytes[i] + 8, 0, 0) + 8, {CPU, 0}};
    if (fread(all[i].data, 1, bytes[i], in) != (size_t)bytes[i]) return 3;
    args[i] = (any){TENSOR, 0, (int64_t)&all[i]};
  }
  for (int i = 0; i < sizes; i++) args[tensors + i] = (any){INTEGER, 0, number(in)};
  if (KERNEL(0, args, tensors + sizes, &result)) return 4;
  for (int i = tensors - outputs; i < tensors; i++) fwrite(all[i].data, 1, bytes[i], out);
  return fclose(out) ? 5 : 0;
}
