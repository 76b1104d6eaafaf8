// A MELT bundle from C++: T loops over one gated KV cache, allocated once; every loop rewrites its buffers in place.
//
//     c++ -std=c++17 -O2 generate.cpp -o generate $(pkg-config --cflags --libs libonnxruntime nlohmann_json)
//     ./generate ../../build/melt-tiny 4 20 1 56 3 ...       bundle, loops, new tokens, the prompt's token ids
//
// prints the ids of the greedy tokens. The graphs' inputs and outputs: runtime/melt_runtime/contract.py. Text becomes ids
// by the bundle's tokenizer.json, which libraries for most languages read.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

constexpr int kSchemaVersion = 4;
using Ids = std::vector<int64_t>;

nlohmann::json read_manifest(const std::string& bundle) {
  std::ifstream file(bundle + "/manifest.json");
  if (!file) throw std::runtime_error(bundle + "/manifest.json cannot be read: give the folder of a bundle");
  const auto manifest = nlohmann::json::parse(file);
  const int version = manifest.at("schema_version");
  if (version != kSchemaVersion)
    throw std::runtime_error("schema_version must be " + std::to_string(kSchemaVersion) + ", got " +
                             std::to_string(version) + ": export the checkpoint again, or take the program that fits");
  if (manifest.at("activations") != "float32")
    throw std::runtime_error("activations must be float32 on a CPU, got " + manifest.at("activations").dump());
  if (manifest.at("model").at("cache_kind") != "shared")
    throw std::runtime_error("this program drives MELT's one KV cache; a LoopLM has one for each loop");
  return manifest;
}

int64_t volume(const std::vector<int64_t>& dims) {
  return std::accumulate(dims.begin(), dims.end(), int64_t{1}, std::multiplies<>());
}

template <typename T>
struct Buffer {
  std::vector<T> data;
  std::vector<int64_t> shape;

  explicit Buffer(std::vector<int64_t> dims) : shape(std::move(dims)) {
    data.resize(volume(shape));
  }
  Ort::Value value() { return view(0, shape); }
  // A tensor over the elements from `start` on.
  Ort::Value view(int64_t start, const std::vector<int64_t>& dims) {
    static const auto cpu = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    return Ort::Value::CreateTensor<T>(cpu, data.data() + start, volume(dims), dims.data(), dims.size());
  }
};

class Model {
 public:
  Model(const std::string& bundle, int64_t capacity)
      : manifest_(read_manifest(bundle)),
        shape_(manifest_.at("model")),
        embed_(env_, (bundle + "/embed.onnx").c_str(), Ort::SessionOptions{}),
        loop_(env_, (bundle + "/loop.onnx").c_str(), Ort::SessionOptions{}),
        head_(env_, (bundle + "/head.onnx").c_str(), Ort::SessionOptions{}) {
    for (int i = 0; i < 2 * size("layers"); ++i)
      cache_.emplace_back(std::vector<int64_t>{1, size("kv_heads"), capacity, size("head_dim")});
  }

  // Runs a chunk through all loops after the tokens so far; returns the largest logit's id at its last token.
  int64_t step(const Ids& ids, int loops) {
    const int64_t count = ids.size(), width = size("hidden_size"), layers = size("layers");
    const bool has_latent = shape_.at("has_latent"), has_loop_idx = shape_.at("gate_kind") == "mean";
    Buffer<int64_t> input({1, count}), loop_idx{std::vector<int64_t>{}};
    Buffer<float> hidden({1, count, width}), latent({layers, 1, count, width}), logits({1, 1, size("vocab_size")});
    Buffer<int32_t> seqlens({1}), total{std::vector<int64_t>{}};
    input.data = ids;
    seqlens.data[0] = static_cast<int32_t>(length_ + count - 1);
    total.data[0] = static_cast<int32_t>(length_ + count);

    Ort::IoBinding embed(embed_);
    embed.BindInput("ids", input.value());
    embed.BindOutput("hidden", hidden.value());
    if (has_latent) embed.BindOutput("latent", latent.value());
    embed_.Run(Ort::RunOptions{}, embed);

    // Past and present of a layer are one buffer, and so are a state and its successor: a loop rewrites them in place.
    Ort::IoBinding loop(loop_);
    const auto in_place = [&loop](const std::string& in, const std::string& out, const Ort::Value& value) {
      loop.BindInput(in.c_str(), value);
      loop.BindOutput(out.c_str(), value);
    };
    std::vector<Ort::Value> values;  // kept until the loops have run
    values.push_back(hidden.value());
    in_place("hidden", "hidden_out", values.back());
    for (int64_t i = 0; i < layers; ++i) {
      const std::string number = std::to_string(i);
      if (has_latent) {
        values.push_back(latent.view(i * count * width, hidden.shape));
        in_place("latent." + number, "latent_out." + number, values.back());
      }
      values.push_back(cache_[2 * i].value());
      in_place("past_key." + number, "present_key." + number, values.back());
      values.push_back(cache_[2 * i + 1].value());
      in_place("past_value." + number, "present_value." + number, values.back());
    }
    loop.BindInput("seqlens_k", seqlens.value());
    loop.BindInput("total_sequence_length", total.value());
    if (has_loop_idx) loop.BindInput("loop_idx", loop_idx.value());
    Buffer<float> exit_logit({1, count, 1});
    if (shape_.at("has_exit_gate")) loop.BindOutput("exit_logit", exit_logit.value());
    for (int i = 0; i < loops; ++i) {
      if (has_loop_idx) loop_idx.data[0] = i;
      loop_.Run(Ort::RunOptions{}, loop);
    }
    length_ += count;

    Buffer<float> last({1, 1, width});
    std::copy(hidden.data.end() - width, hidden.data.end(), last.data.begin());
    Ort::IoBinding head(head_);
    head.BindInput("hidden", last.value());
    head.BindOutput("logits", logits.value());
    head_.Run(Ort::RunOptions{}, head);
    return std::max_element(logits.data.begin(), logits.data.end()) - logits.data.begin();
  }

  // The prompt in chunks of the trained size, then one token at a time.
  Ids generate(const Ids& prompt, int loops, int new_tokens) {
    const int64_t chunk = size("trained_chunk"), count = prompt.size();
    Ids tokens(1);
    for (int64_t start = 0; start < count; start += chunk)
      tokens[0] = step(Ids(prompt.begin() + start, prompt.begin() + std::min(start + chunk, count)), loops);
    while (static_cast<int>(tokens.size()) < new_tokens) tokens.push_back(step({tokens.back()}, loops));
    return tokens;
  }

 private:
  int64_t size(const char* name) const { return shape_.at(name).get<int64_t>(); }

  nlohmann::json manifest_, shape_;
  Ort::Env env_;
  Ort::Session embed_, loop_, head_;
  std::vector<Buffer<float>> cache_;
  int64_t length_ = 0;
};

int main(int argc, char** argv) try {
  if (argc < 5) throw std::runtime_error("usage: generate BUNDLE LOOPS NEW_TOKENS ID [ID ...]");
  const int loops = std::atoi(argv[2]), new_tokens = std::atoi(argv[3]);
  if (loops < 1 || new_tokens < 1) throw std::runtime_error("LOOPS and NEW_TOKENS must be at least 1");
  Ids prompt;
  for (int i = 4; i < argc; ++i) prompt.push_back(std::atoll(argv[i]));
  Model model(argv[1], prompt.size() + new_tokens);
  for (const int64_t id : model.generate(prompt, loops, new_tokens)) std::cout << id << ' ';
  std::cout << std::endl;
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << std::endl;
  return 1;
}
