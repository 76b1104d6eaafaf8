// A MELT bundle from C++: T loops over one gated KV cache, allocated once; every loop rewrites its buffers in place.
//
//     c++ -std=c++17 -O2 generate.cpp -o generate $(pkg-config --cflags --libs libonnxruntime nlohmann_json)
//     ./generate ../../build/melt-tiny 4 20 1 56 3 ...       bundle, loops, new tokens, the prompt's token ids
//
// prints the ids of the greedy tokens, up to one that ends the text or to as many as were asked for. The graphs' inputs
// and outputs: runtime/melt_runtime/bundle/contract.py. Text becomes ids by the bundle's tokenizer.json, which libraries for
// most languages read. Debian has the headers: see headers.sh.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "bundle.hpp"

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

// Whether ONNX Runtime's fast 8-bit products, those of prompts.onnx, may overflow here: on x86 without VNNI. Its exact
// ones cost nothing there, and half the speed with VNNI, so they are asked for only where they are needed. (The Python
// runtime multiplies the largest values once and looks.)
bool products_overflow() {
#if defined(__x86_64__) && defined(__GNUC__)
  return !__builtin_cpu_supports("avx512vnni");
#elif defined(_M_X64)
  return true;
#else
  return false;
#endif
}

// The environment of ONNX Runtime, without the telemetry of its official builds, which reads the variable here. A user's
// own value stays: ORT_DISABLE_TELEMETRY=0 keeps telemetry.
Ort::Env make_environment() {
#if defined(_WIN32)
  if (std::getenv("ORT_DISABLE_TELEMETRY") == nullptr) _putenv_s("ORT_DISABLE_TELEMETRY", "1");
#else
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);
#endif
  return Ort::Env();
}

class Model {
 public:
  explicit Model(const std::string& bundle)
      : manifest_(bundle, "manifest.json"),
        shape_(read_shape(manifest_)),
        stop_ids_(Fields(bundle, "generation_config.json").ids("stop_ids", shape_.vocab_size)),
        embed_(open(bundle + "/embed.onnx")),
        loop_(open(bundle + "/loop.onnx")),
        prompts_(shape_.prompt_rows ? open(bundle + "/prompts.onnx") : Ort::Session(nullptr)),
        head_(open(bundle + "/head.onnx")) {}

  // Runs a chunk through all loops after the tokens so far; returns the largest logit's id at its last token.
  int64_t step(const Ids& ids, int loops) {
    const int64_t count = ids.size(), width = shape_.hidden_size, layers = shape_.layers;
    const bool has_latent = shape_.has_latent, has_loop_idx = shape_.has_loop_idx;
    Buffer<int64_t> input({1, count}), loop_idx{std::vector<int64_t>{}};
    Buffer<float> hidden({1, count, width}), latent({layers, 1, count, width}), logits({1, 1, shape_.vocab_size});
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
    Ort::Session& graph = shape_.prompt_rows && count >= shape_.prompt_rows ? prompts_ : loop_;
    Ort::IoBinding loop(graph);
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
    if (shape_.has_exit_gate) loop.BindOutput("exit_logit", exit_logit.value());
    for (int i = 0; i < loops; ++i) {
      if (has_loop_idx) loop_idx.data[0] = i;
      graph.Run(Ort::RunOptions{}, loop);
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

  // The prompt in chunks of the trained size, then one token at a time, up to one that ends the text.
  Ids generate(const Ids& prompt, int loops, int64_t new_tokens) {
    const int64_t chunk = shape_.trained_chunk, count = prompt.size();
    for (const int64_t id : prompt)
      if (id < 0 || id >= shape_.vocab_size)
        throw std::runtime_error("ID must be from 0 to " + std::to_string(shape_.vocab_size - 1) + ", got " +
                                 std::to_string(id));
    if (count + new_tokens > shape_.max_positions)
      throw std::runtime_error(std::to_string(count) + " ids and " + std::to_string(new_tokens) +
                               " new ones exceed the " + std::to_string(shape_.max_positions) +
                               " positions of the model: ask for fewer");
    for (int64_t i = 0; i < 2 * shape_.layers; ++i)
      cache_.emplace_back(std::vector<int64_t>{1, shape_.kv_heads, count + new_tokens, shape_.head_dim});
    Ids tokens(1);
    for (int64_t start = 0; start < count; start += chunk)
      tokens[0] = step(Ids(prompt.begin() + start, prompt.begin() + std::min(start + chunk, count)), loops);
    const auto ended = [this, &tokens] { return std::count(stop_ids_.begin(), stop_ids_.end(), tokens.back()) > 0; };
    while (static_cast<int64_t>(tokens.size()) < new_tokens && !ended()) tokens.push_back(step({tokens.back()}, loops));
    return tokens;
  }

 private:
  // A graph of the bundle; it says of its model what the manifest says.
  Ort::Session open(const std::string& path) const {
    Ort::SessionOptions options;
    if (products_overflow()) options.AddConfigEntry("session.x64quantprecision", "1");
    Ort::Session session(env_, path.c_str(), options);
    Ort::AllocatorWithDefaultOptions allocator;
    const auto said = session.GetModelMetadata().LookupCustomMetadataMapAllocated("melt", allocator);
    if (!said) throw std::runtime_error(path + " says nothing of its model: export the checkpoint again");
    manifest_.inner("model").require_equal(Fields(path, std::istringstream(said.get())), "model.");
    return session;
  }

  Ort::Env env_ = make_environment();
  Fields manifest_;
  Shape shape_;
  Ids stop_ids_;
  Ort::Session embed_, loop_, prompts_, head_;
  std::vector<Buffer<float>> cache_;
  int64_t length_ = 0;
};

int64_t argument(const char* name, const char* text, int64_t least, int64_t most) {
  int64_t value = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, fault] = std::from_chars(text, end, value);
  if (fault != std::errc{} || stop != end || value < least || value > most)
    throw std::runtime_error(std::string(name) + " must be a whole number from " + std::to_string(least) + " to " +
                             std::to_string(most) + ", got " + text);
  return value;
}

int main(int argc, char** argv) try {
  if (argc < 5) throw std::runtime_error("usage: generate BUNDLE LOOPS NEW_TOKENS ID [ID ...]");
  const int loops = static_cast<int>(argument("LOOPS", argv[2], 1, kMostDepth));
  const int64_t new_tokens = argument("NEW_TOKENS", argv[3], 1, kMostTokens);
  Ids prompt;
  for (int i = 4; i < argc; ++i) prompt.push_back(argument("ID", argv[i], 0, kMostTokens));
  Model model(argv[1]);
  for (const int64_t id : model.generate(prompt, loops, new_tokens)) std::cout << id << ' ';
  std::cout << std::endl;
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << std::endl;
  return 1;
}
