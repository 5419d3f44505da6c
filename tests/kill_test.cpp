// Checkpoints under kill -9: a child saves in a loop and tells each step it has saved through a pipe; it is killed at
// random moments. The folder must always hold a sound checkpoint, not older than the last one acknowledged.
#include <capo/tests/temp_folder.h>
#include <capo/tests/tiny_model.h>

#include <doctest/doctest.h>

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

using namespace capo;
using namespace capo::testing;

namespace {

constexpr const char* kChild = "CAPO_KILL_TEST_CHILD";  // the folder

struct Tiny {
  TinyMlp model{nn::Build{}};
  train::AdamW optimizer{model};
  train::Ema ema{model};
  train::TrainState state{&model, &optimizer, &ema, 0, {}, {}, ""};

  // Every value of the state is its step, so that a mixture of two checkpoints would show.
  void fill(double v) {
    const NoGrad off;
    for (const train::StateList& list : {optimizer.state_list(), ema.state_list()})
      for (const auto& s : list) fill_(s.value, v);
    for (nn::Parameter* p : model.parameters()) fill_(p->value(), v);
    state.position.step = static_cast<std::int64_t>(v);
    model.drop.rng.set_offset(static_cast<std::uint64_t>(v));
  }
  bool all_are(double v) {
    bool ok = model.drop.rng.offset() == static_cast<std::uint64_t>(v);
    const auto look = [&](const Tensor& t) {
      for (const double x : to_vector<double>(t)) ok = ok && x == v;
    };
    for (const train::StateList& list : {optimizer.state_list(), ema.state_list()})
      for (const auto& s : list) look(s.value);
    for (nn::Parameter* p : model.parameters()) look(p->value());
    return ok;
  }
};

}  // namespace

TEST_CASE("kill: the child" * doctest::skip(std::getenv(kChild) == nullptr)) {
  Tiny s;
  train::Checkpointer checkpoints(std::getenv(kChild));
  if (checkpoints.exists()) checkpoints.load(s.state);
  for (;;) {
    const std::int64_t step = s.state.position.step + 1;
    s.fill(static_cast<double>(step));
    checkpoints.save(s.state);
    if (::write(3, &step, sizeof step) != sizeof step) ::_exit(1);
  }
}

TEST_CASE("kill: 200 kills -9, always a sound checkpoint that is new enough" *
          doctest::skip(std::getenv(kChild) != nullptr)) {
  const TempFolder t;
  const std::string folder = t / "run";
  std::uint64_t random = 12345;
  const auto below = [&](std::uint64_t n) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    return (random >> 33) % n;
  };
  std::int64_t acknowledged = 0, unacknowledged = 0, with_previous = 0, while_writing = 0;
  ::setenv(kChild, folder.c_str(), 1);
  for (int round = 0; round < 200; ++round) {
    CAPTURE(round);
    int ends[2];
    REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
    // fork and exec at once: this process has threads.
    const char* arguments[] = {"kill_test", "--test-case=kill: the child", "--no-version", nullptr};
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      if (ends[1] == 3)
        ::fcntl(3, F_SETFD, 0);
      else
        ::dup2(ends[1], 3);
      const int null = ::open("/dev/null", O_WRONLY);
      ::dup2(null, 1);
      ::execv("/proc/self/exe", const_cast<char* const*>(arguments));
      ::_exit(127);
    }
    ::close(ends[1]);
    std::int64_t step = 0;
    if (round % 8 != 0) {  // sometimes it dies before its first save
      REQUIRE(::read(ends[0], &step, sizeof step) == sizeof step);
      acknowledged = step;
      ::usleep(static_cast<useconds_t>(below(12000)));
    } else {
      ::usleep(static_cast<useconds_t>(below(20000)));
    }
    ::kill(child, SIGKILL);
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFSIGNALED(status));
    while (::read(ends[0], &step, sizeof step) == sizeof step) acknowledged = step;
    ::close(ends[0]);

    if (std::filesystem::exists(folder))
      for (const auto& e : std::filesystem::directory_iterator(folder))
        while_writing += contains(e.path().string(), ".tmp.");
    Tiny s;
    train::Checkpointer checkpoints(folder);
    if (acknowledged == 0 && !checkpoints.exists()) continue;
    REQUIRE(checkpoints.load(s.state) == checkpoints.last());
    const std::int64_t at = s.state.position.step;
    REQUIRE(at >= acknowledged);
    REQUIRE(at <= acknowledged + 1);
    unacknowledged += at > acknowledged;
    REQUIRE(s.all_are(static_cast<double>(at)));
    acknowledged = at;
    struct stat st {};
    if (::stat(checkpoints.previous().c_str(), &st) == 0) {
      ++with_previous;
      CHECK_NOTHROW(train::checkpoint_info(checkpoints.previous()));
    }
    int files = 0;
    for ([[maybe_unused]] const auto& e : std::filesystem::directory_iterator(folder)) ++files;
    CHECK(files <= 2);  // temporaries of killed runs are gone
  }
  ::unsetenv(kChild);
  CHECK(acknowledged > 200);
  CHECK(with_previous > 150);
  MESSAGE(acknowledged << " saves, " << while_writing << " kills while writing, " << unacknowledged
                       << " between a rename and its acknowledgement");
}

TEST_CASE("kill: a damaged last falls back to previous, another run's checkpoint is refused" *
          doctest::skip(std::getenv(kChild) != nullptr)) {
  const TempFolder t;
  Tiny s;
  train::Checkpointer checkpoints(t.path());
  CHECK(starts_with(error_of([&] { train::Checkpointer second(t.path()); }), t.path() + ": another run is writing"));
  s.fill(1);
  checkpoints.save(s.state);
  s.fill(2);
  checkpoints.save(s.state);
  std::string bytes = read_file(checkpoints.last(), 1 << 24);
  static std::string said;
  said.clear();
  set_log([](LogLevel, const char* text, void*) { said += text; });
  for (const std::size_t cut : {std::size_t{0}, std::size_t{5}, bytes.size() / 2, bytes.size() - 1}) {
    write_file_atomic(checkpoints.last(), bytes.substr(0, cut));
    s.fill(9);
    CHECK(checkpoints.load(s.state) == checkpoints.previous());
    CHECK(s.all_are(1));
    CHECK(s.state.position.step == 1);
  }
  std::string flipped = bytes;
  flipped[flipped.size() - 3] ^= 1;
  write_file_atomic(checkpoints.last(), flipped);
  said.clear();
  CHECK(checkpoints.load(s.state) == checkpoints.previous());
  CHECK(contains(said, "does not have its stored SHA-256"));
  set_log(nullptr);

  write_file_atomic(checkpoints.last(), bytes);
  s.fill(9);
  const auto refused = [&](const train::TrainState& state, const char* rule) {
    train::TrainState mine = state;
    const std::string text = error_of([&] { checkpoints.load(mine); });
    CHECK_MESSAGE(contains(text, rule), text);
    CHECK(s.all_are(9));
  };
  train::TrainState other = s.state;
  other.seed = 5;
  refused(other, "was made with seed 0, this run has 5");
  other = s.state;
  other.schedule.lr = 5;
  refused(other, "the schedule's lr differs");
  other = s.state;
  other.settings = "batch 3";
  refused(other, "was made with the settings");
  other = s.state;
  other.ema = nullptr;
  refused(other, "unexpected: ema/");
  s.model.fc1.set_trainable(false);
  refused(s.state, "unexpected: model/fc1.weight");
  s.model.fc1.set_trainable(true);
  CHECK(checkpoints.load(s.state) == checkpoints.last());
  CHECK(s.all_are(2));

  // Another model's run in the same folder: the error stays short.
  struct Other : nn::Layer<Other> {
    explicit Other(const nn::Build& build) : Layer(build), parts(this, "parts"), head(this, "head", 16, 3) {
      for (int i = 0; i < 3; ++i) parts.add(16, 16);
    }
    nn::List<nn::Linear> parts;
    nn::Linear head;
  } another({});
  train::TrainState theirs{&another, nullptr, nullptr, 0, {}, {}, "other settings"};
  CHECK(error_of([&] { checkpoints.load(theirs); }) ==
        checkpoints.last() + ": was made by another recipe or model: names, shapes and dtypes must agree; "
        "6 missing: model/parts.0.weight, model/parts.0.bias, model/parts.1.weight, model/parts.1.bias, "
        "model/parts.2.weight, ..; "
        "16 unexpected: optimizer/step, ema/updates, model/fc1.weight, model/fc1.bias, optimizer/m/fc1.weight, ..; "
        "2 misfitting: model/head.weight must be f32 [3, 16], got f32 [4, 16], "
        "model/head.bias must be f32 [3], got f32 [4]");
}

TEST_CASE("kill: frozen parameters are not stored, but checked" * doctest::skip(std::getenv(kChild) != nullptr)) {
  const TempFolder t;
  nn::Build build;
  TinyMlp model(build);
  model.fc1.set_trainable(false);
  train::Checkpointer checkpoints(t.path());
  train::TrainState state{&model, nullptr, nullptr, 0, {}, {}, ""};
  checkpoints.save(state);
  CHECK(SafetensorsReader(checkpoints.last()).entries().size() == 2);  // head
  checkpoints.load(state);
  const NoGrad off;
  fill_(model.fc1.bias->value(), 0.5);
  CHECK(contains(error_of([&] { checkpoints.load(state); }), "belongs to other frozen parameters"));
}
