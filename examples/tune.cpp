// Tunes a pre-trained network on a few images:
//   tune                                          1,000 Fashion-MNIST images, U-Tuning
//   tune --compare                                the same with a linear probe, U-Tuning and full fine-tuning
//   tune --method "blocks.*.attn: lora(rank=4, slices=qv); head: train" --dataset cifar100
//   tune --family resnet --weights resnet56-cifar10.safetensors --method conv-lora --dataset cifar100
//   tune --data my_photos --weights vit_base_patch16_224.safetensors       (my_photos/{train,test}/<class>/*.jpg)
// Prints the memory plan, then accuracy, parameters, peak bytes and images/s; writes curves, a sheet of predictions and
// where the model looks as PNG, and the tuner alone, for `predict`.
#include <capo/engine/backend.h>
#include <capo/engine/threads.h>
#include <capo/examples/command_line.h>
#include <capo/examples/show_log.h>
#include <capo/examples/tune_method.h>
#include <capo/ops/matmul.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

using namespace capo;

int main(int argc, char** argv) try {
  examples::TuneOptions o;
  std::string device_name = "cpu";
  CLI::App app("Tunes a pre-trained network on a few images");
  app.option_defaults()->always_capture_default();
  app.add_option("--dataset", o.dataset, "cifar10, cifar100, flowers64, fashion-mnist, ...");
  app.add_option("--data", o.data, "an image folder: FOLDER/train/<class>/*.jpg and FOLDER/test/...");
  app.add_option("--family", o.family, "what the weights are of: vit, resnet or mobilenet");
  app.add_option("--weights", o.weights, "safetensors: ours, timm's, torchvision's");
  app.add_option("--preprocess", o.preprocess,
                 "a JSON file (size, mean, std, crop_pct, interpolation), for weights that do not state theirs");
  app.add_option("--method", o.method, "a named method (tuners/presets.h) or a spec (tuners/spec.h)");
  app.add_flag("--compare", o.compare, "linear probe, U-Tuning and full fine-tuning, one after another");
  app.add_option("--train-images", o.train_images, "class-balanced, drawn by seed; 0: all")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--test-images", o.test_images, "0: all")->check(CLI::NonNegativeNumber);
  app.add_flag("--held-out", o.held_out,
               "judge on the held-out training images, as for a search of rates; the test images are not read");
  app.add_option("--epochs", o.epochs)->check(examples::at_least_one());
  app.add_option("--batch", o.batch)->check(examples::at_least_one());
  app.add_option("--lr", o.lr, "0: the method's")->check(CLI::NonNegativeNumber);
  app.add_option("--head-lr", o.head_lr, "of the head, which starts at random; 0: as --lr")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--image", o.image, "input size in pixels; 0: the weights' own")->check(CLI::NonNegativeNumber);
  app.add_option("--seed", o.seed);
  app.add_option("--precision", o.precision, "of the matrix products: f32, or bf16 (operands rounded, sums f32)")
      ->check(CLI::IsMember({"f32", "bf16"}));
  app.add_option("--threads", o.threads, "0: all processors, or CAPO_THREADS")->check(CLI::NonNegativeNumber);
  app.add_option("--device", device_name, "cpu, cuda or cuda:N");
  app.add_flag("--graph", o.graph, "with --device cuda: replay each step as one CUDA graph, the same bits");
  app.add_option("--out", o.out, "folder for pictures and the tuner");
  const CLI::Option* profiled =
      app.add_option("--profile", o.profile,
                     "print where the time of 20 steps goes and write a trace (OUT/profile.json)")
          ->expected(0, 1);
  if (const int code = examples::read_command_line(app, argc, argv); code >= 0) return code;
  examples::show_log();
  if (profiled->count() > 0 && o.profile.empty()) o.profile = o.out + "/profile.json";
  if (o.threads > 0) set_num_threads(o.threads);
  set_matmul_precision(o.precision == "bf16" ? bf16 : f32);
  o.device = usable_device(device_name);
  CAPO_CHECK(!o.graph || o.device.is_cuda(), "--graph: a CUDA graph needs --device cuda, got ", o.device);
  std::filesystem::create_directories(o.out);

  const std::string source = o.data.empty() ? o.dataset : o.data;
  const auto [pool, rest] = split_dataset(open_dataset(source, "", "train"), 0.1, 1);
  CAPO_CHECK(rest->size() > 0, source,
             ": too few training images to hold out a tenth of each class; 5 of a class are enough");
  const DatasetPtr validation = balanced_subset(rest, std::min<std::int64_t>(rest->size(), 1000), 1);
  examples::TuneData data{pool, validation, o.held_out ? validation : open_dataset(source, "", "test")};
  CAPO_CHECK(pool->class_names() == data.test->class_names(), source, ": train and test must have the same classes");
  if (o.train_images > 0 && o.train_images < pool->size()) data.train = balanced_subset(pool, o.train_images, o.seed);
  if (!o.held_out && o.test_images > 0 && o.test_images < data.test->size())
    data.test = balanced_subset(data.test, o.test_images, 1);
  std::printf("%s: %lld training, %lld validation, %lld test images, %d classes\n", data.train->name().c_str(),
              static_cast<long long>(data.train->size()), static_cast<long long>(data.validation->size()),
              static_cast<long long>(data.test->size()), data.train->num_classes());

  std::vector<std::string> methods{o.method};
  if (o.compare) methods = {"linear", "full", "u-tuning"};
  std::vector<Series> curves;
  nlohmann::json results = nlohmann::json::object();
  for (const auto& name : methods) {
    const examples::TuneResult r = examples::with_family(
        o.family, [&]<class M>() { return examples::tune_with<M>(o, name, data, name == methods.back()); });
    std::printf(
        "%-12s accuracy %.2f %%, %lld of %lld parameters trained (%.2f %%), peak %.1f MiB, %.0f images/s, %.0f s\n",
        r.method.c_str(), 100 * r.accuracy, static_cast<long long>(r.trainable), static_cast<long long>(r.total),
        100.0 * static_cast<double>(r.trainable) / static_cast<double>(r.total),
        static_cast<double>(r.peak_bytes) / 1048576.0, r.images_per_s, r.seconds);
    std::fflush(stdout);
    if (name != "linear" || methods.size() == 1)
      curves.push_back({.name = r.method, .x = r.epoch, .y = r.curve, .markers = true});
    results[r.method] = {{"accuracy", r.accuracy},
                         {"trainable_parameters", r.trainable},
                         {"planned_bytes", r.planned_bytes},
                         {"peak_bytes", r.peak_bytes},
                         {"images_per_s", r.images_per_s},
                         {"seconds", r.seconds},
                         {"precision", o.precision},
                         {"lr", r.lr},
                         {"head_lr", o.head_lr > 0 ? o.head_lr : r.lr},
                         {"epochs", r.epochs},
                         {"held_out_accuracy", r.curve.back() / 100},
                         {"judged_on", o.held_out ? "held-out training images" : "test images"}};
  }
  write_png(o.out + "/accuracy.png",
            plot(curves, {.title = "accuracy on held-out training images", .x_label = "epoch", .y_label = "%"}));
  std::printf("accuracy.png, predictions.png, attention.png and the tuner are in %s\n", o.out.c_str());
  std::printf("RESULT %s\n", nlohmann::json{{"example", "tune"},
                                            {"dataset", source},
                                            {"precision", o.precision},
                                            {"device", to_string(o.device)},
                                            {"methods", results}}
                                 .dump()
                                 .c_str());
} catch (const std::exception& e) {
  std::fprintf(stderr, "tune: %s\n", e.what());
  return 1;
}
