// Exact attention of each token to its listed neighbors, forward and backward, on the CPU.
//
// The lists (neighbors.py) are read at run time, so one build of this file serves every mask, shape
// and head dim. All arithmetic is fp32. Every sum gathers in a fixed order: the result depends
// neither on the number of threads nor on which of them comes first.
//
// How it gets fast:
//   - The unit of work is two heads (or one) of an image. Their rows are copied into dense fp32
//     buffers shortly before they are used, which also converts bf16 and takes any strides.
//   - The scores of many queries are computed together, L edges at a time, whatever query they
//     belong to: short neighbor lists fill whole vectors.
//   - The backward pass handles a key as soon as its last query is done, while both are in cache.
//   - Large results are written past the caches, which saves reading what they replace.
//
// Notation: B images, T tokens, H heads, D head dim. An edge is a pair (query, key).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#ifdef __SSE__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

// What to compute. Strides are in elements; the last dimension, D, is contiguous.
// native.py passes it as an array of 8-byte integers, in this order.
struct Array {  // [B, T, H, D]
  void* data;
  int64_t batch, token, head;
};

struct Job {
  Array q, k, v, out;           // forward
  Array grad, dq, dk, dv;       // backward: gradients of out and of the inputs
  float* p;                     // probabilities [B, H, edges] and PADDING more, or null: not kept
  const int32_t* lists;         // see Lists
  int64_t B, T, H, D, edges, threads;
  int64_t is_bf16, is_backward;
};
static_assert(sizeof(Job) == 8 * 42, "native.py has NUM_FIELDS = 42");

namespace {

// -------------------------------------------------------------------------------------------------
// Vectors of L floats, as extensions that both GCC and clang have

#if defined(__AVX512F__)
constexpr int L = 16;
#elif defined(__AVX__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

typedef float vec __attribute__((vector_size(4 * L)));
typedef int32_t ivec __attribute__((vector_size(4 * L)));
typedef float unaligned __attribute__((vector_size(4 * L), aligned(4), may_alias));

inline vec load(const float* from) { return *(const unaligned*)from; }
inline void store(float* to, vec x) { *(unaligned*)to = x; }

// Past the caches, so that a line need not be read before it is overwritten; `to` is aligned.
inline void stream(float* to, vec x) {
#if defined(__clang__)
  __builtin_nontemporal_store(x, (vec*)to);
#elif defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)x);
#elif defined(__AVX__)
  _mm256_stream_ps(to, (__m256)x);
#else
  store(to, x);
#endif
}
// What a thread has streamed becomes visible to the others.
inline void finish_streams() {
#ifdef __SSE__
  _mm_sfence();
#endif
}

inline vec splat(float x) { return x - vec{}; }
inline vec max(vec a, vec b) { return a > b ? a : b; }

// Lane i of the result is lane from(i) of a, or, from L on, lane from(i) - L of b.
template <class From, int... i>
inline vec shuffle(vec a, vec b, std::integer_sequence<int, i...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, From::lane(i)...);
#else
  return __builtin_shuffle(a, b, ivec{From::lane(i)...});
#endif
}
template <class From>
inline vec shuffle(vec a, vec b) {
  return shuffle<From>(a, b, std::make_integer_sequence<int, L>());
}

// Blocks of W lanes: the even ones of a and of b in turn, or the odd ones.
template <int W> struct EvenBlocks {
  static constexpr int lane(int i) { return i / W % 2 * (L - W) + i; }
};
template <int W> struct OddBlocks {
  static constexpr int lane(int i) { return i / W % 2 * (L - W) + i + W; }
};
template <int W> struct Rotated {
  static constexpr int lane(int i) { return (i + W) % L; }
};

// Lane i of the result is the sum over the lanes of x[i]; overwrites x.
template <int W = L / 2>
__attribute__((always_inline)) inline vec add_lanes(vec* x) {
  for (int i = 0; i < W; ++i) {
    const vec a = x[i], b = x[i + W];
    x[i] = shuffle<EvenBlocks<W>>(a, b) + shuffle<OddBlocks<W>>(a, b);
  }
  if constexpr (W > 1) return add_lanes<W / 2>(x);
  return x[0];
}

// All lanes of the result are the largest lane of x, or the sum of its lanes.
template <int W = L / 2>
inline vec largest_lane(vec x) {
  x = max(x, shuffle<Rotated<W>>(x, x));
  if constexpr (W > 1) return largest_lane<W / 2>(x);
  return x;
}
template <int W = L / 2>
inline vec sum_of_lanes(vec x) {
  x += shuffle<Rotated<W>>(x, x);
  if constexpr (W > 1) return sum_of_lanes<W / 2>(x);
  return x;
}

// x in the first n lanes, `other` in the rest.
inline vec first_lanes(vec x, int64_t n, float other) {
  ivec lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  return lane < ivec{} + (int32_t)n ? x : splat(other);
}

// 2 ** x for x <= 0; NaN stays NaN. The polynomial is that of Cephes' exp2f (S. Moshier, 1992).
inline vec exp2(vec x) {
  x = x < splat(-126.f) ? splat(-126.f) : x;
  const vec magic = splat(12582912.f);  // 1.5 * 2**23: adding it rounds to an integer
  const vec rounded = x + magic;
  const vec f = x - (rounded - magic);  // in [-1/2, 1/2]
  vec y = splat(1.535336188319500e-4f);
  y = y * f + 1.339887440266574e-3f;
  y = y * f + 9.618437357674640e-3f;
  y = y * f + 5.550332471162809e-2f;
  y = y * f + 2.402264791363012e-1f;
  y = y * f + 6.931472028550421e-1f;
  y = y * f + 1.f;
  const ivec power = ((ivec)rounded - (ivec)magic + 127) << 23;
  return y * (vec)power;
}

// -------------------------------------------------------------------------------------------------
// Elements

struct bf16 {
  uint16_t bits;
};

inline void read_row(float* __restrict to, const float* __restrict from, int64_t n) {
  for (int64_t c = 0; c < n; ++c) to[c] = from[c];
}
inline void read_row(float* __restrict to, const bf16* __restrict from, int64_t n) {
  uint32_t* __restrict bits = (uint32_t*)to;
  for (int64_t c = 0; c < n; ++c) bits[c] = (uint32_t)from[c].bits << 16;
}
inline void write_row(float* __restrict to, const float* __restrict from, int64_t n) {
  for (int64_t c = 0; c < n; ++c) to[c] = from[c];
}
inline void write_row(bf16* __restrict to, const float* __restrict from, int64_t n) {
  const uint32_t* __restrict bits = (const uint32_t*)from;
  for (int64_t c = 0; c < n; ++c) {
    const uint32_t x = bits[c], to_even = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
    const bool is_nan = (x & 0x7fffffff) > 0x7f800000;
    to[c].bits = is_nan ? 0x7fc0 : to_even;
  }
}

// The neighbor lists one behind the other: NeighborLists.flat of neighbors.py, which explains them.
struct Lists {
  const int32_t *start, *query, *key;               // edges by query: [T + 1], [edges], [edges]
  const int32_t *key_start, *key_query, *key_edge;  // the same edges by key, and their numbers
  const int32_t *by_last_query, *last_query;        // keys in the order of their last query [T]
  const int32_t* needed;                            // tokens that queries up to this one need [T]

  explicit Lists(const Job& job) {
    const int32_t* next = job.lists;
    auto take = [&next](int64_t n) { return next += n, next - n; };
    start = take(job.T + 1), query = take(job.edges), key = take(job.edges);
    key_start = take(job.T + 1), key_query = take(job.edges), key_edge = take(job.edges);
    by_last_query = take(job.T), last_query = take(job.T), needed = take(job.T);
  }
};

struct Rows {  // fp32, of a multiple of L floats
  const float* data;
  int64_t stride;
  const float* operator[](int64_t i) const { return data + i * stride; }
};

// -------------------------------------------------------------------------------------------------
// Loops over edges. A row is `blocks` blocks of V vectors, V as many as fit into registers.

// Lane r of the result is x[xi[r]] . y[yi[r]]; if `is_one_row`, all xi are the same.
template <int V, bool is_one_row>
inline vec dots(Rows x, Rows y, const int32_t* xi, const int32_t* yi, int64_t blocks) {
  vec sums[L] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * V * L;
    vec shared[V];
    if (is_one_row)
      for (int c = 0; c < V; ++c) shared[c] = load(x[xi[0]] + first + c * L);
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) {
      const float *a = x[xi[r]] + first, *b = y[yi[r]] + first;
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c)
        sums[r] += (is_one_row ? shared[c] : load(a + c * L)) * load(b + c * L);
    }
  }
  return add_lanes(sums);
}

// to[e] = scale * x[xi[e]] . y[yi[e]] for n edges. Writes up to L - 1 more numbers.
template <int V>
inline void dots_of_edges(Rows x, Rows y, const int32_t* xi, const int32_t* yi, int64_t n,
                          int64_t blocks, float scale, float* to) {
  int64_t e = 0;
  for (; e + L <= n; e += L) {
    const bool is_one_row = xi[e] == xi[e + L - 1];
    const vec sums = is_one_row ? dots<V, true>(x, y, xi + e, yi + e, blocks)
                                : dots<V, false>(x, y, xi + e, yi + e, blocks);
    store(to + e, sums * scale);
  }
  if (e == n) return;

  int32_t last_xi[L], last_yi[L];  // the last edge fills up the vector
  for (int r = 0; r < L; ++r) {
    const int64_t edge = e + r < n ? e + r : n - 1;
    last_xi[r] = xi[edge];
    last_yi[r] = yi[edge];
  }
  store(to + e, dots<V, false>(x, y, last_xi, last_yi, blocks) * scale);
}

// to = sum over n edges of w[e] * rows[index[e]]
template <int V>
inline void weighted_sum(const float* w, Rows rows, const int32_t* index, int64_t n,
                         int64_t blocks, float* to) {
  constexpr int U = V >= 4 ? 2 : 4;  // partial sums hide the latency of an addition
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * V * L;
    vec sums[U][V] = {};
    int64_t e = 0;
    for (; e + U <= n; e += U)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const vec weight = splat(w[e + u]);
        const float* row = rows[index[e + u]] + first;
#pragma GCC unroll 4
        for (int c = 0; c < V; ++c) sums[u][c] += weight * load(row + c * L);
      }
    for (; e < n; ++e) {
      const vec weight = splat(w[e]);
      const float* row = rows[index[e]] + first;
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c) sums[0][c] += weight * load(row + c * L);
    }
    for (int c = 0; c < V; ++c) {
      for (int u = 1; u < U; ++u) sums[0][c] += sums[u][c];
      store(to + first + c * L, sums[0][c]);
    }
  }
}

// The same for two sums over the same edges, whose weights are at w[edge[e]].
template <int V>
inline void two_weighted_sums(const float* wa, const float* wb, const int32_t* edge, Rows a, Rows b,
                              const int32_t* index, int64_t n, int64_t blocks, float* to_a,
                              float* to_b) {
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * V * L;
    vec sum_a[V] = {}, sum_b[V] = {};
    for (int64_t e = 0; e < n; ++e) {
      const vec weight_a = splat(wa[edge[e]]), weight_b = splat(wb[edge[e]]);
      const float *row_a = a[index[e]] + first, *row_b = b[index[e]] + first;
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c) {
        sum_a[c] += weight_a * load(row_a + c * L);
        sum_b[c] += weight_b * load(row_b + c * L);
      }
    }
    for (int c = 0; c < V; ++c) {
      store(to_a + first + c * L, sum_a[c]);
      store(to_b + first + c * L, sum_b[c]);
    }
  }
}

// -------------------------------------------------------------------------------------------------
// Softmax of one query. Both functions write up to L - 1 numbers more than n.

// p = softmax of n scores that were scaled by log2(e)
inline void softmax(const float* scores, int64_t n, float* p) {
  const int64_t whole = (n - 1) / L * L, rest = n - whole;  // 1 <= rest <= L
  const float infinity = __builtin_inff();

  vec largest = first_lanes(load(scores + whole), rest, -infinity);
  for (int64_t e = 0; e < whole; e += L) largest = max(largest, load(scores + e));
  largest = largest_lane(largest);

  const vec last = first_lanes(exp2(load(scores + whole) - largest), rest, 0);
  vec sum = last;
  for (int64_t e = 0; e < whole; e += L) {
    const vec y = exp2(load(scores + e) - largest);
    sum += y;
    store(p + e, y);
  }

  const vec inverse = 1 / sum_of_lanes(sum);
  for (int64_t e = 0; e < whole; e += L) store(p + e, load(p + e) * inverse);
  store(p + whole, last * inverse);
}

// ds = p * (dp - sum(p * dp)) * scale
inline void softmax_backward(const float* p, const float* dp, int64_t n, float scale, float* ds) {
  const int64_t whole = (n - 1) / L * L, rest = n - whole;
  vec sum = first_lanes(load(p + whole) * load(dp + whole), rest, 0);
  for (int64_t e = 0; e < whole; e += L) sum += load(p + e) * load(dp + e);

  const vec delta = sum_of_lanes(sum);
  for (int64_t e = 0; e < n; e += L) store(ds + e, load(p + e) * (load(dp + e) - delta) * scale);
}

// -------------------------------------------------------------------------------------------------
// Attention. E: type of the elements.

constexpr int64_t PADDING = 16;           // of the probabilities, as in native.py
constexpr int64_t EDGES_AT_ONCE = 4096;   // of a head: their scores stay in the first caches
constexpr int64_t STREAM_FROM = 2 << 20;  // bytes of a result; smaller ones may stay in caches
constexpr int64_t FEW_NEIGHBORS = 6;      // too few per query to gain from packing keys and values
constexpr int64_t ROWS_AHEAD = 12;        // prefetched while packing

inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }
inline int64_t round_up(int64_t x, int64_t multiple) { return divide_up(x, multiple) * multiple; }
inline int vectors_per_block(int64_t D) { return D <= L ? 1 : D <= 2 * L ? 2 : 4; }

template <class E, int V>
struct Attention {
  const Job& job;
  float* pool = nullptr;  // `scratch_size` floats

  const bool is_backward = job.is_backward;
  const Lists lists{job};

  const int64_t T = job.T, D = job.D, Dp = round_up(job.D, V * L), blocks = Dp / (V * L);
  // Rows of the tensors themselves can be read and written like packed ones.
  const bool has_fp32_rows = sizeof(E) == 4 && Dp == D;

  const bool streams = D * sizeof(E) % sizeof(vec) == 0 &&
                       job.B * T * job.H * D * (int64_t)sizeof(E) >= STREAM_FROM;

  // Few units leave threads idle: then tokens are split as well, in phases.
  const int64_t group = job.B * divide_up(job.H, 2) >= 2 * job.threads ? 2 : 1;  // heads of a unit
  const int64_t groups = divide_up(job.H, group), units = job.B * groups;
  const bool is_uneven = units < 2 * job.threads && units % job.threads;
  const int64_t parts = is_uneven ? divide_up(6 * job.threads, units) : 1;

  struct Head {  // of an image
    int64_t image, head;
    Rows q, k, v, grad;
    float *p, *ds;  // by the numbers of the edges
  };
  struct Scratch {  // of a thread
    float *row, *other_row;
    E* elements;  // of a row
    float *scores, *weights;
  };

  // ---- Scratch: of each thread, then of each unit that is computed at the same time

  int64_t chunk_size() const {
    int64_t most = EDGES_AT_ONCE;
    for (int64_t i = 0; i < T; ++i)
      most = std::max<int64_t>(most, lists.start[i + 1] - lists.start[i]);
    return round_up(most + L, 16);
  }
  int64_t thread_size() const { return 3 * Dp + 2 * chunk_size(); }
  int64_t packed_size() const { return (is_backward ? 4 : 3) * T * Dp; }
  int64_t head_size() const { return packed_size() + (is_backward ? round_up(job.edges, 16) : 0); }
  int64_t scratch_size() const {
    const int64_t at_once = parts == 1 ? job.threads : units;
    return job.threads * thread_size() + at_once * group * head_size();
  }
  Scratch scratch_of(int thread) const {
    float* mine = pool + thread * thread_size();
    float* scores = mine + 3 * Dp;
    return {mine, mine + Dp, (E*)(mine + 2 * Dp), scores, scores + chunk_size()};
  }
  float* unit_scratch(int64_t slot) const {
    return pool + job.threads * thread_size() + slot * group * head_size();
  }

  // ---- Rows

  static E* element(const Array& x, int64_t image, int64_t head) {
    return (E*)x.data + image * x.batch + head * x.head;
  }
  int64_t heads_of(int64_t unit) const {
    const int64_t first = unit % groups * group;
    return job.H - first < group ? job.H - first : group;
  }
  Head head_of(int64_t unit, int64_t g, float* scratch) const {
    const int64_t image = unit / groups, head = unit % groups * group + g;
    float* mine = scratch + g * head_size();
    Rows rows[4];
    for (int r = 0; r < 4; ++r) rows[r] = {mine + r * T * Dp, Dp};
    if (reads_queries()) rows[0] = rows_of(job.q, image, head);
    if (reads_keys()) rows[1] = rows_of(job.k, image, head), rows[2] = rows_of(job.v, image, head);
    float* p = job.p ? job.p + (image * job.H + head) * job.edges : nullptr;
    return {image, head, rows[0], rows[1], rows[2], rows[3], p, mine + packed_size()};
  }
  static Rows rows_of(const Array& x, int64_t image, int64_t head) {
    return {(const float*)element(x, image, head), x.token};
  }
  // The forward pass uses each query once, so it does not pay to copy it; nor keys for a few uses.
  bool reads_queries() const { return !is_backward && has_fp32_rows; }
  bool reads_keys() const { return reads_queries() && job.edges <= FEW_NEIGHBORS * T; }

  // Copy rows of all heads of a unit, which are neighbors in memory, into its scratch.
  void pack(const Array& x, int which, int64_t unit, int64_t begin, int64_t end,
            float* scratch) const {
    const int64_t heads = heads_of(unit), bytes = heads * D * sizeof(E);
    const E* from = element(x, unit / groups, unit % groups * group);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t later = i + ROWS_AHEAD < T ? i + ROWS_AHEAD : T - 1;
      const char* ahead = (const char*)(from + later * x.token);
      for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch(ahead + c);

      for (int64_t g = 0; g < heads; ++g) {
        float* to = scratch + g * head_size() + (which * T + i) * Dp;
        read_row(to, from + i * x.token + g * x.head, D);
        for (int64_t c = D; c < Dp; ++c) to[c] = 0;
      }
    }
  }
  void pack_all(int64_t unit, int64_t begin, int64_t end, float* scratch) const {
    if (!reads_queries()) pack(job.q, 0, unit, begin, end, scratch);
    if (!reads_keys()) pack(job.k, 1, unit, begin, end, scratch);
    if (!reads_keys()) pack(job.v, 2, unit, begin, end, scratch);
    if (is_backward) pack(job.grad, 3, unit, begin, end, scratch);
  }

  // Where a row of a result is computed: in the tensor itself if possible, else in `row`.
  float* target(const Array& x, const Head& head, int64_t i, float* row) const {
    if (!has_fp32_rows || streams) return row;
    return (float*)(element(x, head.image, head.head) + i * x.token);
  }
  void finish(const Array& x, const Head& head, int64_t i, const float* row, E* elements) const {
    if (has_fp32_rows && !streams) return;
    E* to = element(x, head.image, head.head) + i * x.token;
    if (!streams || (uintptr_t)to % sizeof(vec)) return write_row(to, row, D);

    if (sizeof(E) < 4) {
      write_row(elements, row, D);
      row = (const float*)elements;
    }
    const int64_t num_floats = D * sizeof(E) / 4;
    for (int64_t c = 0; c < num_floats; c += L) stream((float*)to + c, load(row + c));
  }

  // ---- Queries and keys of one head

  void forward(const Head& head, int64_t begin, int64_t end, const Scratch& s) const {
    const int64_t first = lists.start[begin], n = lists.start[end] - first;
    const float scale = 1.4426950408889634f / std::sqrt((float)D);  // log2(e)
    dots_of_edges<V>(head.q, head.k, lists.query + first, lists.key + first, n, blocks,
                     scale, s.scores);

    for (int64_t i = begin; i < end; ++i) {
      const int64_t edge = lists.start[i] - first, num = lists.start[i + 1] - lists.start[i];
      float *p = s.weights + edge, *out = target(job.out, head, i, s.row);
      softmax(s.scores + edge, num, p);
      weighted_sum<V>(p, head.v, lists.key + lists.start[i], num, blocks, out);
      finish(job.out, head, i, out, s.elements);
    }
    if (head.p) std::memcpy(head.p + first, s.weights, n * sizeof(float));
  }

  void backward_queries(const Head& head, int64_t begin, int64_t end, const Scratch& s) const {
    const int64_t first = lists.start[begin], n = lists.start[end] - first;
    const float scale = 1 / std::sqrt((float)D);
    dots_of_edges<V>(head.grad, head.v, lists.query + first, lists.key + first, n, blocks,
                     1, s.scores);

    for (int64_t i = begin; i < end; ++i) {
      const int64_t edge = lists.start[i] - first, num = lists.start[i + 1] - lists.start[i];
      float *ds = s.weights + edge, *dq = target(job.dq, head, i, s.row);
      softmax_backward(head.p + lists.start[i], s.scores + edge, num, scale, ds);
      weighted_sum<V>(ds, head.k, lists.key + lists.start[i], num, blocks, dq);
      finish(job.dq, head, i, dq, s.elements);
    }
    std::memcpy(head.ds + first, s.weights, n * sizeof(float));
  }

  void backward_key(const Head& head, int64_t j, const Scratch& s) const {
    const int64_t first = lists.key_start[j], n = lists.key_start[j + 1] - first;
    const int32_t *query = lists.key_query + first, *edge = lists.key_edge + first;
    float *dk = target(job.dk, head, j, s.row), *dv = target(job.dv, head, j, s.other_row);
    two_weighted_sums<V>(head.ds, head.p, edge, head.q, head.grad, query, n, blocks, dk, dv);
    finish(job.dk, head, j, dk, s.elements);
    finish(job.dv, head, j, dv, s.elements);
  }

  // ---- Units

  // The end of a chunk of queries with at most EDGES_AT_ONCE edges, or of one query with more.
  int64_t end_of_chunk(int64_t begin, int64_t end) const {
    int64_t i = begin + 1;
    while (i < end && lists.start[i + 1] - lists.start[begin] <= EDGES_AT_ONCE) ++i;
    return i;
  }

  void queries(const Head& head, int64_t begin, int64_t end, const Scratch& s) const {
    is_backward ? backward_queries(head, begin, end, s) : forward(head, begin, end, s);
  }

  void whole_unit(int64_t unit, float* scratch, const Scratch& s) const {
    int64_t packed = 0, keys_done = 0;
    for (int64_t begin = 0, end; begin < T; begin = end) {
      end = end_of_chunk(begin, T);
      pack_all(unit, packed, lists.needed[end - 1], scratch);
      packed = lists.needed[end - 1];

      int64_t keys_ready = keys_done;
      while (is_backward && keys_ready < T && lists.last_query[keys_ready] < end) ++keys_ready;
      for (int64_t g = 0; g < heads_of(unit); ++g) {
        const Head head = head_of(unit, g, scratch);
        queries(head, begin, end, s);
        for (int64_t r = keys_done; r < keys_ready; ++r)
          backward_key(head, lists.by_last_query[r], s);
      }
      keys_done = keys_ready;
    }
  }

  // The first token of a part, such that all have about as many edges.
  int64_t part_begin(const int32_t* start, int64_t part) const {
    if (part == parts) return T;
    const int64_t goal = job.edges * part / parts;
    int64_t low = 0, high = T;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (start[middle] < goal) low = middle + 1; else high = middle;
    }
    return low;
  }

  void part_of_queries(int64_t unit, int64_t part, const Scratch& s) const {
    const int64_t last = part_begin(lists.start, part + 1);
    for (int64_t begin = part_begin(lists.start, part), end; begin < last; begin = end) {
      end = end_of_chunk(begin, last);
      for (int64_t g = 0; g < heads_of(unit); ++g)
        queries(head_of(unit, g, unit_scratch(unit)), begin, end, s);
    }
  }
  void part_of_keys(int64_t unit, int64_t part, const Scratch& s) const {
    const int64_t begin = part_begin(lists.key_start, part);
    const int64_t end = part_begin(lists.key_start, part + 1);
    for (int64_t g = 0; g < heads_of(unit); ++g) {
      const Head head = head_of(unit, g, unit_scratch(unit));
      for (int64_t j = begin; j < end; ++j) backward_key(head, j, s);
    }
  }

  void run() const {
#pragma omp parallel num_threads(job.threads)
    {
#ifdef _OPENMP
      const int thread = omp_get_thread_num();
#else
      const int thread = 0;
#endif
      const Scratch s = scratch_of(thread);
      if (parts == 1) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < units; ++unit) whole_unit(unit, unit_scratch(thread), s);
      } else {
#pragma omp for schedule(static)
        for (int64_t w = 0; w < units * parts; ++w) {
          const int64_t unit = w / parts, part = w % parts;
          pack_all(unit, T * part / parts, T * (part + 1) / parts, unit_scratch(unit));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t w = 0; w < units * parts; ++w) part_of_queries(w / parts, w % parts, s);
        if (is_backward) {
#pragma omp for schedule(dynamic, 1)
          for (int64_t w = 0; w < units * parts; ++w) part_of_keys(w / parts, w % parts, s);
        }
      }
      finish_streams();
    }
  }
};

template <class E, int V>
bool allocate_and_run(const Job& job) {
  Attention<E, V> attention{job};
  const int64_t bytes = round_up(attention.scratch_size() * sizeof(float), 64);
  attention.pool = (float*)std::aligned_alloc(64, bytes);
  if (!attention.pool) return false;

  attention.run();
  std::free(attention.pool);
  if (job.p && !job.is_backward) std::fill_n(job.p + job.B * job.H * job.edges, PADDING, 0.f);
  return true;
}

template <class E>
bool run_with(const Job& job) {
  switch (vectors_per_block(job.D)) {
    case 1: return allocate_and_run<E, 1>(job);
    case 2: return allocate_and_run<E, 2>(job);
    default: return allocate_and_run<E, 4>(job);
  }
}

}  // namespace

// Returns 0 if there is not enough memory for the scratch.
extern "C" int run(const Job* job) {
  return job->is_bf16 ? run_with<bf16>(*job) : run_with<float>(*job);
}
