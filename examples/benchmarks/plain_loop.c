/* The floor of benchmark.py: an optimizer's step as one would write it in C, without a library around it.
 *
 *     cc -O3 -march=native -fno-math-errno -fopenmp -shared -fPIC plain_loop.c -o plain_loop.so
 *
 * The arrays w, m, v and g point to the variables' weights, moments and gradients, sizes says how many float32s
 * each has. Of a step's numbers, share_1 and share_2 are 1 - beta; the others make the direction
 * (momentum m + gradient g) / (sqrt(v) + epsilon), the bias corrections in them. The compiler vectorises the loops,
 * OpenMP deals their iterations to the threads.
 */
#include <math.h>

typedef struct {
  float share_1, share_2, momentum, gradient, epsilon, decay, rate;
} Step;

/* 28 bytes a parameter: read w, m, v, g, write w, m, v. */
void adamw(int count, const long *sizes, float **w, float **m, float **v, float **g, const Step *s) {
  const Step c = *s;
#pragma omp parallel
  for (int k = 0; k < count; ++k) {
    float *restrict wk = w[k], *restrict mk = m[k], *restrict vk = v[k];
    const float *restrict gk = g[k];
#pragma omp for simd schedule(static) nowait
    for (long i = 0; i < sizes[k]; ++i) {
      mk[i] += c.share_1 * (gk[i] - mk[i]);
      vk[i] += c.share_2 * (gk[i] * gk[i] - vk[i]);
      wk[i] -= c.momentum * mk[i] / (sqrtf(vk[i]) + c.epsilon) + c.decay * wk[i];
    }
  }
}

/* The same bytes, and the gradient in the direction. */
void qhadamw(int count, const long *sizes, float **w, float **m, float **v, float **g, const Step *s) {
  const Step c = *s;
#pragma omp parallel
  for (int k = 0; k < count; ++k) {
    float *restrict wk = w[k], *restrict mk = m[k], *restrict vk = v[k];
    const float *restrict gk = g[k];
#pragma omp for simd schedule(static) nowait
    for (long i = 0; i < sizes[k]; ++i) {
      mk[i] += c.share_1 * (gk[i] - mk[i]);
      vk[i] += c.share_2 * (gk[i] * gk[i] - vk[i]);
      wk[i] -= (c.momentum * mk[i] + c.gradient * gk[i]) / (sqrtf(vk[i]) + c.epsilon) + c.decay * wk[i];
    }
  }
}

/* LAMB's first pass, 24 bytes a parameter: new moments, and the squared norms of w and u. */
static void moments(long begin, long end, const float *restrict w, float *restrict m, float *restrict v,
                    const float *restrict g, Step c, double *w_squares, double *u_squares) {
  double ww = 0, uu = 0;
#pragma omp simd reduction(+ : ww, uu)
  for (long i = begin; i < end; ++i) {
    m[i] += c.share_1 * (g[i] - m[i]);
    v[i] += c.share_2 * (g[i] * g[i] - v[i]);
    const float u = c.momentum * m[i] / (sqrtf(v[i]) + c.epsilon) + c.decay * w[i];
    ww += (double)w[i] * w[i];
    uu += (double)u * u;
  }
  *w_squares = ww;
  *u_squares = uu;
}

/* LAMB's second pass, 16 bytes: the same u again, now that the trust ratio is known. */
static void weights(long begin, long end, float *restrict w, const float *restrict m, const float *restrict v, Step c,
                    double w_squares, double u_squares) {
  const float step = c.rate * (w_squares > 0 && u_squares > 0 ? sqrt(w_squares / u_squares) : 1);
#pragma omp simd
  for (long i = begin; i < end; ++i) w[i] -= step * (c.momentum * m[i] / (sqrtf(v[i]) + c.epsilon) + c.decay * w[i]);
}

#define LARGE 65536 /* elements: a variable that all threads share */
#define PIECE 16384

void lamb(int count, const long *sizes, float **w, float **m, float **v, float **g, const Step *s) {
  const Step c = *s;
#pragma omp parallel
  {
#pragma omp for schedule(dynamic) nowait
    for (int k = 0; k < count; ++k) { /* a small variable: one thread, both passes while it is in the cache */
      double ww, uu;
      if (sizes[k] >= LARGE) continue;
      moments(0, sizes[k], w[k], m[k], v[k], g[k], c, &ww, &uu);
      weights(0, sizes[k], w[k], m[k], v[k], c, ww, uu);
    }
  }
  for (int k = 0; k < count; ++k) { /* a large one: all threads, pass after pass */
    const long size = sizes[k], pieces = (size + PIECE - 1) / PIECE;
    double ww = 0, uu = 0;
    if (size < LARGE) continue;
#pragma omp parallel for schedule(static) reduction(+ : ww, uu)
    for (long p = 0; p < pieces; ++p) {
      const long begin = p * PIECE, end = begin + PIECE < size ? begin + PIECE : size;
      double a, b;
      moments(begin, end, w[k], m[k], v[k], g[k], c, &a, &b);
      ww += a;
      uu += b;
    }
#pragma omp parallel for schedule(static)
    for (long p = 0; p < pieces; ++p) {
      const long begin = p * PIECE, end = begin + PIECE < size ? begin + PIECE : size;
      weights(begin, end, w[k], m[k], v[k], c, ww, uu);
    }
  }
}
