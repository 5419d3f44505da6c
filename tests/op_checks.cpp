// check_case: every check on every sample of one op, under the debug allocator. Letters refer to tests/op_checks.h.
//
// CAPO_TEST_CHECKS=device (any name of kChecks) in the environment runs that check alone; "device" then demands a
// device, where it otherwise passes in silence without one.
#include <capo/engine/backend.h>
#include <capo/tests/op_checks.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>

namespace capo::test {
namespace {

// (j) Every block is filled with NaN and guarded while the checks run.
class UnderDebugAllocator {
 public:
  UnderDebugAllocator() : before_(set_cpu_allocator(&DebugAllocator::instance())) {}
  ~UnderDebugAllocator() { set_cpu_allocator(before_); }

 private:
  Allocator* before_;
};

struct NamedCheck {
  const char* name;
  void (*run)(const Subject&);
};
constexpr NamedCheck kChecks[] = {
    {"meta", check_meta},         {"value", check_value},       {"f32", check_f32},
    {"half", check_half},         {"layouts", check_layouts},   {"gradient", check_gradient},
    {"subsets", check_subsets},   {"second order", check_second_order},
    {"repeat", check_repeat},     {"threads", check_threads},   {"isa", check_isa},
    {"device", check_device},     {"nothing kept", check_nothing_kept},
};

std::string check_error(const std::string& op, const ErrorSample& sample) {
  try {
    sample.run();
  } catch (const Error& e) {
    const std::string text = e.what();
    const std::string& wanted = sample.must_contain;
    // An op made of others may fail in their name: must_contain then gives the start, "slice: ...".
    const bool named = text.rfind(op, 0) == 0 || (wanted.find(':') != std::string::npos && text.rfind(wanted, 0) == 0);
    if (!named) return "the text does not start with the op's name: " + text;
    if (text.find(wanted) == std::string::npos) return "the text lacks \"" + wanted + "\": " + text;
    return "";
  } catch (const std::exception& e) {
    return cat("threw something else than capo::Error: ", e.what());
  }
  return "did not throw";
}

bool is_recorded(const Tensor& t) {
  const auto* slot = static_cast<const GradSlot*>(t.grad_slot().get());
  return slot && slot->node;
}

Subject subject_of(const OpCase& c, const Sample& sample) {
  Subject s{c.name, sample, {}, sample.wanted};
  for (const auto& t : sample.inputs) s.inputs.push_back(lay_out(t, Layout::plain));
  if (s.wanted.empty())
    for (const auto& t : s.inputs) s.wanted.push_back(t.defined() && is_floating(t.dtype()));
  return s;
}

}  // namespace

void check_nothing_kept(const Subject& s) {
  const std::vector<bool> frozen(s.inputs.size(), false);
  const auto kept = [&](const std::vector<bool>& which) {
    const Tensors leaves = leaves_of(s.inputs, which);
    const SavedBytes saved;
    const Tensors outputs = s.sample.run(leaves);
    if (which == frozen || !grad_enabled())
      for (const auto& y : outputs)
        expect(!y.defined() || !is_recorded(y), "recorded although no input needs a gradient");
    return saved.total();
  };
  expect(kept(frozen) == 0, "keeps bytes although every input is frozen");
  if (!differentiable(s)) return;
  {
    const NoGrad off;
    expect(kept(s.wanted) == 0, "keeps bytes under NoGrad");
  }
  const std::int64_t full = kept(s.wanted);
  for (std::size_t i = 0; i < s.wanted.size(); ++i) {
    if (!s.wanted[i]) continue;
    std::vector<bool> which = s.wanted;
    which[i] = false;
    expect(kept(which) <= full, cat("keeps more with input ", i, " frozen than with none"));
  }
}

std::vector<std::string> check_case(const OpCase& c, const std::string& named) {
  const char* wanted = std::getenv("CAPO_TEST_CHECKS");
  const std::string only = !named.empty() ? named : wanted ? wanted : "";
  if (!only.empty() &&
      std::none_of(std::begin(kChecks), std::end(kChecks), [&](const NamedCheck& known) { return only == known.name; }))
    return {cat("CAPO_TEST_CHECKS: there is no check \"", only, "\"")};
  if (only == "device" && device_count() == 0)
    return {"CAPO_TEST_CHECKS=device, and this build or machine has no CUDA device"};
  std::vector<std::string> failures;
  const UnderDebugAllocator guarded;
  for (const auto& sample : c.samples) {
    const auto attempt = [&](const char* name, auto run) {
      try {
        run();
      } catch (const std::exception& e) {
        failures.push_back(cat(c.name, " \"", sample.label, "\" [", name, "]: ", e.what()));
      }
    };
    attempt("setup", [&] {
      const Subject subject = subject_of(c, sample);
      expect(subject.wanted.size() == subject.inputs.size(), "`wanted` needs one entry per input");
      for (const auto& check : kChecks)
        if (only.empty() || only == check.name) attempt(check.name, [&] { check.run(subject); });
      attempt("inputs", [&] { compare_bits("input after all checks", subject.inputs, subject_of(c, sample).inputs); });
    });
    attempt("guards", [] { DebugAllocator::instance().check(); });
  }
  if (!only.empty()) return failures;
  for (const auto& sample : c.errors) {
    const std::string text = check_error(c.name, sample);
    if (!text.empty()) failures.push_back(cat(c.name, " \"", sample.label, "\" [error]: ", text));
  }
  return failures;
}

}  // namespace capo::test
