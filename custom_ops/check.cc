// Checks the CPU part against the formula in long double: random and special values, odd and unaligned sizes, all
// types, several threads. `make sanitize` builds it with the sanitizers.
//
// Every array is a separate buffer of exactly its size, so that AddressSanitizer sees any access beyond it. A buffer is
// aligned for its elements, but no more.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <type_traits>

#include "sparse.h"
#include "step.h"

using namespace tfav;

namespace {

std::mt19937_64 generator(1);

[[noreturn]] void fail(const char* what, const char* where, long index, double actual, double expected) {
  std::fprintf(stderr, "%s, %s, element %ld: %.17g instead of %.17g\n", what, where, index, actual, expected);
  std::exit(1);
}

template <typename T>
DType dtype_of();
template <>
DType dtype_of<Half>() {
  return DType::kHalf;
}
template <>
DType dtype_of<BFloat16>() {
  return DType::kBFloat16;
}
template <>
DType dtype_of<float>() {
  return DType::kFloat;
}
template <>
DType dtype_of<double>() {
  return DType::kDouble;
}

template <typename T>
T round_to(double x) {
  T rounded;
  if constexpr (std::is_same_v<T, double>)
    rounded = x;
  else
    round_to_nearest(float(x), &rounded);
  return rounded;
}

// Unaligned memory for `size` elements.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size), memory_(static_cast<char*>(std::malloc((size + 1) * sizeof(T)))) {}
  T* data() const { return reinterpret_cast<T*>(memory_.get()) + 1; }
  char* bytes() const { return reinterpret_cast<char*>(data()); }
  T& operator[](int64_t i) const { return data()[i]; }
  double at(int64_t i) const { return double(to_float(data()[i])); }
  int64_t size() const { return size_; }

  template <typename F>
  void fill(F f) {
    for (int64_t i = 0; i < size_; ++i) (*this)[i] = round_to<T>(f(i));
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  int64_t size_;
  std::unique_ptr<char, Free> memory_;
};

Parallel run_on_threads(int count) {
  return [count](int64_t n, const std::function<void(int64_t)>& f) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t i; (i = next.fetch_add(1)) < n;) f(i);
    };
    std::vector<std::thread> others;
    for (int k = 1; k < count; ++k) others.emplace_back(work);
    work();
    for (auto& other : others) other.join();
  };
}

template <typename T, typename G>
struct TestVariable {
  using S = typename SlotType<T>::type;
  Buffer<T> w;
  Buffer<S> m, v, v_max, master;
  Buffer<G> g;

  explicit TestVariable(int64_t size) : w(size), m(size), v(size), v_max(size), master(size), g(size) {}
  VariableState state(const KernelConfig& config, bool weight_decay, bool layer_adaptation, uint32_t rng_stream) const {
    return {w.bytes(),
            m.bytes(),
            v.bytes(),
            config.amsgrad ? v_max.bytes() : nullptr,
            config.rounding == Rounding::kMaster ? master.bytes() : nullptr,
            g.bytes(),
            w.size(),
            weight_decay,
            layer_adaptation,
            rng_stream};
  }
  // The weight before a step.
  double weight(int64_t i, const KernelConfig& config) const {
    if constexpr (sizeof(T) == 2) {
      const T rounded = round_to<T>(master.at(i));
      if (config.rounding == Rounding::kMaster && (rounded.bits == w[i].bits || to_float(rounded) == w.at(i)))
        return master.at(i);
    }
    return w.at(i);
  }
};

double draw(bool special) {
  static const double specials[] = {0.0, -0.0, 1e-40, 1e-30, 6e-8, 1.0, -2.0, 1e4};
  if (special) return specials[generator() % 8];
  return std::normal_distribution<double>()(generator);
}

template <typename T, typename G>
std::vector<TestVariable<T, G>> draw_variables(const std::vector<int64_t>& sizes, bool special) {
  std::vector<TestVariable<T, G>> variables;
  for (int64_t size : sizes) {
    variables.emplace_back(size);
    auto& x = variables.back();
    x.w.fill([&](int64_t) { return draw(special); });
    x.m.fill([&](int64_t) { return 0.1 * draw(special); });
    x.v.fill([&](int64_t) { return 0.01 + std::abs(draw(special)); });
    x.v_max.fill([&](int64_t i) { return x.v.at(i) * 1.01; });
    x.g.fill([&](int64_t) { return draw(special); });
    // Every fifth weight was assigned; the others are their master weights, rounded.
    x.master.fill([&](int64_t i) { return i % 5 == 0 ? draw(special) : x.w.at(i) * (1 + 1e-4 * double(i % 7 - 3)); });
  }
  return variables;
}

template <typename T>
Buffer<T> copy(const Buffer<T>& from) {
  Buffer<T> to(from.size());
  if (from.size() > 0) std::memcpy(to.data(), from.data(), from.size() * sizeof(T));
  return to;
}

using Reference = long double;  // its rounding must not matter

const Coefficients kCoefficients = {0.5,  1.0,  0.1,  0.15, 0.98,  0.0,  0.02, 0.7, 0.3,
                                    0.75, 0.25, 1e-4, 0.01, 0.125, 0.01, 10.0, 3e9};

// Computes one step by the formula and compares it with `after`. g(i) returns the gradient of element i.
template <typename T, typename G, typename F>
void compare(const char* name, const TestVariable<T, G>& before, const TestVariable<T, G>& after,
             const VariableState& state, const KernelConfig& config, F g,
             const std::vector<bool>* updated_elements = nullptr) {
  using S = typename SlotType<T>::type;
  const double ulp = sizeof(S) == 8 ? 0x1p-52 : 0x1p-23;
  const double store = std::is_same_v<T, Half> ? 0x1p-11 : std::is_same_v<T, BFloat16> ? 0x1p-8 : ulp / 2;
  const Coefficients& c = kCoefficients;
  const int64_t size = before.w.size();
  std::vector<Reference> u(size), scale(size);
  Reference ww = 0, uu = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (updated_elements && !(*updated_elements)[i]) continue;
    const Reference x = g(i) * c.gradient_scale, w = before.weight(i, config);
    const Reference m = c.m_scale * before.m.at(i) + c.m_weight * x - c.m_decay * before.m.at(i);
    const Reference v = c.v_scale * before.v.at(i) + c.v_weight * x * x - c.v_decay * before.v.at(i);
    const Reference used = config.amsgrad ? std::max<Reference>(v, before.v_max.at(i)) : v;
    const Reference squared = config.squared_gradient ? c.c_v * used + c.c_g2 * x * x : used;
    const Reference denominator = std::sqrt(squared) + c.epsilon, decay = state.weight_decay ? c.weight_decay : 0.0;
    const Reference gradient = config.trust_ratio ? 0.0 : c.c_g;
    u[i] = (c.c_m * m + gradient * x) / denominator + decay * w;
    // Rounding errors are relative to the terms before they cancel.
    const Reference m_size = std::abs(before.m.at(i)) + c.m_weight * std::abs(x);
    scale[i] = (c.c_m * m_size + gradient * std::abs(x)) / denominator + decay * std::abs(w);
    if (!(std::abs(after.m.at(i) - m) <= 4 * ulp * m_size + 1e-37)) fail(name, "m", i, after.m.at(i), m);
    if (!(std::abs(after.v.at(i) - v) <= 4 * ulp * v + 1e-37)) fail(name, "v", i, after.v.at(i), v);
    if (config.amsgrad && !(std::abs(after.v_max.at(i) - used) <= 4 * ulp * used))
      fail(name, "v_max", i, after.v_max.at(i), used);
    ww += w * w;
    uu += u[i] * u[i];
  }
  Reference step_size = 1;
  if (config.trust_ratio) {
    step_size = state.layer_adaptation && ww > 0 && uu > 0 ? std::sqrt(ww / uu) : Reference(1);
    if (state.layer_adaptation)
      step_size = std::min<Reference>(std::max<Reference>(step_size, c.trust_ratio_min), c.trust_ratio_max);
    step_size *= c.learning_rate;
  }
  for (int64_t i = 0; i < size; ++i) {
    if (updated_elements && !(*updated_elements)[i]) {
      if (std::memcmp(&after.w[i], &before.w[i], sizeof(T)) ||
          std::memcmp(&after.master[i], &before.master[i], sizeof(S)) ||
          std::memcmp(&after.m[i], &before.m[i], sizeof(S)) || std::memcmp(&after.v[i], &before.v[i], sizeof(S))) {
        fail(name, "a row without an index", i, after.w.at(i), before.w.at(i));
      }
      continue;
    }
    const Reference expected = before.weight(i, config) - step_size * u[i];
    // 4 units in the last place of the step and of the trust ratio, and one rounding to the type of the weight. Norms
    // are summed in double, which is no more exact than the elements of double variables.
    const Reference norms = config.trust_ratio && sizeof(S) == 8 ? std::sqrt(Reference(size)) : 0;
    const Reference computed =
        ((config.trust_ratio ? 8 : 4) + norms) * ulp * step_size * scale[i] + ulp * std::abs(expected) + 1e-37;
    const Reference tolerance = computed +
                                (config.rounding == Rounding::kStochastic ? 2 : 1) * store * std::abs(expected) +
                                (std::is_same_v<T, Half> ? 6e-8 : 0);
    if (config.rounding == Rounding::kMaster) {
      if (!(std::abs(after.master.at(i) - expected) <= computed))
        fail(name, "master weight", i, after.master.at(i), expected);
      const T rounded = round_to<T>(after.master.at(i));
      if (std::memcmp(&rounded, &after.w[i], sizeof(T))) fail(name, "not the master weight's rounding", i, 0, 0);
    }
    if (std::abs(expected) < 65504 || !std::is_same_v<T, Half>) {
      if (!(std::abs(after.w.at(i) - expected) <= tolerance)) fail(name, "w", i, after.w.at(i), expected);
    }
  }
}

template <typename T>
bool same(const Buffer<T>& a, const Buffer<T>& b) {
  return a.size() == 0 || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <typename T, typename G>
TestVariable<T, G> copy(const TestVariable<T, G>& from) {
  TestVariable<T, G> to(0);
  to.w = copy(from.w), to.m = copy(from.m), to.v = copy(from.v), to.v_max = copy(from.v_max), to.g = copy(from.g);
  to.master = copy(from.master);
  return to;
}

void run_step(Partition& partition, const std::vector<VariableState>& variables, const Loops& loops,
              const KernelConfig& config, int num_threads) {
  if (config.trust_ratio)
    lamb(partition, variables, kCoefficients, loops, run_on_threads(num_threads));
  else
    adam(partition, variables, kCoefficients, loops.adam, run_on_threads(num_threads));
}

// All configurations for variables of type T and gradients of type G.
template <typename T, typename G>
std::vector<KernelConfig> all_configs() {
  std::vector<KernelConfig> configs;
  for (Rounding rounding : {Rounding::kNearest, Rounding::kStochastic, Rounding::kMaster}) {
    if (rounding != Rounding::kNearest && sizeof(T) != 2) continue;
    const KernelConfig plain = {dtype_of<T>(), dtype_of<G>(), rounding, false, false, false};
    configs.insert(configs.end(), 5, plain);
    KernelConfig* const last = configs.data() + configs.size() - 5;
    last[1].squared_gradient = last[2].amsgrad = last[3].squared_gradient = last[3].amsgrad = last[4].trust_ratio =
        true;
  }
  return configs;
}

template <typename T, typename G>
void check_dense(const char* name, Loops (*loops_of)(const KernelConfig&)) {
  using S = typename SlotType<T>::type;
  const std::vector<int64_t> sizes = {0, 1, 3, 17, 1023, kSpan, kSpan + 1, 18011, 65537};
  for (const KernelConfig& config : all_configs<T, G>()) {
    for (bool special : {false, true}) {
      const auto before = draw_variables<T, G>(sizes, special);
      std::vector<TestVariable<T, G>> first;
      for (int num_threads : {1, 2, 7}) {
        std::vector<TestVariable<T, G>> after;
        for (const auto& x : before) after.push_back(copy(x));
        std::vector<VariableState> variables;
        Partition partition({sizeof(T), sizeof(S), sizeof(G)});
        for (size_t i = 0; i < after.size(); ++i) {
          variables.push_back(after[i].state(config, i % 2 == 0, i % 3 != 0, uint32_t(i)));
          partition.add(variables[i], int(i), 0, variables[i].size, variables[i].g);
        }
        run_step(partition, variables, loops_of(config), config, num_threads);
        for (size_t i = 0; i < after.size(); ++i) {
          if (!same(after[i].g, before[i].g)) fail(name, "a gradient was written", i, 0, 0);
          if (num_threads == 1) {
            compare(name, before[i], after[i], variables[i], config, [&](int64_t k) { return before[i].g.at(k); });
          } else if (!same(after[i].w, first[i].w) || !same(after[i].m, first[i].m) || !same(after[i].v, first[i].v)) {
            fail(name, "other bits with more threads", i, num_threads, 1);
          }
        }
        if (num_threads == 1) first = std::move(after);
      }
    }
  }
  std::printf("dense %s ok\n", name);
}

template <typename T, typename I>
void check_sparse(const char* name) {
  using S = typename SlotType<T>::type;
  for (int64_t width : {1, 3, 64, 20000}) {
    const int64_t count = width == 20000 ? 5 : 211;
    for (const KernelConfig& config : all_configs<T, S>()) {
      for (bool exact : {false, true}) {
        for (int pattern = 0; pattern < 5; ++pattern) {
          std::vector<I> indices;
          if (pattern == 1) indices.assign(1, I(count - 1));
          if (pattern == 2) indices.assign(9, I(2));
          if (pattern == 3)
            for (int64_t i = 0; i < count; ++i) indices.push_back(I(count - 1 - i));
          if (pattern == 4)
            for (int64_t i = 0; i < 2 * count; ++i) indices.push_back(I(generator() % (count / 2 + 1)));
          const int64_t num_indices = int64_t(indices.size());
          auto before = std::move(draw_variables<T, S>({count * width}, false)[0]);
          const auto after = copy(before);
          Buffer<T> values(num_indices * width);
          values.fill([&](int64_t) { return draw(false); });
          before.g.fill([](int64_t) { return 0.0; });
          std::vector<bool> updated(count * width, exact);
          std::vector<double> gradient(count * width, 0.0);
          for (int64_t k = 0; k < num_indices; ++k) {
            for (int64_t j = 0; j < width; ++j) {
              gradient[indices[k] * width + j] += values.at(k * width + j);
              updated[indices[k] * width + j] = true;
            }
          }
          const UniqueRows rows(indices.data(), num_indices);
          Buffer<S> sums(rows.count() * width);
          for (int64_t i = 0; i < rows.count(); ++i) {
            rows.sum_values<T, S>(i, values.data(), width, sums.data() + i * width);
            for (int64_t j = 0; j < width; ++j) {  // the rounded sum, so that only the step remains to be checked
              const double actual = sums.at(i * width + j), expected = gradient[rows.row(i) * width + j];
              if (!(std::abs(actual - expected) <= 1e-4 * (1 + std::abs(expected))))
                fail(name, "sum", i, actual, expected);
              gradient[rows.row(i) * width + j] = actual;
            }
          }
          std::vector<VariableState> variables = {after.state(config, true, true, 3)};
          Partition partition({sizeof(T), sizeof(S), sizeof(S)});
          add_rows(partition, variables[0], rows, width, sums.bytes(), width * sizeof(S), exact);
          run_step(partition, variables, loops_for(config), config, 3);
          compare(name, before, after, variables[0], config, [&](int64_t k) { return gradient[k]; }, &updated);
        }
      }
    }
  }
  std::printf("sparse %s ok\n", name);
}

template <typename G>
void check_squared_norm(const char* name) {
  std::vector<TestVariable<G, G>> all = draw_variables<G, G>({0, 1, 17, 40000}, false);
  std::vector<VariableState> variables;
  double expected = 0;
  for (const auto& x : all) {
    variables.push_back(x.state(KernelConfig{}, true, true, 0));
    for (int64_t i = 0; i < x.g.size(); ++i) expected += x.g.at(i) * x.g.at(i);
  }
  const double one = squared_norm(variables, sizeof(G), squared_norm_for(dtype_of<G>()), run_on_threads(1));
  const double five = squared_norm(variables, sizeof(G), squared_norm_for(dtype_of<G>()), run_on_threads(5));
  if (one != five || !(std::abs(one - expected) <= 1e-12 * expected)) fail(name, "squared norm", 0, five, expected);
  std::printf("norm %s ok\n", name);
}

void check_conversions() {
  for (uint32_t i = 0; i < 65536; ++i) {  // a round trip keeps the bits, and values are those of IEEE 754
    const Half h{uint16_t(i)};
    const int exponent = i >> 10 & 31, fraction = i & 1023;
    const double expected = (i & 0x8000 ? -1 : 1) *
                            (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
    const float actual = to_float(h);
    if (exponent == 31 ? (fraction ? actual == actual : !std::isinf(actual)) : double(actual) != expected) {
      fail("half", "to float", i, actual, expected);
    }
    Half back;
    round_to_nearest(actual, &back);
    if (actual == actual && back.bits != h.bits) fail("half", "there and back", i, back.bits, h.bits);
    if (exponent == 31 || (i & 0x7fff) >= 0x7bff || (i & 0x8000)) continue;
    // Halfway to the next number rounds to the even one of the two, a little more to the next, a little less to this
    // one.
    const float middle = float((double(actual) + double(to_float(Half{uint16_t(i + 1)}))) / 2);
    const float sides[] = {std::nextafterf(middle, 0.0f), middle, std::nextafterf(middle, 1e9f)};
    const uint32_t expected_bits[] = {i, i + (i & 1), i + 1};
    for (int k = 0; k < 3; ++k) {
      round_to_nearest(sides[k], &back);
      if (back.bits != expected_bits[k]) fail("half", "from float", i, back.bits, expected_bits[k]);
    }
  }
  for (uint32_t i = 0; i < 0x7f80; ++i) {
    const float value = bits_to_float(i << 16);
    const uint32_t middle = (i << 16) + 0x8000u;
    const uint32_t sides[] = {middle - 1, middle, middle + 1}, expected_bits[] = {i, i + (i & 1), i + 1};
    BFloat16 back;
    round_to_nearest(value, &back);
    if (back.bits != i || float_to_bits(to_float(back)) != i << 16) fail("bfloat16", "there and back", i, back.bits, i);
    for (int k = 0; k < 3; ++k) {
      round_to_nearest(bits_to_float(sides[k]), &back);
      if (back.bits != expected_bits[k]) fail("bfloat16", "from float", i, back.bits, expected_bits[k]);
    }
  }
  Half h;
  BFloat16 b;
  round_to_nearest(NAN, &h);
  round_to_nearest(NAN, &b);
  if (to_float(h) == to_float(h) || to_float(b) == to_float(b)) fail("NaN", "lost", 0, 0, 0);
  round_to_nearest(65520.0f, &h);
  if (!std::isinf(to_float(h))) fail("half", "overflow", 0, to_float(h), INFINITY);
  // Stochastic rounding: of 8,192 random numbers that differ in the bits that count, a part rounds up that is the
  // distance to the number below; numbers of the type do not change.
  for (uint32_t i = 0; i < 0x7bff; i += 7) {
    const float below = to_float(Half{uint16_t(i)}), above = to_float(Half{uint16_t(i + 1)});
    for (uint32_t quarters : {0, 1, 2, 3}) {
      int64_t up = 0;
      for (uint32_t r = 0; r < 8192; ++r) {
        round_stochastically(below + (above - below) * float(quarters) / 4, r | 0xabc00000u, &h);
        if (h.bits != i && h.bits != i + 1) fail("half", "at random: no neighbour", i, h.bits, i);
        up += h.bits != i;
      }
      if (up != int64_t(quarters) * 2048) fail("half", "at random", i, double(up), quarters * 2048);
    }
  }
  for (uint32_t i = 0; i < 0x7f7f; i += 97) {
    for (uint32_t cut : {0u, 1u, 0x4000u, 0xffffu}) {
      int64_t up = 0;
      for (uint32_t r = 0; r < 65536; ++r) {
        round_stochastically(-bits_to_float((i << 16) + cut), r | 0xabcd0000u, &b);
        if (b.bits != (i | 0x8000) && b.bits != ((i + 1) | 0x8000)) fail("bfloat16", "at random", i, b.bits, i);
        up += b.bits != (i | 0x8000);
      }
      if (up != int64_t(cut)) fail("bfloat16", "at random: how often", i, double(up), cut);
    }
  }
  for (float special : {INFINITY, -INFINITY, NAN}) {
    round_stochastically(special, 0xffffffffu, &h);
    round_stochastically(special, 0xffffffffu, &b);
    const bool kept = special == special ? to_float(h) == special && to_float(b) == special
                                         : to_float(h) != to_float(h) && to_float(b) != to_float(b);
    if (!kept) fail("at random", "inf or NaN lost", 0, to_float(h), to_float(b));
  }
  std::printf("conversions ok\n");
}

}  // namespace

namespace tfav {
Loops loops_baseline(const KernelConfig&);
}

int main() {
  std::printf("this processor: %s\n", instruction_set());
  check_conversions();
  for (auto loops : {loops_for, loops_baseline}) {
    const bool chosen = loops == loops_for;
    check_dense<float, float>(chosen ? "float" : "float, baseline", loops);
    check_dense<double, double>(chosen ? "double" : "double, baseline", loops);
    check_dense<Half, Half>(chosen ? "half" : "half, baseline", loops);
    check_dense<Half, float>(chosen ? "half, float gradients" : "half, float gradients, baseline", loops);
    check_dense<BFloat16, BFloat16>(chosen ? "bfloat16" : "bfloat16, baseline", loops);
    check_dense<BFloat16, float>(chosen ? "bfloat16, float gradients" : "bfloat16, float gradients, baseline", loops);
  }
  check_sparse<float, int32_t>("float");
  check_sparse<double, int64_t>("double");
  check_sparse<Half, int64_t>("half");
  check_sparse<BFloat16, int32_t>("bfloat16");
  check_squared_norm<float>("float");
  check_squared_norm<double>("double");
  check_squared_norm<Half>("half");
  check_squared_norm<BFloat16>("bfloat16");
  std::printf("ok\n");
}
