#include <capo/models/train/ema.h>
#include <capo/ops/copy.h>
#include <capo/ops/optim.h>

#include <algorithm>

namespace capo::train {

Ema::Ema(nn::Module& module, double decay, bool warm_up) : decay_(decay), warm_up_(warm_up), counter_(zeros({1}, i64)) {
  CAPO_CHECK(decay >= 0 && decay < 1, "ema: decay must be in [0, 1), got ", decay);
  const NoGrad off;
  const auto moves = [](const nn::Parameter& p) {
    if (!p.is_buffer()) return p.trainable();
    const auto& beside = p.owner().own_parameters();
    return is_floating(p.value().dtype()) &&
           std::any_of(beside.begin(), beside.end(), [](const nn::Parameter* o) { return o->trainable(); });
  };
  for (nn::Parameter* p : module.parameters(true)) {
    if (!moves(*p)) continue;
    const Tensor value = p->value().detach();
    entries_.push_back({p, is_half(value.dtype()) ? cast(value, f32) : clone(value), {}});
  }
}

double Ema::next_decay() const {
  const auto n = static_cast<double>(updates());
  return warm_up_ ? std::min(decay_, (1 + n) / (10 + n)) : decay_;
}

void Ema::update() {
  update_all(next_decay(), {}, {});
  count_update();
}

void Ema::capture_update(Graph& graph, const Tensor& skip) {
  weight_ = graph.numbers(1);
  update_all(decay_, weight_.there, skip);
}

void Ema::next_replay() { *weight_.here = static_cast<float>(1 - next_decay()); }

// weight, skip: what the kernels read at run, or undefined.
void Ema::update_all(double decay, const Tensor& weight, const Tensor& skip) {
  CAPO_CHECK(!swapped_, "ema: update while the averages are in the model");
  const NoGrad off;
  std::vector<Tensor> shadows, values;
  for (const auto& e : entries_) {
    shadows.push_back(e.shadow);
    values.push_back(e.parameter->value().detach());
  }
  ema_(shadows, values, decay, {weight, {}, skip});
}

void Ema::swap() {
  const NoGrad off;
  for (auto& e : entries_) {
    Tensor value = e.parameter->value();
    if (value.dtype() == e.shadow.dtype()) {
      value.swap_storage(e.shadow);
    } else if (!swapped_) {
      e.backup = clone(value.detach());
      copy_into(value, e.shadow);
    } else {
      copy_into(value, e.backup);
      e.backup = Tensor();
    }
  }
  swapped_ = !swapped_;
}

StateList Ema::state_list() const {
  CAPO_CHECK(!swapped_, "ema: its state cannot be saved or loaded while the averages are in the model");
  StateList list{{"updates", counter_}};
  for (const auto& e : entries_) list.push_back({e.parameter->path(), e.shadow, e.parameter->layout()});
  return list;
}

std::int64_t Ema::state_bytes() const {
  std::int64_t bytes = 0;
  for (const auto& e : entries_) bytes += static_cast<std::int64_t>(rounded_bytes(e.shadow.storage()->bytes()));
  return bytes;
}

}  // namespace capo::train
