#include <capo/engine/files.h>
#include <capo/engine/safetensors.h>
#include <capo/engine/sha256.h>
#include <capo/engine/threads.h>
#include <capo/models/train/checkpoint.h>

#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <unordered_map>

namespace capo::train {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

constexpr int kFormat = 1;
constexpr const char* kKey = "capo.checkpoint";
constexpr const char* kLibrary = "capo " CAPO_VERSION;  // defined by cmake/library.cmake for this file

// A damaged file, as opposed to a sound one that belongs to another run.
class Damaged : public Error {
 public:
  using Error::Error;
};

std::string errno_text(int code) { return std::strerror(code); }

bool present(const std::string& path) {
  struct stat st {};
  return ::stat(path.c_str(), &st) == 0;
}

// Finite doubles are written with as many digits as bring them back exactly; JSON has no infinities.
Json exact(double v) { return std::isfinite(v) ? Json(v) : Json(v > 0 ? "inf" : v < 0 ? "-inf" : "nan"); }
double exact(const Json& j) {
  if (j.is_number()) return j.get<double>();
  const auto text = j.get<std::string>();
  const double inf = std::numeric_limits<double>::infinity();
  return text == "inf" ? inf : text == "-inf" ? -inf : std::numeric_limits<double>::quiet_NaN();
}

std::vector<std::string> hashes(const nn::StateDict& dict) {
  std::vector<std::string> out(dict.size());
  parallel_for(static_cast<std::int64_t>(dict.size()), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const Tensor& t = dict[static_cast<std::size_t>(i)].value;
      Sha256 h;
      if (t.numel() > 0) h.update(t.data(), t.nbytes());
      out[static_cast<std::size_t>(i)] = h.hex();
    }
  });
  return out;
}

StateList list_of(const TrainState& state) {
  StateList all;
  for (nn::Parameter* p : state.module->parameters(true))
    if (p->trainable() || p->is_buffer()) all.push_back({cat("model/", p->path()), p->value(), p->layout()});
  const auto append = [&](const char* prefix, StateList part) {
    for (auto& s : part) all.push_back({cat(prefix, s.name), std::move(s.value), s.layout});
  };
  if (state.optimizer) append("optimizer/", state.optimizer->state_list());
  if (state.ema) append("ema/", state.ema->state_list());
  return all;
}

Json json_of(const Schedule& s) {
  return {{"decay", to_string(s.decay)}, {"lr", exact(s.lr)}, {"min_lr", exact(s.min_lr)},
          {"warmup_steps", s.warmup_steps}, {"total_steps", s.total_steps}};
}

struct File {
  nn::StateDict dict;
  Json info;
};

// Reads and checks the container and every hash.
File read_checkpoint(const std::string& path) {
  File file;
  try {
    const SafetensorsReader reader(path, kHeaderBytesLimit);
    file.info = Json::parse(reader.metadata(kKey));
    for (const auto& e : reader.entries()) {
      const Tensor t = empty(e.shape, e.dtype);
      if (e.bytes() > 0) reader.copy_bytes(e, t.data(), e.bytes());
      file.dict.push_back({e.name, t});
    }
    const Json& wanted = file.info.at("sha256");
    CAPO_CHECK(wanted.size() == file.dict.size(), path, ": must list a hash for each of ", file.dict.size(),
               " tensors, got ", wanted.size());
    const auto got = hashes(file.dict);
    for (std::size_t i = 0; i < got.size(); ++i)
      CAPO_CHECK(wanted.at(file.dict[i].name).get<std::string>() == got[i], path, ": tensor ", file.dict[i].name,
                 " does not have its stored SHA-256");
  } catch (const Json::exception& e) {
    throw Damaged(cat(path, ": must be a checkpoint, its metadata are not: ", e.what()));
  } catch (const OutOfMemory&) {
    throw;
  } catch (const Error& e) {
    throw Damaged(e.what());
  }
  return file;
}

}  // namespace

std::vector<std::pair<std::string, Generator*>> generators(nn::Module& module) {
  std::vector<std::pair<std::string, Generator*>> all;
  for (nn::Module* m : module.modules())
    if (Generator* g = m->generator()) all.emplace_back(m->path(), g);
  return all;
}

Checkpointer::Checkpointer(const std::string& dir) : dir_(dir) {
  std::error_code error;
  fs::create_directories(dir, error);
  lock_ = ::open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  CAPO_CHECK(lock_ >= 0, dir, ": cannot open the checkpoint folder, ", errno_text(errno));
  if (::flock(lock_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {  // other errors: a file system without locks
    ::close(lock_);
    detail::fail(dir, ": another run is writing checkpoints to this folder");
  }
  for (const auto& entry : fs::directory_iterator(dir, error)) {
    const std::string name = entry.path().filename().string();
    for (const char* prefix : {"last.safetensors.tmp.", "previous.safetensors.tmp."})
      if (name.rfind(prefix, 0) == 0) ::unlink(entry.path().c_str());
  }
}

Checkpointer::~Checkpointer() { ::close(lock_); }

bool Checkpointer::exists() const { return present(last()) || present(previous()); }

std::string Checkpointer::frozen_hash(nn::Module& module) {
  std::vector<nn::Parameter*> frozen;
  for (nn::Parameter* p : module.parameters())
    if (!p->trainable()) frozen.push_back(p);
  std::vector<std::pair<const void*, std::uint64_t>> key;
  for (nn::Parameter* p : frozen) key.emplace_back(p->value().storage().get(), p->value().storage()->version());
  if (!frozen_hash_.empty() && key == frozen_key_) return frozen_hash_;
  std::sort(frozen.begin(), frozen.end(), [](auto* a, auto* b) { return a->path() < b->path(); });
  Sha256 all;
  for (nn::Parameter* p : frozen) {
    const Tensor t = nn::to_file_layout(to_host(p->value()).detach(), p->layout());
    all.update(cat(p->path(), '\n', t.dtype(), '\n', t.shape(), '\n'));
    if (t.numel() > 0) all.update(t.data(), t.nbytes());
  }
  frozen_key_ = std::move(key);
  return frozen_hash_ = all.hex();
}

void Checkpointer::save(const TrainState& state) {
  CAPO_CHECK(state.module, "checkpoint: a module is needed");
  const nn::StateDict dict = copy_out(list_of(state));
  const auto sha = hashes(dict);
  const Position& at = state.position;
  Json info{{"format", kFormat}, {"library", kLibrary}, {"epoch", at.epoch}, {"batch", at.batch}, {"step", at.step},
            {"best", exact(at.best)}, {"loss_sum", exact(at.loss_sum)}, {"loss_count", at.loss_count},
            {"csv_rows", at.csv_rows}, {"loss_scale", at.loss_scale}, {"clean_steps", at.clean_steps},
            {"seed", state.seed}, {"schedule", json_of(state.schedule)}, {"settings", state.settings},
            {"frozen_sha256", frozen_hash(*state.module)}, {"generators", Json::object()}, {"sha256", Json::object()}};
  for (const auto& [path, g] : generators(*state.module))
    info["generators"][path] = {{"seed", g->seed()}, {"stream", g->stream()}, {"offset", g->offset()}};
  for (std::size_t i = 0; i < dict.size(); ++i) info["sha256"][dict[i].name] = sha[i];

  std::vector<TensorSpec> specs;
  std::unordered_map<std::string, const Tensor*> by_name;
  for (const auto& t : dict) {
    specs.push_back({t.name, t.value.dtype(), t.value.shape()});
    by_name[t.name] = &t.value;
  }
  std::string text;
  try {
    text = info.dump();
  } catch (const Json::exception& e) {
    detail::fail("checkpoint: names and settings must be valid UTF-8: ", e.what());
  }
  SafetensorsWriter writer(last(), specs, {{kKey, text}});
  for (const auto& e : writer.entries())
    if (e.bytes() > 0) writer.append(by_name.at(e.name)->data(), e.bytes());
  if (present(last())) {
    // previous becomes a second name of last: at no moment is there no complete file under `last`.
    const std::string temp = cat(previous(), ".tmp.", static_cast<long long>(::getpid()));
    ::unlink(temp.c_str());
    if (::link(last().c_str(), temp.c_str()) == 0) {
      const int code = ::rename(temp.c_str(), previous().c_str()) == 0 ? 0 : errno;
      ::unlink(temp.c_str());  // rename() leaves it when both are names of one file already
      CAPO_CHECK(code == 0, previous(), ": cannot rename the temporary file over it, ", errno_text(code));
    } else {
      log(LogLevel::warning, cat(previous(), ": not kept, this file system makes no hard links, ", errno_text(errno)));
    }
  }
  writer.commit();
}

std::string Checkpointer::load(TrainState& state) {
  CAPO_CHECK(state.module, "checkpoint: a module is needed");
  File file;
  std::string path = last();
  try {
    file = read_checkpoint(path);
  } catch (const Damaged& e) {
    if (!present(previous())) throw Error(e.what());
    log(LogLevel::warning, cat(e.what(), "; going back to ", previous()));
    path = previous();
    try {
      file = read_checkpoint(path);
    } catch (const Damaged& both) {
      throw Error(cat(e.what(), "; ", both.what()));
    }
  }

  // Everything is checked before anything is changed.
  const StateList list = list_of(state);
  const auto streams = generators(*state.module);
  Position at;
  struct Stream {
    std::uint64_t seed, offset;
  };
  std::vector<Stream> stored;
  try {
    const Json& info = file.info;
    CAPO_CHECK(info.at("format") == kFormat, path, ": format must be ", kFormat, ", got ", info.at("format").dump());
    check_names(cat(path, ": was made by another recipe or model"), list, file.dict);
    CAPO_CHECK(info.at("seed").get<std::uint64_t>() == state.seed, path, ": was made with seed ",
               info.at("seed").dump(), ", this run has ", state.seed);
    const Json schedule = json_of(state.schedule);
    for (const auto& [key, value] : schedule.items())
      CAPO_CHECK(info.at("schedule").at(key) == value, path, ": the schedule's ", key, " differs from this run's");
    CAPO_CHECK(info.at("settings") == state.settings, path, ": was made with the settings \"",
               info.at("settings").get<std::string>(), "\", this run has \"", state.settings, "\"");
    const std::string frozen = frozen_hash(*state.module);
    CAPO_CHECK(info.at("frozen_sha256") == frozen, path, ": belongs to other frozen parameters, their SHA-256 must be ",
               info.at("frozen_sha256").get<std::string>(), ", got ", frozen);
    const Json& g = info.at("generators");
    CAPO_CHECK(g.size() == streams.size(), path, ": holds ", g.size(), " random streams, the module has ",
               streams.size());
    for (const auto& [name, generator] : streams) {
      CAPO_CHECK(g.contains(name), path, ": has no random stream of ", name);
      const Json& s = g.at(name);
      CAPO_CHECK(s.at("stream").get<std::uint64_t>() == generator->stream(), path, ": the random stream of ", name,
                 " differs");
      stored.push_back({s.at("seed").get<std::uint64_t>(), s.at("offset").get<std::uint64_t>()});
    }
    at.epoch = info.at("epoch").get<std::int64_t>();
    at.batch = info.at("batch").get<std::int64_t>();
    at.step = info.at("step").get<std::int64_t>();
    at.best = exact(info.at("best"));
    at.loss_sum = exact(info.at("loss_sum"));
    at.loss_count = info.at("loss_count").get<std::int64_t>();
    at.csv_rows = info.at("csv_rows").get<std::int64_t>();
    at.loss_scale = info.value("loss_scale", 1.0);  // older files have none
    at.clean_steps = info.value("clean_steps", std::int64_t{0});
  } catch (const Json::exception& e) {
    throw Error(cat(path, ": must be a checkpoint, its metadata are not: ", e.what()));
  }
  copy_in(path, list, file.dict);
  for (std::size_t i = 0; i < streams.size(); ++i) {
    streams[i].second->reseed(stored[i].seed);
    streams[i].second->set_offset(stored[i].offset);
  }
  state.position = at;
  return path;
}

std::string checkpoint_info(const std::string& path) {
  try {
    return read_checkpoint(path).info.dump();
  } catch (const Damaged& e) {
    throw Error(e.what());
  }
}

}  // namespace capo::train
