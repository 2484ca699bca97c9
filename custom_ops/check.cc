// Checks the part for CPUs against the formula in long double, on random and special values, odd and
// unaligned sizes, all types, and with several threads. Built with the sanitizers by `make sanitize`.
//
// Every array is a block of its own, exactly as long as it must be, so that AddressSanitizer sees any access beyond it,
// and begins where only its elements are aligned.

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

[[noreturn]] void fail(const char* what, const char* where, long index, double have, double want) {
  std::fprintf(stderr, "%s, %s, element %ld: %.17g instead of %.17g\n", what, where, index, have, want);
  std::exit(1);
}

template <typename T>
Type type_of();
template <>
Type type_of<Half>() {
  return Type::kHalf;
}
template <>
Type type_of<BFloat16>() {
  return Type::kBFloat16;
}
template <>
Type type_of<float>() {
  return Type::kFloat;
}
template <>
Type type_of<double>() {
  return Type::kDouble;
}

template <typename T>
T stored(double x) {
  T to;
  if constexpr (std::is_same_v<T, double>)
    to = x;
  else
    narrow(float(x), &to);
  return to;
}

// Unaligned memory of its own for `size` elements.
template <typename T>
class Block {
 public:
  explicit Block(int64_t size) : size_(size), memory_(static_cast<char*>(std::malloc((size + 1) * sizeof(T)))) {}
  T* data() const { return reinterpret_cast<T*>(memory_.get()) + 1; }
  char* bytes() const { return reinterpret_cast<char*>(data()); }
  T& operator[](int64_t i) const { return data()[i]; }
  double at(int64_t i) const { return double(widened(data()[i])); }
  int64_t size() const { return size_; }

  template <typename F>
  void fill(F f) {
    for (int64_t i = 0; i < size_; ++i) (*this)[i] = stored<T>(f(i));
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  int64_t size_;
  std::unique_ptr<char, Free> memory_;
};

Parallel threads(int count) {
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
  using S = typename StateOf<T>::type;
  Block<T> w;
  Block<S> m, v, v_max, master;
  Block<G> g;

  explicit TestVariable(int64_t size) : w(size), m(size), v(size), v_max(size), master(size), g(size) {}
  Parameter parameter(const Kind& kind, bool weight_decay, bool layer_adaptation, uint32_t stream) const {
    return {w.bytes(),
            m.bytes(),
            v.bytes(),
            kind.amsgrad ? v_max.bytes() : nullptr,
            kind.rounding == Rounding::kMaster ? master.bytes() : nullptr,
            g.bytes(),
            w.size(),
            weight_decay,
            layer_adaptation,
            stream};
  }
  // The weight that a step begins with.
  double weight(int64_t i, const Kind& kind) const {
    if constexpr (sizeof(T) == 2) {
      const T rounded = stored<T>(master.at(i));
      if (kind.rounding == Rounding::kMaster && (rounded.bits == w[i].bits || widened(rounded) == w.at(i)))
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
std::vector<TestVariable<T, G>> problem(const std::vector<int64_t>& sizes, bool special) {
  std::vector<TestVariable<T, G>> made;
  for (int64_t size : sizes) {
    made.emplace_back(size);
    auto& x = made.back();
    x.w.fill([&](int64_t) { return draw(special); });
    x.m.fill([&](int64_t) { return 0.1 * draw(special); });
    x.v.fill([&](int64_t) { return 0.01 + std::abs(draw(special)); });
    x.v_max.fill([&](int64_t i) { return x.v.at(i) * 1.01; });
    x.g.fill([&](int64_t) { return draw(special); });
    // Every fifth weight was assigned; the others are the rounding of their master weight.
    x.master.fill([&](int64_t i) { return i % 5 == 0 ? draw(special) : x.w.at(i) * (1 + 1e-4 * double(i % 7 - 3)); });
  }
  return made;
}

template <typename T>
Block<T> copy(const Block<T>& from) {
  Block<T> to(from.size());
  if (from.size() > 0) std::memcpy(to.data(), from.data(), from.size() * sizeof(T));
  return to;
}

using Reference = long double;  // its own rounding must not matter

const Step kStep = {0.5, 1.0, 0.1, 0.15, 0.98, 0.0, 0.02, 0.7, 0.3, 0.75, 0.25, 1e-4, 0.01, 0.125, 0.01, 10.0, 3e9};

// One step of the formula, and a check of what the step made of the variable. `g` gives the gradient.
template <typename T, typename G, typename F>
void compare(const char* name, const TestVariable<T, G>& before, const TestVariable<T, G>& after, const Parameter& t,
             const Kind& o, F g, const std::vector<bool>* updated_elements = nullptr) {
  using S = typename StateOf<T>::type;
  const double ulp = sizeof(S) == 8 ? 0x1p-52 : 0x1p-23;
  const double store = std::is_same_v<T, Half> ? 0x1p-11 : std::is_same_v<T, BFloat16> ? 0x1p-8 : ulp / 2;
  const Step& s = kStep;
  const int64_t size = before.w.size();
  std::vector<Reference> u(size), scale(size);
  Reference ww = 0, uu = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (updated_elements && !(*updated_elements)[i]) continue;
    const Reference x = g(i) * s.gradient_scale, w = before.weight(i, o);
    const Reference m = s.momentum_kept * before.m.at(i) + s.beta_3 * x - s.momentum_forgotten * before.m.at(i);
    const Reference v =
        s.velocity_kept * before.v.at(i) + s.one_minus_beta_2 * x * x - s.velocity_forgotten * before.v.at(i);
    const Reference used = o.amsgrad ? std::max<Reference>(v, before.v_max.at(i)) : v;
    const Reference squared =
        o.squared_gradient ? s.velocity_coefficient * used + s.squared_gradient_coefficient * x * x : used;
    const Reference denominator = std::sqrt(squared) + s.epsilon, decay = t.weight_decay ? s.weight_decay : 0.0;
    const Reference gradient = o.trust_ratio ? 0.0 : s.gradient_coefficient;
    u[i] = (s.momentum_coefficient * m + gradient * x) / denominator + decay * w;
    // What rounding is relative to: the terms before they cancel.
    const Reference m_scale = std::abs(before.m.at(i)) + s.beta_3 * std::abs(x);
    scale[i] = (s.momentum_coefficient * m_scale + gradient * std::abs(x)) / denominator + decay * std::abs(w);
    if (!(std::abs(after.m.at(i) - m) <= 4 * ulp * m_scale + 1e-37)) fail(name, "m", i, after.m.at(i), m);
    if (!(std::abs(after.v.at(i) - v) <= 4 * ulp * v + 1e-37)) fail(name, "v", i, after.v.at(i), v);
    if (o.amsgrad && !(std::abs(after.v_max.at(i) - used) <= 4 * ulp * used))
      fail(name, "v_max", i, after.v_max.at(i), used);
    ww += w * w;
    uu += u[i] * u[i];
  }
  Reference step_size = 1;
  if (o.trust_ratio) {
    step_size = t.layer_adaptation && ww > 0 && uu > 0 ? std::sqrt(ww / uu) : Reference(1);
    if (t.layer_adaptation)
      step_size = std::min<Reference>(std::max<Reference>(step_size, s.trust_ratio_min), s.trust_ratio_max);
    step_size *= s.learning_rate;
  }
  for (int64_t i = 0; i < size; ++i) {
    if (updated_elements && !(*updated_elements)[i]) {
      if (std::memcmp(&after.w[i], &before.w[i], sizeof(T)) ||
          std::memcmp(&after.master[i], &before.master[i], sizeof(S)) ||
          std::memcmp(&after.m[i], &before.m[i], sizeof(S)) || std::memcmp(&after.v[i], &before.v[i], sizeof(S))) {
        fail(name, "a row that no id names", i, after.w.at(i), before.w.at(i));
      }
      continue;
    }
    const Reference want = before.weight(i, o) - step_size * u[i];
    // 4 units in the last place of the step and of LAMB's ratio, one rounding to the weight's type. Norms are summed
    // in double, which for double variables is no more exact than what is summed.
    const Reference norms = o.trust_ratio && sizeof(S) == 8 ? std::sqrt(Reference(size)) : 0;
    const Reference computed =
        ((o.trust_ratio ? 8 : 4) + norms) * ulp * step_size * scale[i] + ulp * std::abs(want) + 1e-37;
    const Reference tolerance = computed + (o.rounding == Rounding::kStochastic ? 2 : 1) * store * std::abs(want) +
                                (std::is_same_v<T, Half> ? 6e-8 : 0);
    if (o.rounding == Rounding::kMaster) {
      if (!(std::abs(after.master.at(i) - want) <= computed)) fail(name, "master weight", i, after.master.at(i), want);
      const T rounded = stored<T>(after.master.at(i));
      if (std::memcmp(&rounded, &after.w[i], sizeof(T))) fail(name, "not the master weight's rounding", i, 0, 0);
    }
    if (std::abs(want) < 65504 || !std::is_same_v<T, Half>) {
      if (!(std::abs(after.w.at(i) - want) <= tolerance)) fail(name, "w", i, after.w.at(i), want);
    }
  }
}

template <typename T>
bool same(const Block<T>& a, const Block<T>& b) {
  return a.size() == 0 || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <typename T, typename G>
TestVariable<T, G> copy(const TestVariable<T, G>& from) {
  TestVariable<T, G> to(0);
  to.w = copy(from.w), to.m = copy(from.m), to.v = copy(from.v), to.v_max = copy(from.v_max), to.g = copy(from.g);
  to.master = copy(from.master);
  return to;
}

template <typename T, typename G>
void run(Plan& plan, const std::vector<Parameter>& t, const Loops& loops, const Kind& o, int count) {
  if (o.trust_ratio)
    lamb(plan, t, kStep, loops, threads(count));
  else
    adam(plan, t, kStep, loops.adam, threads(count));
}

// All steps of variables of this type and gradients of that.
template <typename T, typename G>
std::vector<Kind> kinds() {
  std::vector<Kind> made;
  for (Rounding rounding : {Rounding::kNearest, Rounding::kStochastic, Rounding::kMaster}) {
    if (rounding != Rounding::kNearest && sizeof(T) != 2) continue;
    const Kind plain = {type_of<T>(), type_of<G>(), rounding, false, false, false};
    made.insert(made.end(), 5, plain);
    Kind* const own = made.data() + made.size() - 5;
    own[1].squared_gradient = own[2].amsgrad = own[3].squared_gradient = own[3].amsgrad = own[4].trust_ratio = true;
  }
  return made;
}

template <typename T, typename G>
void dense(const char* name, Loops (*loops_of)(const Kind&)) {
  using S = typename StateOf<T>::type;
  const std::vector<int64_t> sizes = {0, 1, 3, 17, 1023, kSpan, kSpan + 1, 18011, 65537};
  for (const Kind& o : kinds<T, G>()) {
    for (bool special : {false, true}) {
      const auto before = problem<T, G>(sizes, special);
      std::vector<TestVariable<T, G>> first;
      for (int count : {1, 2, 7}) {
        std::vector<TestVariable<T, G>> after;
        for (const auto& x : before) after.push_back(copy(x));
        std::vector<Parameter> t;
        Plan plan({sizeof(T), sizeof(S), sizeof(G)});
        for (size_t i = 0; i < after.size(); ++i) {
          t.push_back(after[i].parameter(o, i % 2 == 0, i % 3 != 0, uint32_t(i)));
          plan.add(t[i], int(i), 0, t[i].size, t[i].g);
        }
        run<T, G>(plan, t, loops_of(o), o, count);
        for (size_t i = 0; i < after.size(); ++i) {
          if (!same(after[i].g, before[i].g)) fail(name, "a gradient was written", i, 0, 0);
          if (count == 1) {
            compare(name, before[i], after[i], t[i], o, [&](int64_t k) { return before[i].g.at(k); });
          } else if (!same(after[i].w, first[i].w) || !same(after[i].m, first[i].m) || !same(after[i].v, first[i].v)) {
            fail(name, "other bits with more threads", i, count, 1);
          }
        }
        if (count == 1) first = std::move(after);
      }
    }
  }
  std::printf("dense %s ok\n", name);
}

template <typename T, typename I>
void sparse(const char* name) {
  using S = typename StateOf<T>::type;
  for (int64_t width : {1, 3, 64, 20000}) {
    const int64_t count = width == 20000 ? 5 : 211;
    for (const Kind& o : kinds<T, S>()) {
      for (bool exact : {false, true}) {
        for (int kind = 0; kind < 5; ++kind) {
          std::vector<I> ids;
          if (kind == 1) ids.assign(1, I(count - 1));
          if (kind == 2) ids.assign(9, I(2));
          if (kind == 3)
            for (int64_t i = 0; i < count; ++i) ids.push_back(I(count - 1 - i));
          if (kind == 4)
            for (int64_t i = 0; i < 2 * count; ++i) ids.push_back(I(generator() % (count / 2 + 1)));
          const int64_t given = int64_t(ids.size());
          auto before = std::move(problem<T, S>({count * width}, false)[0]);
          const auto after = copy(before);
          Block<T> values(given * width);
          values.fill([&](int64_t) { return draw(false); });
          before.g.fill([](int64_t) { return 0.0; });
          std::vector<bool> named(count * width, exact);
          std::vector<double> gradient(count * width, 0.0);
          for (int64_t k = 0; k < given; ++k) {
            for (int64_t j = 0; j < width; ++j) {
              gradient[ids[k] * width + j] += values.at(k * width + j);
              named[ids[k] * width + j] = true;
            }
          }
          const Rows found(ids.data(), given);
          Block<S> sums(found.count() * width);
          for (int64_t i = 0; i < found.count(); ++i) {
            found.add_up<T, S>(i, values.data(), width, sums.data() + i * width);
            for (int64_t j = 0; j < width; ++j) {  // the sum as it was rounded: what is left to check is the step
              const double have = sums.at(i * width + j), want = gradient[found.row(i) * width + j];
              if (!(std::abs(have - want) <= 1e-4 * (1 + std::abs(want)))) fail(name, "sum", i, have, want);
              gradient[found.row(i) * width + j] = have;
            }
          }
          std::vector<Parameter> t = {after.parameter(o, true, true, 3)};
          Plan plan({sizeof(T), sizeof(S), sizeof(S)});
          add_rows(plan, t[0], found, width, sums.bytes(), width * sizeof(S), exact);
          run<T, S>(plan, t, loops_for(o), o, 3);
          compare(name, before, after, t[0], o, [&](int64_t k) { return gradient[k]; }, &named);
        }
      }
    }
  }
  std::printf("sparse %s ok\n", name);
}

template <typename G>
void norms(const char* name) {
  std::vector<TestVariable<G, G>> all = problem<G, G>({0, 1, 17, 40000}, false);
  std::vector<Parameter> t;
  double want = 0;
  for (const auto& x : all) {
    t.push_back(x.parameter(Kind{}, true, true, 0));
    for (int64_t i = 0; i < x.g.size(); ++i) want += x.g.at(i) * x.g.at(i);
  }
  const double one = squared_norm(t, sizeof(G), squared_norm_for(type_of<G>()), threads(1));
  const double five = squared_norm(t, sizeof(G), squared_norm_for(type_of<G>()), threads(5));
  if (one != five || !(std::abs(one - want) <= 1e-12 * want)) fail(name, "squared norm", 0, five, want);
  std::printf("norm %s ok\n", name);
}

void conversions() {
  for (uint32_t i = 0; i < 65536; ++i) {  // there and back is the same, and values are IEEE's
    const Half h{uint16_t(i)};
    const int exponent = i >> 10 & 31, fraction = i & 1023;
    const double want = (i & 0x8000 ? -1 : 1) *
                        (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
    const float have = widened(h);
    if (exponent == 31 ? (fraction ? have == have : !std::isinf(have)) : double(have) != want) {
      fail("half", "to float", i, have, want);
    }
    Half back;
    narrow(have, &back);
    if (have == have && back.bits != h.bits) fail("half", "there and back", i, back.bits, h.bits);
    if (exponent == 31 || (i & 0x7fff) >= 0x7bff || (i & 0x8000)) continue;
    // Halfway to the next: to the even one of the two; a little beyond: to the next; a little before: to this one.
    const float middle = float((double(have) + double(widened(Half{uint16_t(i + 1)}))) / 2);
    const float sides[] = {std::nextafterf(middle, 0.0f), middle, std::nextafterf(middle, 1e9f)};
    const uint32_t wants[] = {i, i + (i & 1), i + 1};
    for (int k = 0; k < 3; ++k) {
      narrow(sides[k], &back);
      if (back.bits != wants[k]) fail("half", "from float", i, back.bits, wants[k]);
    }
  }
  for (uint32_t i = 0; i < 0x7f80; ++i) {
    const float low = float_of(i << 16);
    const uint32_t middle = (i << 16) + 0x8000u;
    const uint32_t sides[] = {middle - 1, middle, middle + 1}, wants[] = {i, i + (i & 1), i + 1};
    BFloat16 back;
    narrow(low, &back);
    if (back.bits != i || bits_of(widened(back)) != i << 16) fail("bfloat16", "there and back", i, back.bits, i);
    for (int k = 0; k < 3; ++k) {
      narrow(float_of(sides[k]), &back);
      if (back.bits != wants[k]) fail("bfloat16", "from float", i, back.bits, wants[k]);
    }
  }
  Half h;
  BFloat16 b;
  narrow(NAN, &h);
  narrow(NAN, &b);
  if (widened(h) == widened(h) || widened(b) == widened(b)) fail("NaN", "lost", 0, 0, 0);
  narrow(65520.0f, &h);
  if (!std::isinf(widened(h))) fail("half", "overflow", 0, widened(h), INFINITY);
  // At random: of 8,192 random numbers that differ in the bits that are looked at, as many round up as the distance
  // from the number below says; numbers of the type stay what they are.
  for (uint32_t i = 0; i < 0x7bff; i += 7) {
    const float low = widened(Half{uint16_t(i)}), high = widened(Half{uint16_t(i + 1)});
    for (uint32_t quarters : {0, 1, 2, 3}) {
      int64_t up = 0;
      for (uint32_t r = 0; r < 8192; ++r) {
        narrow_randomly(low + (high - low) * float(quarters) / 4, r | 0xabc00000u, &h);
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
        narrow_randomly(-float_of((i << 16) + cut), r | 0xabcd0000u, &b);
        if (b.bits != (i | 0x8000) && b.bits != ((i + 1) | 0x8000)) fail("bfloat16", "at random", i, b.bits, i);
        up += b.bits != (i | 0x8000);
      }
      if (up != int64_t(cut)) fail("bfloat16", "at random: how often", i, double(up), cut);
    }
  }
  for (float special : {INFINITY, -INFINITY, NAN}) {
    narrow_randomly(special, 0xffffffffu, &h);
    narrow_randomly(special, 0xffffffffu, &b);
    const bool kept = special == special ? widened(h) == special && widened(b) == special
                                         : widened(h) != widened(h) && widened(b) != widened(b);
    if (!kept) fail("at random", "inf or NaN lost", 0, widened(h), widened(b));
  }
  std::printf("conversions ok\n");
}

}  // namespace

namespace tfav {
Loops loops_baseline(const Kind&);
}

int main() {
  std::printf("this processor: %s\n", instruction_set());
  conversions();
  for (auto loops : {loops_for, loops_baseline}) {
    const bool chosen = loops == loops_for;
    dense<float, float>(chosen ? "float" : "float, baseline", loops);
    dense<double, double>(chosen ? "double" : "double, baseline", loops);
    dense<Half, Half>(chosen ? "half" : "half, baseline", loops);
    dense<Half, float>(chosen ? "half, float gradients" : "half, float gradients, baseline", loops);
    dense<BFloat16, BFloat16>(chosen ? "bfloat16" : "bfloat16, baseline", loops);
    dense<BFloat16, float>(chosen ? "bfloat16, float gradients" : "bfloat16, float gradients, baseline", loops);
  }
  sparse<float, int32_t>("float");
  sparse<double, int64_t>("double");
  sparse<Half, int64_t>("half");
  sparse<BFloat16, int32_t>("bfloat16");
  norms<float>("float");
  norms<double>("double");
  norms<Half>("half");
  norms<BFloat16>("bfloat16");
  std::printf("ok\n");
}
