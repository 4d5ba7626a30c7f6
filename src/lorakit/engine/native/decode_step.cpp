// Some tokens of each row through a Llama-shaped model; step.py says what goes in.
//
// All threads go through the whole step together: what depends on other threads' work stands
// behind the barrier that ends each `omp for`. Numbers between products are floats.

#include <cmath>
#include <limits>
#include <vector>

#include "four_bits.h"
#include "products.h"

namespace {

enum Kind : int64_t { FLOAT32, BFLOAT16, INT8, INT4 };

}  // namespace

extern "C" {

// A linear layer, number `place` of the `family` that gets the same input.
struct Linear {
  int64_t kind;
  const void* w;  // (d_out, d_in), rows `stride` numbers apart; of 4 bits as four_bits.h says
  int64_t stride, d_in, d_out;
  const bf16* scales;   // of integers of 8 bits (d_out,), of 4 bits (d_in / GROUP, d_out, 2)
  const void* bias;     // (d_out,) or null
  const float* a;       // (columns of all adapters, d_in), or null
  const void* b;        // (d_out, columns), rows `b_stride` numbers apart
  int64_t b_stride, family, place;
};

struct Layer {
  Linear qkv[3], out, gate_up[2], down;
  const void *before, *after, *q_norm, *k_norm;
  float before_eps, after_eps, q_eps, k_eps;
};

struct Model {
  int64_t kind;  // of norms, biases, B, keys and values
  int64_t layers, width, d, heads, kv_heads, inner;
  float scale, norm_eps;
  const Layer* layer;
  const void* norm;
  Linear head;
};

// Neighbouring columns [begin, begin + width) of an adapter, in units of a family's layers.
struct Adapter {
  int64_t begin, width;
};

struct Tokens {
  int64_t tokens, threads;
  const void* embedded;      // (tokens, width)
  const float *cos, *sin;    // (tokens, d)
  const int64_t* rows;       // (tokens,), whose they are
  const int64_t* lengths;    // (tokens,), what their rows have before them
  void* const* keys;         // of each layer (rows, kv_heads, room, d)
  void* const* values;
  int64_t room;
  int64_t adapters;
  const Adapter* adapter;
  const int64_t* adapter_of; // (tokens,), which adapter; -1 for none
  int64_t asked;             // tokens whose logits are
  const int64_t* which;      // (asked,)
  void* logits;              // (asked, vocabulary)
};

}  // extern "C"

namespace {

const bool tiles = ask_for_tiles();

// e^x to within 2 units in the last place (Cephes' polynomial); NaN stays NaN.
v16 exponential(v16 x) {
  const v16 zero = {};
  const v16 low = zero - 87.3f, high = zero + 88.3f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const v16 magic = zero + 12582912.f;  // adding it rounds to a whole number
  const v16 shifted = x * 1.44269504f + magic, n = shifted - magic;
  const v16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  v16 y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  return y * (v16)(((i16)shifted - (i16)magic + 127) << 23);
}

// What a product gets: rows of floats, and for tiles in bfloat16, as rows and as columns.
struct Input {
  std::vector<float> x;
  std::vector<bf16> rounded, tiled;
  int64_t k = 0;
  bool in_tiles = false;

  void shape(int64_t rows, int64_t width, bool wanted) {
    k = width;
    in_tiles = wanted && k % 32 == 0;
    if (x.size() < size_t(rows * k)) x.resize(rows * k);
    size_t room = (rows + 15) / 16 * 16 * k;
    if (in_tiles && tiled.size() < room) {
      rounded.resize(room);
      tiled.resize(room);
    }
  }
  float* row(int64_t r) { return x.data() + r * k; }
  const float* row(int64_t r) const { return x.data() + r * k; }
  void lay(int64_t r) {  // once row r is complete
    if (!in_tiles) return;
    round_all(row(r), k, rounded.data() + r * k);
    lay_in_tiles(rounded.data() + r * k, r, k, tiled.data());
  }
};

// Of the thread that asks for steps; it grows as needed, and stays.
struct Workspace {
  std::vector<float> h, y, inner, scores;
  Input input, attended, activated;
};
thread_local Workspace workspace;

// The tokens of a product: those of `which`, or the first ones.
struct Span {
  int64_t count;
  const int64_t* which = nullptr;
};

template <class T> struct Step {
  const Model& model;
  const Tokens& given;
  Workspace& own;
  int64_t widest;   // numbers of a token in `own.y`
  int64_t rank;     // the largest, a multiple of 16: numbers of a token and layer in `own.inner`

  const T* at(const void* p, int64_t i = 0) const { return static_cast<const T*>(p) + i; }
  float* y(int64_t t) const { return own.y.data() + t * widest; }

  // w x / sqrt(mean(x²) + eps)
  void normalize(const float* x, const void* w, float eps, int64_t n, float* y) const {
    v16 by_16 = {};
    for (int64_t i = 0; i + 16 <= n; i += 16) by_16 += load16(x + i) * load16(x + i);
    float squares = sum(by_16);
    for (int64_t i = n / 16 * 16; i < n; i++) squares += x[i] * x[i];
    const float scale = 1 / std::sqrt(squares / n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = to_float(*at(w, i)) * (x[i] * scale);
  }

  // Of `count` tokens: those of `which`, or the first ones.
  void normalize_all(const void* w, float eps, int64_t count, const int64_t* which = nullptr) const {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; t++) {
      const float* h = own.h.data() + (which ? which[t] : t) * model.width;
      normalize(h, w, eps, model.width, own.input.row(t));
      own.input.lay(t);
    }
  }

  // x A of each token's own adapter, for layers with one input.
  void inner_products(const Linear* layers, int count, const Input& input, const Span& span) const {
    bool any = false;
    for (int j = 0; j < count; j++) any |= layers[j].a != nullptr;
    if (!any || !given.adapters) return;
    const int64_t chunks = rank / 16, each = given.adapters * chunks;
    const int64_t parts = (span.count + BLOCK - 1) / BLOCK;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < count * each * parts; task++) {
      const int64_t layer = task / parts / each, from = task % parts * BLOCK;
      const Linear& l = layers[layer];
      const int64_t number = task / parts % each / chunks, c = task / parts % chunks * 16;
      const Adapter& adapter = given.adapter[number];
      if (!l.a || c >= adapter.width) continue;
      const float* a = l.a + (l.family * adapter.begin + l.place * adapter.width + c) * l.d_in;
      for (int64_t t = from; t < std::min(from + BLOCK, span.count); t++) {
        if (adapter_of(span, t) != number) continue;
        v16 found = dots<16, 1>(a, l.d_in, adapter.width - 1 - c, input.row(t), 0, l.d_in);
        std::memcpy(inner(t, layer) + c, &found, sizeof found);
      }
    }
  }

  float* inner(int64_t t, int64_t layer) const { return own.inner.data() + (t * 3 + layer) * rank; }

  int64_t adapter_of(const Span& span, int64_t t) const {
    return given.adapter_of[span.which ? span.which[t] : t];
  }

  // Of `count` tokens, for n outputs from o on; rows of y are as long as a block is.
  void base_block(const Linear& l, int64_t o, int64_t n, const Input& input, int64_t count, float* y) const {
    const int64_t k = l.d_in;
    const bool by_tiles = input.in_tiles && n == BLOCK;
    if (l.kind == INT4) {
      const FourBits own = {static_cast<const uint8_t*>(l.w) + o * k / 2, l.scales + 2 * o, 2 * l.d_out, k};
      if (input.in_tiles && count > 4) {
        thread_local std::vector<bf16> wide;
        wide.resize(FOUR_BITS_BLOCK * k);
        own.widen(wide.data());
        multiply_columns(wide.data(), input.rounded.data(), count, k, y);
      } else {
        own.multiply(input.x.data(), count, y);
      }
    } else if (l.kind == INT8) {
      const int8_t* w = static_cast<const int8_t*>(l.w) + o * l.stride;
      if (by_tiles && count > 2) {
        thread_local std::vector<bf16> wide;
        wide.resize(BLOCK * k);
        widen(w, l.stride, k, wide.data());
        multiply_tiles(wide.data(), k, input.tiled.data(), count, k, y);
      } else {
        multiply(w, l.stride, n, input.x.data(), count, k, y);
      }
      for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < n; i++) y[t * BLOCK + i] *= to_float(l.scales[o + i]);
    } else if (l.kind == BFLOAT16) {
      const bf16* w = static_cast<const bf16*>(l.w) + o * l.stride;
      if (by_tiles)
        multiply_tiles(w, l.stride, input.tiled.data(), count, k, y);
      else
        multiply(w, l.stride, n, input.x.data(), count, k, y);
    } else {
      multiply(static_cast<const float*>(l.w) + o * l.stride, l.stride, n, input.x.data(), count, k, y);
    }
  }

  // x Wᵀ + bias + (x A) Bᵀ of layers with one input; `store(layer, token, output, 16 or fewer, y)`.
  template <class Store>
  void multiply_by(const Linear* layers, int count, const Input& input, const Span& span, Store store) const {
    int64_t blocks[4] = {0}, sizes[3];
    for (int j = 0; j < count; j++) {
      sizes[j] = layers[j].kind == INT4 ? FOUR_BITS_BLOCK : BLOCK;
      blocks[j + 1] = blocks[j] + (layers[j].d_out + sizes[j] - 1) / sizes[j];
    }
    // Long runs are read faster, short ones are shared out more evenly.
    const int64_t run = std::max<int64_t>(1, blocks[count] / (8 * given.threads));
#pragma omp for schedule(dynamic, run)
    for (int64_t task = 0; task < blocks[count]; task++) {
      thread_local std::vector<float> room;
      room.resize((span.count + 15) / 16 * 16 * FOUR_BITS_BLOCK);
      float* y = room.data();
      int j = 0;
      while (task >= blocks[j + 1]) j++;
      const Linear& l = layers[j];
      const int64_t o = (task - blocks[j]) * sizes[j], n = std::min<int64_t>(sizes[j], l.d_out - o);
      base_block(l, o, n, input, span.count, y);
      for (int64_t t = 0; t < span.count; t++) {
        float* found = y + t * sizes[j];
        if (l.bias)
          for (int64_t i = 0; i < n; i++) found[i] += to_float(*at(l.bias, o + i));
        const int64_t a = given.adapters && l.a ? adapter_of(span, t) : -1;
        if (a >= 0) {
          const Adapter& own_a = given.adapter[a];
          const T* b = at(l.b, o * l.b_stride + l.family * own_a.begin + l.place * own_a.width);
          const float* x = inner(t, j);
          for (int64_t i = 0; i < n; i += 16) {
            const v16 more = dots<16, 1>(b + i * l.b_stride, l.b_stride, n - 1 - i, x, 0, own_a.width);
            for (int64_t e = 0; e < std::min<int64_t>(16, n - i); e++) found[i + e] += more[e];
          }
        }
        store(j, t, o, n, found);
      }
    }
  }

  void product_to_y(const Linear* layers, int count, const Input& input) const {
    int64_t begins[3] = {0};
    for (int j = 1; j < count; j++) begins[j] = begins[j - 1] + layers[j - 1].d_out;
    const Span all{given.tokens};
    inner_products(layers, count, input, all);
    multiply_by(layers, count, input, all, [&](int j, int64_t t, int64_t o, int64_t n, const float* found) {
      std::memcpy(y(t) + begins[j] + o, found, n * sizeof(float));
    });
  }

  void product_to_h(const Linear& l, const Input& input) const {
    const Span all{given.tokens};
    inner_products(&l, 1, input, all);
    multiply_by(&l, 1, input, all, [&](int, int64_t t, int64_t o, int64_t n, const float* found) {
      float* h = own.h.data() + t * model.width + o;
      for (int64_t i = 0; i < n; i++) h[i] += found[i];
    });
  }

  // Rotates one head in place, after its norm if it has one.
  void turn(float* x, int64_t t, const void* norm, float eps) const {
    const int64_t d = model.d, half = d / 2;
    if (norm) normalize(x, norm, eps, d, x);
    const float *cos = given.cos + t * d, *sin = given.sin + t * d;
    for (int64_t i = 0; i < half; i++) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cos[i] - b * sin[i];
      x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
  }

  T* kept(void* const* layers, int64_t number, int64_t t, int64_t g) const {
    return static_cast<T*>(layers[number]) + (given.rows[t] * model.kv_heads + g) * given.room * model.d;
  }

  // Keeps a token's key and value, of the heads of group g.
  void keep(int64_t number, int64_t t, int64_t g) const {
    const Layer& layer = model.layer[number];
    const int64_t d = model.d, at = given.lengths[t] * d;
    float* k = y(t) + (model.heads + g) * d;
    turn(k, t, layer.k_norm, layer.k_eps);
    round_all(k, d, kept(given.keys, number, t, g) + at);
    round_all(k + model.kv_heads * d, d, kept(given.values, number, t, g) + at);
  }

  // Queries that share keys: softmax(q Kᵀ scale) V.
  void attend(int64_t number, int64_t t, int64_t g) const {
    const Layer& layer = model.layer[number];
    const int64_t d = model.d, share = model.heads / model.kv_heads, seen = given.lengths[t] + 1;
    const T *keys = kept(given.keys, number, t, g), *values = kept(given.values, number, t, g);
    const int64_t padded = (seen + 15) / 16 * 16;
    thread_local std::vector<float> room;
    if (room.size() < size_t(padded)) room.resize(padded + 1024);
    float* p = room.data();
    for (int64_t head = g * share; head < (g + 1) * share; head++) {
      float* q = y(t) + head * d;
      turn(q, t, layer.q_norm, layer.q_eps);
      v16 most = v16{} - std::numeric_limits<float>::max();
      for (int64_t i = 0; i < seen; i += 16) {
        const v16 s = dots<16, 1>(keys + i * d, d, seen - 1 - i, q, 0, d) * model.scale;
        std::memcpy(p + i, &s, sizeof s);
        most = s > most ? s : most;
      }
      float largest = most[0];
      for (int i = 1; i < 16; i++) largest = std::max(largest, most[i]);
      v16 total = {};
      for (int64_t i = 0; i < seen; i += 16) {
        v16 e = exponential(load16(p + i) - largest);
        for (int64_t j = seen - i; j < 16; j++) e[j] = 0;
        std::memcpy(p + i, &e, sizeof e);
        total += e;
      }
      const float weight = 1 / sum(total);
      float* found = own.attended.row(t) + head * d;
      int64_t i = 0;
      for (; i + 64 <= d; i += 64) weigh<4>(values + i, p, seen, weight, found + i);
      for (; i < d; i += 16) weigh<1>(values + i, p, seen, weight, found + i);
    }
  }

  template <int C>
  void weigh(const T* values, const float* p, int64_t seen, float weight, float* found) const {
    v16 acc[C] = {};
    for (int64_t i = 0; i < seen; i++)
      for (int c = 0; c < C; c++) acc[c] += p[i] * load16(values + i * model.d + 16 * c);
    for (int c = 0; c < C; c++) {
      acc[c] *= weight;
      std::memcpy(found + 16 * c, acc + c, sizeof(v16));
    }
  }

  void attend_all(int64_t number) const {
    const int64_t groups = model.kv_heads, tasks = given.tokens * groups;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; task++) keep(number, task / groups, task % groups);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) attend(number, task / groups, task % groups);
    if (!own.attended.in_tiles) return;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < given.tokens; t++) own.attended.lay(t);
  }

  // silu(gate) up
  void activate_all() const {
    const int64_t n = model.inner;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < given.tokens; t++) {
      const float *gate = y(t), *up = gate + n;
      float* found = own.activated.row(t);
      int64_t i = 0;
      for (; i + 16 <= n; i += 16) {
        const v16 x = load16(gate + i), both = x / (1.f + exponential(-x)) * load16(up + i);
        std::memcpy(found + i, &both, sizeof both);
      }
      for (; i < n; i++) found[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
      own.activated.lay(t);
    }
  }

  void run() const {
    if (tiles) begin_tiles();
#pragma omp for schedule(static)
    for (int64_t t = 0; t < given.tokens; t++)
      for (int64_t i = 0; i < model.width; i++)
        own.h[t * model.width + i] = to_float(*at(given.embedded, t * model.width + i));
    for (int64_t number = 0; number < model.layers; number++) {
      const Layer& layer = model.layer[number];
      normalize_all(layer.before, layer.before_eps, given.tokens);
      product_to_y(layer.qkv, 3, own.input);
      attend_all(number);
      product_to_h(layer.out, own.attended);
      normalize_all(layer.after, layer.after_eps, given.tokens);
      product_to_y(layer.gate_up, 2, own.input);
      activate_all();
      product_to_h(layer.down, own.activated);
    }
    const Span asked{given.asked, given.which};
    normalize_all(model.norm, model.norm_eps, asked.count, asked.which);
    inner_products(&model.head, 1, own.input, asked);
    T* logits = static_cast<T*>(given.logits);
    multiply_by(&model.head, 1, own.input, asked, [&](int, int64_t t, int64_t o, int64_t n, const float* found) {
      round_all(found, n, logits + t * model.head.d_out + o);
    });
    if (tiles) end_tiles();
  }
};

template <class T> void compute(const Model& model, const Tokens& given) {
  Workspace& own = workspace;
  const int64_t n = given.tokens, turned = (model.heads + 2 * model.kv_heads) * model.d;
  const int64_t widest = std::max(turned, 2 * model.inner);
  int64_t rank = 0;
  for (int64_t i = 0; i < given.adapters; i++) rank = std::max(rank, given.adapter[i].width);
  rank = (rank + 15) / 16 * 16;
  const bool by_tiles = tiles && sizeof(T) == 2;
  own.input.shape(n, model.width, by_tiles);
  own.attended.shape(n, model.heads * model.d, by_tiles);
  own.activated.shape(n, model.inner, by_tiles);
  own.h.resize(n * model.width);
  own.y.resize(n * widest);
  own.inner.resize(n * 3 * rank);
  const Step<T> step{model, given, own, widest, rank};
#pragma omp parallel num_threads(given.threads)
  step.run();
}

}  // namespace

extern "C" void decode_step(const Model* model, const Tokens* given) {
  if (model->kind == BFLOAT16)
    compute<bf16>(*model, *given);
  else
    compute<float>(*model, *given);
}

// Whether products of bfloat16 are computed by AMX's tiles.
extern "C" int64_t has_tiles() { return tiles; }
