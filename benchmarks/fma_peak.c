// Float32 multiply-adds as fast as this machine does them: independent chains in vector registers, nothing else. Built and
// called by machine.py; the arithmetic floor of the tables stands on it.
#include <pthread.h>

typedef float vector __attribute__((vector_size(64)));  // the compiler splits it where registers are shorter
enum { CHAINS = 12, LANES = 16, MAX_THREADS = 256 };

typedef struct {
  long steps;
  float sum;
  char own_cache_line[128 - sizeof(long) - sizeof(float)];
} job;

static void* work(void* argument) {
  job* j = argument;
  vector x[CHAINS];
  const vector a = (vector){} + 0.999f, b = (vector){} + 1e-3f;
  for (int i = 0; i < CHAINS; i++) x[i] = (vector){} + (float)(i + 2);  // 1 would be a fixed point, folded away
  for (long step = 0; step < j->steps; step++) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++) x[i] = x[i] * a + b;
  }
  vector sum = x[0];
  for (int i = 1; i < CHAINS; i++) sum += x[i];
  j->sum = sum[0];
  return 0;
}

// Each thread does `steps` times CHAINS vectors; returns the number of multiply-adds done in all.
double multiply_adds(int threads, long steps) {
  pthread_t ids[MAX_THREADS];
  job jobs[MAX_THREADS];
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  for (int i = 0; i < threads; i++) jobs[i].steps = steps;
  for (int i = 1; i < threads; i++) pthread_create(&ids[i], 0, work, &jobs[i]);
  work(&jobs[0]);
  for (int i = 1; i < threads; i++) pthread_join(ids[i], 0);
  return (double)threads * steps * CHAINS * LANES;
}
