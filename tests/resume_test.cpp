// A run stopped after any step and resumed from its checkpoint gives the bits of the run that never stopped.
#include <capo/models/train/tensorboard.h>
#include <capo/tests/temp_folder.h>
#include <capo/tests/tiny_model.h>

#include <doctest/doctest.h>

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

using namespace capo;
using namespace capo::testing;

namespace {

struct Run {
  std::vector<double> losses;  // by step
  std::string weights, ema;
  std::vector<double> scores;  // validation loss, training loss and "best" by epoch
  train::TrainResult result;
  std::string csv;
};

// csv without its last column, the speed.
std::string without_speed(const std::string& text) {
  std::string out;
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t end = text.find('\n', at);
    out += text.substr(at, text.rfind(',', end) - at) + "\n";
    at = end + 1;
  }
  return out;
}

constexpr const char* kChild = "CAPO_RESUME_TEST_CHILD";  // the folder; then this process is there to be killed

Run run(const std::string& folder, std::int64_t max_steps, train::OptimizerKind kind, DType dtype = f32) {
  nn::Build build;
  build.seed = 7;
  build.dtype = dtype;
  TinyMlp model(build);
  train::ClassifierOf classifier(model);
  train::ClassificationTask task(classifier, 0.1);
  SyntheticSource data(5, 8, 1, dtype), held_out(2, 8, 2, dtype);
  train::TrainOptions o;
  o.epochs = 3;
  o.accumulate = 2;
  o.optimizer = kind;
  o.schedule.lr = 0.02;
  o.warmup_epochs = 0.7;
  o.clip_norm = 0.5;
  o.ema_decay = 0.9;
  o.seed = 7;
  o.checkpoint_dir = folder;
  o.csv = folder + "/log.csv";
  o.log_every = 1;
  o.max_steps = max_steps;
  Run r;
  o.on_progress = [](const train::Progress& p, void* user) { static_cast<Run*>(user)->losses.push_back(p.loss); };
  if (std::getenv(kChild)) {
    o.checkpoint_seconds = 0;  // after every step
    o.on_progress = [](const train::Progress&, void*) { ::usleep(1000); };
  }
  o.user = &r;
  train::Trainer trainer(task, data, &held_out, o);
  r.result = trainer.run();
  r.weights = bytes_of(nn::state_dict(model, nn::Part::all)) + bytes_of(trainer.optimizer().state());
  r.ema = bytes_of(trainer.ema()->state());
  for (const auto& e : r.result.epochs)
    for (const double v : {e.validation.loss, e.train_loss, e.best ? 1.0 : 0.0}) r.scores.push_back(v);
  r.csv = without_speed(read_file(o.csv, 1 << 20));
  return r;
}

void check_every_stop(train::OptimizerKind kind, DType dtype) {
  const TempFolder whole;
  const Run straight = run(whole.path(), 0, kind, dtype);
  constexpr std::int64_t kSteps = 9;
  REQUIRE(straight.losses.size() == kSteps);
  CHECK(!straight.result.stopped);
  CHECK(straight.losses.back() < straight.losses.front());
  for (std::int64_t k = 1; k <= kSteps; ++k) {
    CAPTURE(k);
    const TempFolder t;
    const Run first = run(t.path(), k, kind, dtype);
    CHECK(first.result.stopped);
    CHECK(first.result.position.step == k);
    const Run second = run(t.path(), 0, kind, dtype);
    CHECK(second.result.resumed_from == t / "last.safetensors");
    std::vector<double> losses = first.losses, scores = first.scores;
    losses.insert(losses.end(), second.losses.begin(), second.losses.end());
    scores.insert(scores.end(), second.scores.begin(), second.scores.end());
    CHECK(losses == straight.losses);
    CHECK(scores == straight.scores);
    CHECK((second.weights == straight.weights));
    CHECK((second.ema == straight.ema));
    CHECK(second.csv == straight.csv);
    CHECK(second.result.position.best == straight.result.position.best);
  }
}

}  // namespace

TEST_CASE("resume: AdamW, after any step") { check_every_stop(train::OptimizerKind::adamw, f32); }
TEST_CASE("resume: SGD, after any step") { check_every_stop(train::OptimizerKind::sgd, f32); }
TEST_CASE("resume: Muon, after any step") { check_every_stop(train::OptimizerKind::muon, f32); }
TEST_CASE("resume: Muon, bf16 weights") { check_every_stop(train::OptimizerKind::muon, bf16); }
TEST_CASE("resume: bf16 weights with f32 masters") { check_every_stop(train::OptimizerKind::adamw, bf16); }

TEST_CASE("resume: several stops in one run, and a finished run stays finished") {
  const TempFolder whole, t;
  const Run straight = run(whole.path(), 0, train::OptimizerKind::adamw);
  for (const std::int64_t k : {2, 3, 7}) run(t.path(), k, train::OptimizerKind::adamw);
  const Run last = run(t.path(), 0, train::OptimizerKind::adamw);
  CHECK((last.weights == straight.weights));
  CHECK(last.csv == straight.csv);
  const Run again = run(t.path(), 0, train::OptimizerKind::adamw);
  CHECK(again.losses.empty());
  CHECK((again.weights == straight.weights));
}

TEST_CASE("resume: rows that the log has beyond the checkpoint are dropped") {
  const TempFolder t;
  const Run first = run(t.path(), 4, train::OptimizerKind::adamw);
  {
    train::CsvLog more(t / "log.csv", "step,epoch,kind,lr,loss,grad_norm,top1,top5,images_per_s", 1000, 1000);
    more.row("5,1,train,1,1,1,,,1");
    more.row("6,1,tra");
  }
  const TempFolder whole;
  CHECK(run(t.path(), 0, train::OptimizerKind::adamw).csv == run(whole.path(), 0, train::OptimizerKind::adamw).csv);
}

TEST_CASE("resume: the child" * doctest::skip(std::getenv(kChild) == nullptr)) {
  run(std::getenv(kChild), 0, train::OptimizerKind::adamw);
}

TEST_CASE("resume: a run killed with -9 again and again ends with the same bits" *
          doctest::skip(std::getenv(kChild) != nullptr)) {
  const TempFolder whole, t;
  const std::string folder = t / "run";
  const Run straight = run(whole.path(), 0, train::OptimizerKind::adamw);
  int kills = 0;
  bool finished = false;
  ::setenv(kChild, folder.c_str(), 1);
  for (int round = 0; round < 200 && !finished; ++round) {
    const char* arguments[] = {"resume_test", "--test-case=resume: the child", "--no-version", nullptr};
    const pid_t child = ::fork();  // exec follows at once: this process has threads
    REQUIRE(child >= 0);
    if (child == 0) {
      ::dup2(::open("/dev/null", O_WRONLY | O_CLOEXEC), 1);
      ::execv("/proc/self/exe", const_cast<char* const*>(arguments));
      ::_exit(127);
    }
    ::usleep(static_cast<useconds_t>(3000 + 1700 * (round % 17)));
    ::kill(child, SIGKILL);
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    finished = WIFEXITED(status);
    if (finished) REQUIRE(WEXITSTATUS(status) == 0);
    kills += !finished;
  }
  ::unsetenv(kChild);
  const Run last = run(folder, 0, train::OptimizerKind::adamw);
  CHECK((last.weights == straight.weights));
  CHECK((last.ema == straight.ema));
  CHECK(last.csv == straight.csv);
  MESSAGE(kills << " kills");
}
