// The CUDA kernels on the host shim against plain loops in double, under every order of threads; planted bugs; record
// and replay. Linked twice: with ASan and UBSan (shim_test), and with the race checker (shim_race_test).
#include <doctest/doctest.h>

#include <capo/cuda/kernels.h>
#include <capo/cuda/ptx.h>
#include <capo/ops/layer_norm.h>
#include <capo/ops/unary.h>
#include <capo/tests/shim/planted.h>
#include <capo/tests/shim/report.h>
#include <capo/tests/support.h>

#include <random>

namespace capo::kernels {  // as CAPO_KERNEL_CUDA declares them
void unary_cuda(const UnaryArgs& args, std::int64_t items, void* stream);
void layer_norm_cuda(const LayerNormArgs& args, std::int64_t items, void* stream);
void layer_norm_backward_cuda(const LayerNormBackwardArgs& args, std::int64_t items, void* stream);
}

using namespace capo;
using capo::shim::Buffer;
using capo::shim::Config;
using capo::shim::Order;
using capo::testing::contains;
using capo::testing::error_of;
using capo::testing::report_of;
using planted::Bug;

namespace {

const bool kRace = shim::orders().size() == 1;  // the race checker needs one order only

const std::vector<Config> kOrders = [] {
  std::vector<Config> all = shim::orders();
  if (!kRace) all.insert(all.end(), {{Order::warp_ahead, 2}, {Order::random, 3}});
  return all;
}();

std::mt19937 g_random(7);

std::vector<float> normals(std::size_t n, float mean = 0) {
  std::normal_distribution<float> d(mean, 1);
  std::vector<float> v(n);
  for (float& x : v) x = d(g_random);
  return v;
}

// NaN fails.
bool near(double got, double want, double tolerance) {
  return got == want || std::abs(got - want) <= tolerance * (1 + std::abs(want));
}

void check_all(const std::vector<float>& got, const std::vector<double>& want, double tolerance) {
  REQUIRE(got.size() == want.size());
  for (std::size_t i = 0; i < got.size(); ++i)
    if (!near(got[i], want[i], tolerance)) {
      CAPTURE(i);
      CAPTURE(got[i]);
      CAPTURE(want[i]);
      FAIL_CHECK("values differ");
      return;
    }
}

}  // namespace

TEST_CASE("layer_norm forward and backward") {
  const std::int64_t sizes[][2] = {{1, 1}, {3, 5}, {7, 33}, {65, 129}, {130, 300}, {67, 264}, {2, 1544}};
  for (const auto& [rows, columns] : sizes)
    for (const bool rms : {false, true}) {
      const auto n = static_cast<std::size_t>(rows * columns), nc = static_cast<std::size_t>(columns);
      const auto x = normals(n, rms ? 0.0f : 100.0f), dy = normals(n), w = normals(nc, 1), bias = normals(nc);
      const double eps = 1e-5;
      std::vector<double> y(n), dx(n), dw(nc), db(nc);
      for (std::int64_t r = 0; r < rows; ++r) {
        const auto at = [&](std::int64_t c) { return static_cast<std::size_t>(r * columns + c); };
        double mean = 0, var = 0, sg = 0, sgh = 0;
        const double k = static_cast<double>(columns);
        for (std::int64_t c = 0; c < columns && !rms; ++c) mean += x[at(c)] / k;
        for (std::int64_t c = 0; c < columns; ++c) var += (x[at(c)] - mean) * (x[at(c)] - mean) / k;
        const double rstd = 1 / std::sqrt(var + eps);
        for (std::int64_t c = 0; c < columns; ++c) {
          const auto j = static_cast<std::size_t>(c);
          const double h = (x[at(c)] - mean) * rstd, g = static_cast<double>(dy[at(c)]) * w[j];
          y[at(c)] = h * w[j] + bias[j];
          sg += g / k, sgh += g * h / k;
          dw[j] += dy[at(c)] * h, db[j] += dy[at(c)];
        }
        for (std::int64_t c = 0; c < columns; ++c) {
          const double h = (x[at(c)] - mean) * rstd,
                       g = static_cast<double>(dy[at(c)]) * w[static_cast<std::size_t>(c)];
          dx[at(c)] = rstd * (g - (rms ? 0 : sg) - h * sgh);
        }
      }
      for (const Config& order : kOrders) {
        shim::config() = order;
        const std::int64_t chunks = (rows + kLayerNormChunk - 1) / kLayerNormChunk;
        const auto np = static_cast<std::size_t>(chunks * columns), nr = static_cast<std::size_t>(rows);
        const Buffer<float> xd(x, "x"), dyd(dy, "dy"), wd(w, "weight"), bd(bias, "bias"), yd(n, "y"), md(nr, "mean"),
            rd(nr, "rstd"), dxd(n, "dx"), wpart(np, "dweight_part"), bpart(np, "dbias_part"), dwd(nc, "dweight"),
            dbd(nc, "dbias");
        kernels::layer_norm_cuda({f32, f32, rms, xd.get(), wd.get(), bd.get(), yd.get(), rms ? nullptr : md.get(),
                                  rd.get(), rows, columns, eps},
                                 rows, nullptr);
        kernels::layer_norm_backward_cuda(
            {f32, f32, rms, xd.get(), dyd.get(), wd.get(), rms ? nullptr : md.get(), rd.get(), dxd.get(), wpart.get(),
             bpart.get(), rows, columns, dwd.get(), dbd.get()},
            chunks, nullptr);
        check_all(yd.read(), y, columns == 1 ? 2e-2 : 2e-4);
        if (columns > 1) check_all(dxd.read(), dx, 2e-3);
        if (columns > 1) check_all(dwd.read(), dw, 2e-3);
        check_all(dbd.read(), db, 1e-5);
      }
    }
}

TEST_CASE("attention forward on mma") {
  struct Case {
    std::int64_t b, h, nq, nk;
    bool causal, bias;
  };
  const auto value = [](std::uint16_t u) { return static_cast<double>(gpu::from_bf16(u)); };
  const auto halves = [](std::size_t n) {
    std::vector<std::uint16_t> v(n);
    const auto f = normals(n);
    for (std::size_t i = 0; i < n; ++i) v[i] = static_cast<std::uint16_t>(gpu::to_bf16x2(f[i], 0));
    return v;
  };
  for (const Case& c :
       {Case{1, 1, 1, 1, false, false}, Case{1, 2, 33, 65, false, true}, Case{2, 1, 70, 70, true, false},
        Case{1, 1, 130, 60, true, false}, Case{1, 1, 5, 197, false, false}}) {
    const std::int64_t d = 64, w = c.h * d;
    // q, k and v are slices of wider rows, read in place: strides that are not the contiguous ones.
    const std::int64_t qrow = w + 8, krow = 2 * w;
    const auto q = halves(static_cast<std::size_t>(c.b * c.nq * qrow)),
               kv = halves(static_cast<std::size_t>(c.b * c.nk * krow));
    const auto bias = halves(static_cast<std::size_t>(c.h * c.nq * c.nk));
    const double scale = 0.125;
    std::vector<double> o(static_cast<std::size_t>(c.b * c.nq * w)), lse(static_cast<std::size_t>(c.b * c.h * c.nq));
    for (std::int64_t b = 0; b < c.b; ++b)
      for (std::int64_t h = 0; h < c.h; ++h)
        for (std::int64_t i = 0; i < c.nq; ++i) {
          std::vector<double> p(static_cast<std::size_t>(c.nk));
          double sum = 0;
          for (std::int64_t j = 0; j < c.nk; ++j) {
            if (c.causal && j > i + c.nk - c.nq) continue;
            double s = 0;
            for (std::int64_t e = 0; e < d; ++e)
              s += value(q[static_cast<std::size_t>((b * c.nq + i) * qrow + h * d + e)]) *
                   value(kv[static_cast<std::size_t>((b * c.nk + j) * krow + h * d + e)]);
            s = s * scale + (c.bias ? value(bias[static_cast<std::size_t>((h * c.nq + i) * c.nk + j)]) : 0);
            sum += p[static_cast<std::size_t>(j)] = std::exp(s);
          }
          lse[static_cast<std::size_t>((b * c.h + h) * c.nq + i)] = sum > 0 ? std::log(sum) : -INFINITY;
          for (std::int64_t e = 0; e < d && sum > 0; ++e)
            for (std::int64_t j = 0; j < c.nk; ++j)
              o[static_cast<std::size_t>((b * c.nq + i) * w + h * d + e)] +=
                  p[static_cast<std::size_t>(j)] / sum *
                  value(kv[static_cast<std::size_t>((b * c.nk + j) * krow + w + h * d + e)]);
        }
    for (const Config& order : kOrders) {
      shim::config() = order;
      const Buffer<std::uint16_t> qd(q, "q"), kvd(kv, "kv"), bd(bias, "bias"), od(o.size(), "o");
      const Buffer<float> ld(lse.size(), "lse");
      const AttentionArgs args{bf16, qd.get(), kvd.get(), kvd.get() + w, c.bias ? bd.get() : nullptr, od.get(),
                               ld.get(), c.h, c.nq, c.nk, d, d, {c.nq * qrow, qrow, d}, {c.nk * krow, krow, d},
                               {c.nk * krow, krow, d}, {0, c.nq * c.nk, c.nk, 1}, scale, c.causal, 0, 0};
      CHECK(kernels::attention_mma(args, c.b * c.h, nullptr));
      std::vector<float> got;
      for (const std::uint16_t u : od.read()) got.push_back(gpu::from_bf16(u));
      check_all(got, o, 1e-2);
      check_all(ld.read(), lse, 1e-4);
    }
  }
}

TEST_CASE("attention backward on mma") {
  struct Case {
    std::int64_t nq, nk, d, dv;
    bool causal, bias;
  };
  const auto value = [](std::uint16_t u) { return static_cast<double>(gpu::from_bf16(u)); };
  const auto halves = [](std::int64_t n) {
    std::vector<std::uint16_t> v;
    for (const float f : normals(static_cast<std::size_t>(n)))
      v.push_back(static_cast<std::uint16_t>(gpu::to_bf16x2(f, 0)));
    return v;
  };
  const auto at = [](std::int64_t row, std::int64_t width, std::int64_t column) {
    return static_cast<std::size_t>(row * width + column);
  };
  for (const Case& c : {Case{1, 1, 8, 8, false, false}, Case{33, 70, 64, 64, false, true},
                        Case{70, 40, 160, 152, true, false}, Case{40, 66, 200, 7, false, false}}) {
    const auto q = halves(c.nq * c.d), k = halves(c.nk * c.d), v = halves(c.nk * c.dv), d_o = halves(c.nq * c.dv),
               bias = halves(c.nq * c.nk);
    const double scale = 1 / std::sqrt(static_cast<double>(c.d));
    const auto nqk = static_cast<std::size_t>(c.nq * c.nk);
    std::vector<double> p(nqk), ds(nqk), dq(q.size()), dk(k.size()), dv(v.size());
    std::vector<float> lse, delta;
    for (std::int64_t i = 0; i < c.nq; ++i) {
      double sum = 0, mean = 0;
      for (std::int64_t j = 0; j < c.nk; ++j) {
        double s = 0, dp = 0;
        for (std::int64_t e = 0; e < c.d; ++e) s += value(q[at(i, c.d, e)]) * value(k[at(j, c.d, e)]) * scale;
        for (std::int64_t e = 0; e < c.dv; ++e) dp += value(d_o[at(i, c.dv, e)]) * value(v[at(j, c.dv, e)]);
        if (c.bias) s += value(bias[at(i, c.nk, j)]);
        const bool seen = !c.causal || j <= i + c.nk - c.nq;
        sum += p[at(i, c.nk, j)] = seen ? std::exp(s) : 0;
        ds[at(i, c.nk, j)] = dp;
      }
      for (std::int64_t j = 0; j < c.nk && sum > 0; ++j) mean += (p[at(i, c.nk, j)] /= sum) * ds[at(i, c.nk, j)];
      lse.push_back(static_cast<float>(sum > 0 ? std::log(sum) : -INFINITY));
      delta.push_back(static_cast<float>(mean));  // <do, o>
      for (std::int64_t j = 0; j < c.nk; ++j) {
        const double pij = p[at(i, c.nk, j)], g = ds[at(i, c.nk, j)] = pij * (ds[at(i, c.nk, j)] - mean);
        for (std::int64_t e = 0; e < c.d; ++e) {
          dq[at(i, c.d, e)] += scale * g * value(k[at(j, c.d, e)]);
          dk[at(j, c.d, e)] += scale * g * value(q[at(i, c.d, e)]);
        }
        for (std::int64_t e = 0; e < c.dv; ++e) dv[at(j, c.dv, e)] += pij * value(d_o[at(i, c.dv, e)]);
      }
    }
    for (const Config& order : kOrders) {
      shim::config() = order;
      const Buffer<std::uint16_t> qd(q, "q"), kd(k, "k"), vd(v, "v"), bd(bias, "bias"), od(d_o, "do"),
          dqd(q.size(), "dq"), dkd(k.size(), "dk"), dvd(v.size(), "dv");
      const Buffer<float> ld(lse, "lse"), deltad(delta, "delta"), dbd(nqk, "dbias");
      AttentionGradArgs g{};
      g.forward = {bf16,       qd.get(),      kd.get(),      vd.get(),       c.bias ? bd.get() : nullptr,
                   nullptr,    ld.get(),      1,             c.nq,           c.nk,
                   c.d,        c.dv,          {0, c.d, 0},   {0, c.d, 0},    {0, c.dv, 0},
                   {0, 0, c.nk, 1}, scale,    c.causal,      0,              0};
      g.d_o = od.get(), g.delta = deltad.get(), g.dq = dqd.get(), g.dk = dkd.get(), g.dv = dvd.get();
      if (c.bias) g.dbias = dbd.get();
      CHECK(kernels::attention_backward_mma(g, 1, nullptr));
      const auto floats = [](const Buffer<std::uint16_t>& b) {
        std::vector<float> f;
        for (const std::uint16_t u : b.read()) f.push_back(gpu::from_bf16(u));
        return f;
      };
      check_all(floats(dqd), dq, 3e-2);
      check_all(floats(dkd), dk, 3e-2);
      check_all(floats(dvd), dv, 3e-2);
      if (c.bias) check_all(dbd.read(), ds, 3e-2);
    }
  }
}

TEST_CASE("mma and ldmatrix follow the documented fragments") {
  // Small integers: exact in bf16 and f16, and so is every product.
  const auto bf16_bits = [](int v) { return static_cast<std::uint16_t>(gpu::to_bf16x2(static_cast<float>(v), 0)); };
  const auto f16_bits = [](int v) {  // |v| <= 7
    static const std::uint16_t bits[] = {0, 0x3c00, 0x4000, 0x4200, 0x4400, 0x4500, 0x4600, 0x4700};
    return static_cast<std::uint16_t>(bits[std::abs(v)] | (v < 0 ? 0x8000 : 0));
  };
  std::uniform_int_distribution<int> integer(-7, 7);
  std::vector<int> a(256), b(128);
  for (int& v : a) v = integer(g_random);
  for (int& v : b) v = integer(g_random);
  std::vector<double> want(128);
  for (std::size_t i = 0; i < 16; ++i)
    for (std::size_t j = 0; j < 8; ++j)
      for (std::size_t k = 0; k < 16; ++k) want[i * 8 + j] += a[i * 16 + k] * b[j * 16 + k];
  for (const bool is_bf16 : {true, false})
    for (const Config& order : kOrders) {
      shim::config() = order;
      std::vector<std::uint16_t> ah, bh;
      for (const int v : a) ah.push_back(is_bf16 ? bf16_bits(v) : f16_bits(v));
      for (const int v : b) bh.push_back(is_bf16 ? bf16_bits(v) : f16_bits(v));
      const Buffer<std::uint16_t> ad(ah, "a"), bd(bh, "b");
      const Buffer<float> d(128, "d");
      const Buffer<int> wrong(32, "wrong");
      planted::tile_product(is_bf16, ad.get(), bd.get(), d.get(), wrong.get());
      check_all(d.read(), want, 0);
      CHECK(wrong.read() == std::vector<int>(32));
    }
}

TEST_CASE("gelu forward and backward") {
  for (const std::size_t n : {std::size_t{1}, std::size_t{257}, std::size_t{1000}}) {
    const auto x = normals(n), dy = normals(n);
    std::vector<double> y(n), dx(n);
    for (std::size_t i = 0; i < n; ++i) {
      const double v = x[i], cdf = 0.5 * (1 + std::erf(v / std::sqrt(2.0)));
      y[i] = v * cdf;
      dx[i] = dy[i] * (cdf + v * std::exp(-0.5 * v * v) / std::sqrt(2 * 3.14159265358979323846));
    }
    for (const Config& order : kOrders) {
      shim::config() = order;
      const Buffer<float> xd(x, "x"), dyd(dy, "dy"), yd(n, "y"), dxd(n, "dx");
      const auto items = static_cast<std::int64_t>(n);
      kernels::unary_cuda({UnaryKind::gelu, f32, xd.get(), nullptr, yd.get(), 0, 0, items}, items, nullptr);
      kernels::unary_cuda({UnaryKind::gelu, f32, xd.get(), dyd.get(), dxd.get(), 0, 0, items}, items, nullptr);
      check_all(yd.read(), y, 1e-5);
      check_all(dxd.read(), dx, 1e-5);
    }
  }
}

namespace {

// "" or how the shim, or the comparison, tells that mirror has this bug.
std::string found(Bug bug, const Config& order) {
  shim::config() = order;
  const std::int64_t blocks = 3;
  const auto n = static_cast<std::size_t>(blocks * planted::kThreads);
  const auto x = normals(n);
  const Buffer<float> xd(x, "x"), yd(n, "y");
  const std::string text = error_of([&] { planted::mirror(bug, xd.get(), yd.get(), blocks); });
  if (text != "no error") return text;
  const auto y = yd.read();
  for (std::size_t i = 0; i < n; ++i) {
    const std::size_t t = i % planted::kThreads;
    if (!(y[i] == x[i - t + planted::kThreads - 1 - t])) return cat("value ", i, " is wrong");
  }
  return "";
}

}  // namespace

TEST_CASE("planted bugs are found") {
  for (const Config& order : kOrders) CHECK(found(Bug::none, order) == "");
  const Config forward{Order::forward, 0};
  const auto names = [&](Bug bug, const char* part) {
    for (const Config& order : kOrders) {
      const std::string text = found(bug, order);
      CAPTURE(text);
      CHECK(contains(text, part));
      CHECK(contains(text, "thread"));
    }
  };
  names(Bug::wrong_mask, "which this lane is not in");
  names(Bug::divergent_barrier, "divergent __syncthreads");
  CHECK(contains(found(Bug::divergent_shuffle, forward), "no thread can run"));
  CHECK(contains(found(Bug::early_exit, forward), "leaves while thread 0"));
  CHECK(found(Bug::unwritten, forward) != "");
  if (kRace) {
    names(Bug::no_barrier, "tile");
    names(Bug::no_syncwarp, "tile");
    names(Bug::shared_word, "tile");
    names(Bug::other_block, "another block");
    names(Bug::no_wait, "dynamic part");
    names(Bug::global_index, "outside");
    return;
  }
  int barrier = 0, wait = 0;
  for (const Config& order : kOrders) {
    barrier += found(Bug::no_barrier, order) != "";
    wait += found(Bug::no_wait, order) != "";
  }
  CHECK(barrier >= 3);
  CHECK(wait >= 3);
  for (const Bug bug : {Bug::global_index, Bug::shared_index, Bug::carved_index}) {
    const std::string text = report_of([&] { found(bug, forward); });
    CAPTURE(text);
    CHECK((contains(text, "AddressSanitizer") || contains(text, "out of bounds")));
    CHECK(contains(text, "planted.cu"));
  }
}

TEST_CASE("many failures in one process") {
  shim::config() = {};
  for (int i = 0; i < 50; ++i)
    CHECK(found(i % 2 ? Bug::divergent_barrier : Bug::wrong_mask, {Order::random, static_cast<std::uint64_t>(i)}) !=
          "");
  CHECK(found(Bug::none, {}) == "");
}

TEST_CASE("a replayed step with frozen arguments is found") {
  shim::config() = {};
  const std::int64_t n = 150;
  const auto size = static_cast<std::size_t>(n);
  const auto w0 = normals(size);
  const std::vector<std::vector<float>> g = {normals(size), normals(size), normals(size)};
  const planted::StepState states[] = {{0.1f, 11}, {0.05f, 12}, {0.025f, 13}};

  const auto train = [&](bool frozen, bool replayed, std::vector<std::string>* differing) {
    const Buffer<float> w(w0, "w"), gd(g[0], "g");
    const Buffer<planted::StepState> state(1, "state");
    std::vector<shim::Launch> first;
    for (std::size_t s = 0; s < 3; ++s) {
      gd.set(g[s]);
      state.set({states[s]});
      if (replayed && s > 0) {
        shim::replay(first);
        continue;
      }
      shim::start_recording();
      planted::step(frozen, w.get(), gd.get(), n, states[s].rate, states[s].seed, state.get());
      const auto now = shim::stop_recording();
      if (s == 0) first = now;
      if (differing && s == 1) *differing = shim::frozen_arguments(first, now);
    }
    return w.read();
  };
  std::vector<std::string> by_value, by_pointer;
  CHECK(train(true, false, &by_value) == train(false, false, &by_pointer));
  CHECK(train(false, true, nullptr) == train(false, false, nullptr));
  CHECK(train(true, true, nullptr) != train(true, false, nullptr));
  CHECK(by_pointer.empty());
  CHECK(by_value == std::vector<std::string>{"step_by_value, argument 3", "step_by_value, argument 4"});
}
