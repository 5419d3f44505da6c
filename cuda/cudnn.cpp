// cuDNN 9: the library, its handles and its plans, for cuda/cudnn_conv.cpp and cuda/cudnn_attention.cpp. Loaded at
// first use, so that neither a build nor a run without it needs it.
// Not on the shim: cuDNN runs on a card alone; our own kernels, on which every sample runs, take its place.
//
// Of the engines that cuDNN's heuristics list for a graph (mode A, then its fallbacks) the first is taken that repeats
// its bits, keeps sums in f32 and operands as they are, and needs no more than our workspace. It is kept per problem.
#include <capo/cuda/cudnn.h>
#include <capo/engine/error.h>

#include <cstdlib>
#include <string_view>

namespace capo {
namespace {

// CAPO_CUDNN: 0 (or nothing), 1, log.
std::string_view wanted() {
  static const std::string_view text = [] {
    const char* t = std::getenv("CAPO_CUDNN");
    const std::string_view s = t && *t ? t : "0";
    CAPO_CHECK(s == "0" || s == "1" || s == "log", "CAPO_CUDNN: must be 0, 1 or log, got ", s);
    return s;
  }();
  return text;
}

}  // namespace
}  // namespace capo

#if !defined(CAPO_WITH_CUDNN)

namespace capo::kernels {
namespace {
bool refuse() {
  CAPO_CHECK(wanted() == "0", "CAPO_CUDNN=", wanted(),
             ": this build has no cuDNN: its headers were not found when it was configured");
  return false;
}
}  // namespace

bool cudnn_conv(const ConvDirectArgs&, void*) { return refuse(); }
bool cudnn_conv_weight_gradient(const ConvWeightPartsArgs&, void*) { return refuse(); }
bool cudnn_attention(const AttentionArgs&, std::int64_t, void*) { return refuse(); }
bool cudnn_attention_backward(const AttentionGradArgs&, std::int64_t, void*) { return refuse(); }

}  // namespace capo::kernels

#else

#include <capo/cuda/cudnn_graph.h>
#include <capo/cuda/runtime.h>
#include <capo/engine/backend.h>

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>

namespace capo::cudnn {
namespace {

// The functions that we call.
struct Api {
  decltype(&cudnnGetVersion) version;
  decltype(&cudnnGetErrorString) text;
  decltype(&cudnnCreate) create;
  decltype(&cudnnSetStream) set_stream;
  decltype(&cudnnBackendCreateDescriptor) make;
  decltype(&cudnnBackendDestroyDescriptor) destroy;
  decltype(&cudnnBackendSetAttribute) set;
  decltype(&cudnnBackendGetAttribute) get;
  decltype(&cudnnBackendFinalize) finish;
  decltype(&cudnnBackendExecute) execute;
};

Api load() {
  void* const library = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
  const char* const why = library ? nullptr : dlerror();
  CAPO_CHECK(library, "CAPO_CUDNN=", wanted(), ": cuDNN 9 cannot be loaded: ", why ? why : "no reason given");
  Api a{};
  const auto find = [&](auto& f, const char* name) {
    f = reinterpret_cast<std::remove_reference_t<decltype(f)> >(dlsym(library, name));
    CAPO_CHECK(f, "CAPO_CUDNN=", wanted(), ": libcudnn.so.9 has no ", name);
  };
  find(a.version, "cudnnGetVersion");
  find(a.text, "cudnnGetErrorString");
  find(a.create, "cudnnCreate");
  find(a.set_stream, "cudnnSetStream");
  find(a.make, "cudnnBackendCreateDescriptor");
  find(a.destroy, "cudnnBackendDestroyDescriptor");
  find(a.set, "cudnnBackendSetAttribute");
  find(a.get, "cudnnBackendGetAttribute");
  find(a.finish, "cudnnBackendFinalize");
  find(a.execute, "cudnnBackendExecute");
  return a;
}
const Api& api() {
  static const Api a = load();  // a load that threw is tried again
  return a;
}

void check(cudnnStatus_t status, const char* what) {
  CAPO_CHECK(status == CUDNN_STATUS_SUCCESS, "cuDNN failed ", what, ": ", api().text(status));
}

template <class T>
std::vector<T> get(const Descriptor& d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                   std::int64_t most) {
  std::vector<T> values(static_cast<std::size_t>(most));
  std::int64_t count = 0;
  check(api().get(d.get(), name, type, most, &count, values.data()), "reading an attribute");
  values.resize(static_cast<std::size_t>(std::min(count, most)));
  return values;
}

struct Plan {
  Graph graph;  // what the plan was made of, kept beside it
  std::optional<Descriptor> config, plan;
  std::int64_t engine = -1, workspace = 0;
  std::string why;  // there is no plan

  // Takes the first engine that will do.
  void search(cudnnHandle_t handle);

 private:
  bool take(cudnnHandle_t handle, Descriptor candidate);
};

// Whether the engine of a configuration keeps our contract; sets its number.
bool allowed(const Descriptor& config, bool tensor_cores, std::int64_t& number) {
  Descriptor engine(CUDNN_BACKEND_ENGINE_DESCRIPTOR);
  std::int64_t count = 0;
  cudnnBackendDescriptor_t raw = engine.get();
  check(api().get(config.get(), CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &count, &raw),
        "reading an engine");
  number = get<std::int64_t>(engine, CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64, 1).at(0);
  for (const auto note : get<cudnnBackendNumericalNote_t>(engine, CUDNN_ATTR_ENGINE_NUMERICAL_NOTE,
                                                          CUDNN_TYPE_NUMERICAL_NOTE, CUDNN_NUMERICAL_NOTE_TYPE_COUNT)) {
    if (note == CUDNN_NUMERICAL_NOTE_STRICT_NAN_PROP || (note == CUDNN_NUMERICAL_NOTE_TENSOR_CORE && tensor_cores))
      continue;
    return false;  // not the same bits every time, rounded operands or sums, Fourier and Winograd transforms, notes to
                   // come
  }
  return true;
}

bool Plan::take(cudnnHandle_t handle, Descriptor candidate) {
  if (!allowed(candidate, graph.tensor_cores, engine)) return false;
  Descriptor p(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
  p.set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
  p.set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, candidate);
  if (p.finish() != CUDNN_STATUS_SUCCESS) return false;
  const auto bytes = get<std::int64_t>(p, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1).at(0);
  if (bytes > static_cast<std::int64_t>(gpu::kWorkspace)) return false;
  workspace = bytes;
  config.emplace(std::move(candidate));
  plan.emplace(std::move(p));
  return true;
}

void Plan::search(cudnnHandle_t handle) {
  const auto refused = [&](const char* what, cudnnStatus_t status) {
    why = cat(what, ": ", api().text(status));
    return status != CUDNN_STATUS_SUCCESS;
  };
  if (refused("an operation was refused", graph.status)) return;
  Descriptor operations(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
  std::vector<cudnnBackendDescriptor_t> raw;
  for (const Descriptor* d : graph.operations) raw.push_back(d->get());
  operations.set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
  operations.set(CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, static_cast<std::int64_t>(raw.size()),
                 raw.data());
  if (refused("the graph was refused", operations.finish())) return;
  const Descriptor& kept = graph.part_done(std::move(operations));

  std::int64_t seen = 0;
  for (const cudnnBackendHeurMode_t mode : {CUDNN_HEUR_MODE_A, CUDNN_HEUR_MODE_FALLBACK}) {
    Descriptor heuristics(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
    heuristics.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, kept);
    heuristics.set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    if (heuristics.finish() != CUDNN_STATUS_SUCCESS) continue;  // it knows none
    std::int64_t count = 0;
    check(api().get(heuristics.get(), CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 0, &count, nullptr),
          "counting engines");
    std::vector<Descriptor> found;
    raw.clear();
    for (std::int64_t i = 0; i < count; ++i)
      raw.push_back(found.emplace_back(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR).get());
    check(api().get(heuristics.get(), CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, count, &count,
                    raw.data()),
          "listing engines");
    found.erase(found.begin() + count, found.end());
    seen += count;
    for (Descriptor& candidate : found)
      if (take(handle, std::move(candidate))) return;
  }
  why = cat("none of ", seen, " engines offered keeps the contract");
}

struct Library {
  // A handle has one stream at a time, so calls go one after the other.
  std::mutex mutex;
  std::map<int, cudnnHandle_t> handles;  // by device
  std::map<std::pair<int, Key>, Plan> plans;

  static Library& get() {
    static auto* library = new Library;  // immortal: the driver may be gone before static storage is
    return *library;
  }
  cudnnHandle_t handle(int device) {
    cudnnHandle_t& h = handles[device];
    if (!h) check(api().create(&h), "to start");
    return h;
  }
};

void say(const char* op, const Key& key, const Plan& p) {
  std::string line = cat("cudnn: ", op, " [");
  for (const auto k : key) line += cat(k, " ");
  line += p.plan ? cat("]: engine ", p.engine) : cat("]: own kernel, ", p.why);
  log(LogLevel::info, line);
}

void execute(cudnnHandle_t handle, const Plan& p, Data data, void* workspace) {
  std::vector<std::int64_t> uids;
  std::vector<const void*> pointers;
  for (const auto& [uid, pointer] : data) {
    uids.push_back(uid);
    pointers.push_back(pointer);
  }
  Descriptor pack(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
  pack.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, uids);
  pack.set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, static_cast<std::int64_t>(pointers.size()),
           pointers.data());
  pack.set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
  check(pack.finish(), "taking the tensors");
  check(api().execute(handle, p.plan->get(), pack.get()), "to run");
}

}  // namespace

bool on() {
  if (wanted() == "0") return false;
  api();
  return true;
}

cudnnDataType_t type_of(DType dtype) {
  CAPO_CHECK(dtype == f32 || dtype == bf16 || dtype == f16, "cuDNN: takes f32, bf16 and f16, got ", dtype);
  return dtype == f32 ? CUDNN_DATA_FLOAT : dtype == bf16 ? CUDNN_DATA_BFLOAT16 : CUDNN_DATA_HALF;
}

std::int64_t alignment(const void* p) {
  std::int64_t a = 16;
  while (reinterpret_cast<std::uintptr_t>(p) % static_cast<std::uintptr_t>(a) != 0) a /= 2;
  return a;
}

Descriptor::Descriptor(cudnnBackendDescriptorType_t type) { check(api().make(type, &p_), "making a descriptor"); }
Descriptor::~Descriptor() {
  if (p_) api().destroy(p_);
}
void Descriptor::set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::int64_t count,
                     const void* values) {
  const cudnnStatus_t status = api().set(p_, name, type, count, values);
  CAPO_CHECK(status == CUDNN_STATUS_SUCCESS, "cuDNN refused attribute ", static_cast<int>(name), ": ",
             api().text(status));
}
cudnnStatus_t Descriptor::finish() { return api().finish(p_); }

const Descriptor& Graph::part_done(Descriptor d) {
  return *parts_.emplace_back(std::make_unique<Descriptor>(std::move(d)));
}
const Descriptor& Graph::part(Descriptor d) {
  const cudnnStatus_t s = d.finish();
  if (status == CUDNN_STATUS_SUCCESS) status = s;
  return part_done(std::move(d));
}
void Graph::operation(Descriptor d) { operations.push_back(&part(std::move(d))); }

const Descriptor& Graph::pointwise(cudnnPointwiseMode_t mode, const Descriptor& x, const Descriptor* b,
                                   const Descriptor& y) {
  Descriptor d(CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
  d.set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
  d.set(CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_DATA_FLOAT);
  const Descriptor& what = part(std::move(d));
  Descriptor op(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
  op.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, what);
  op.set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
  if (b) op.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, *b);
  op.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y);
  operation(std::move(op));
  return y;
}

const Descriptor& Graph::tensor(std::int64_t uid, cudnnDataType_t type, const std::vector<std::int64_t>& sizes,
                                const std::vector<std::int64_t>& strides, std::int64_t bytes) {
  Descriptor d(CUDNN_BACKEND_TENSOR_DESCRIPTOR);
  d.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, uid);
  d.set(CUDNN_ATTR_TENSOR_DATA_TYPE, type);
  d.set(CUDNN_ATTR_TENSOR_DIMENSIONS, sizes);
  d.set(CUDNN_ATTR_TENSOR_STRIDES, strides);
  d.set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, bytes ? bytes : 16);
  const bool nowhere = bytes == 0;
  d.set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &nowhere);
  return part(std::move(d));
}

const Descriptor& Graph::number(std::int64_t uid) {
  Descriptor d(CUDNN_BACKEND_TENSOR_DESCRIPTOR);
  d.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, uid);
  d.set(CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_DATA_FLOAT);
  d.set(CUDNN_ATTR_TENSOR_DIMENSIONS, {1, 1, 1, 1});
  d.set(CUDNN_ATTR_TENSOR_STRIDES, {1, 1, 1, 1});
  d.set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, std::int64_t{4});
  const bool by_value = true;
  d.set(CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &by_value);
  return part(std::move(d));
}

bool run(const char* op, const Key& key, Describe describe, const void* problem, Data data, void* stream) {
  Library& library = Library::get();
  int device = 0;
  gpu::check_cuda(cudaGetDevice(&device), "cuDNN: asking for the current device");
  const std::lock_guard lock(library.mutex);
  const cudnnHandle_t handle = library.handle(device);
  auto at = library.plans.find({device, key});
  if (at == library.plans.end()) {
    Plan p;
    describe(p.graph, problem);
    p.search(handle);
    if (wanted() == "log") say(op, key, p);
    at = library.plans.emplace(std::pair{device, key}, std::move(p)).first;
  }
  if (!at->second.plan) return false;
  check(api().set_stream(handle, static_cast<cudaStream_t>(stream)), "taking a stream");
  void* const workspace = at->second.workspace ? backend()->workspace(device, stream, gpu::kWorkspace) : nullptr;
  execute(handle, at->second, data, workspace);
  return true;
}

}  // namespace capo::cudnn

#endif
