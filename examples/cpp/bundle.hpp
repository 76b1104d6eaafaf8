// Reads the JSON files of a bundle, and says what is wrong with them. Knows nothing of ONNX Runtime.

#pragma once

#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

constexpr int kSchemaVersion = 5;
// Layers and loops, sizes, tokens, as in the contract: a number beyond them is damage.
constexpr int64_t kMostDepth = 1 << 10, kMostWidth = 1 << 20, kMostTokens = 1 << 26;
constexpr int kMostNesting = 64;  // copying and printing call themselves
using Ids = std::vector<int64_t>;

// A JSON object out of a file; what is wrong with it names the file and the field.
class Fields {
 public:
  // Out of a file of a bundle.
  Fields(const std::string& bundle, const std::string& name) : path_(bundle + "/" + name) {
    std::ifstream file(path_);
    if (!file) throw std::runtime_error(path_ + " cannot be read: give the folder of a bundle");
    parse(file);
  }
  // Out of what PATH says of itself.
  Fields(std::string path, std::istream&& text) : path_(std::move(path)) { parse(text); }

  Fields inner(const char* name) const {
    if (!field(name).is_object()) refuse(name, "be an object", field(name));
    Fields inside = *this;
    inside.values_ = field(name);
    return inside;
  }
  int64_t whole(const char* name, int64_t least, int64_t most) const {
    const auto& value = field(name);
    require_whole(name, value, least, most);
    return value.get<int64_t>();
  }
  bool flag(const char* name) const {
    if (!field(name).is_boolean()) refuse(name, "be true or false", field(name));
    return field(name).get<bool>();
  }
  bool is_null(const char* name) const { return field(name).is_null(); }
  std::string text(const char* name) const {
    if (!field(name).is_string()) refuse(name, "be a string", field(name));
    return field(name).get<std::string>();
  }
  // Token ids; a field that is not there says that there are none.
  Ids ids(const char* name, int64_t vocabulary) const {
    if (!values_.contains(name) || values_[name].is_null()) return {};
    if (!field(name).is_array()) refuse(name, "be a list of token ids", field(name));
    for (const auto& id : field(name)) require_whole(name, id, 0, vocabulary - 1);
    return field(name).get<Ids>();
  }

  // Holds these values against those that OTHER gives under the same names with PREFIX.
  void require_equal(const Fields& other, const std::string& prefix) const {
    std::string faults;
    for (const auto& [name, value] : values_.items()) {
      const auto found = other.values_.find(prefix + name);
      if (found == other.values_.end() || *found != value)
        faults += "\n  " + name + " is " + value.dump() + ", " + other.path_ + " has " +
                  (found == other.values_.end() ? "none" : found->dump());
    }
    if (!faults.empty()) throw std::runtime_error(path_ + " does not fit its graphs: copy the bundle again" + faults);
  }

 private:
  void parse(std::istream& text) {
    const auto shallow = [](int depth, nlohmann::json::parse_event_t, const nlohmann::json&) {
      return depth < kMostNesting ? true : throw std::runtime_error("nested too deep");
    };
    try {
      values_ = nlohmann::json::parse(text, shallow);
    } catch (const std::exception& error) {
      throw std::runtime_error(path_ + " is not JSON (" + error.what() + "): export the checkpoint again");
    }
    if (!values_.is_object()) refuse("the file", "hold a JSON object", values_);
  }
  const nlohmann::json& field(const char* name) const {
    const auto found = values_.find(name);
    if (found == values_.end())
      throw std::runtime_error(path_ + ": " + name + " is missing: export the checkpoint again");
    return *found;
  }
  void require_whole(const char* name, const nlohmann::json& value, int64_t least, int64_t most) const {
    const bool fits = value.is_number_integer() && (!value.is_number_unsigned() || value.get<uint64_t>() <= INT64_MAX);
    if (!fits || value.get<int64_t>() < least || value.get<int64_t>() > most)
      refuse(name, "be a whole number from " + std::to_string(least) + " to " + std::to_string(most), value);
  }
  [[noreturn]] void refuse(const std::string& name, const std::string& rule, const nlohmann::json& value) const {
    throw std::runtime_error(path_ + ": " + name + " must " + rule + ", got " + value.dump().substr(0, 80));
  }

  std::string path_;
  nlohmann::json values_;
};

struct Shape {
  int64_t layers, kv_heads, head_dim, hidden_size, vocab_size, max_positions, trained_chunk;
  int64_t prompt_rows;  // of a pass from which prompts.onnx runs it; 0: the bundle has no such graph
  bool has_latent, has_loop_idx, has_exit_gate;
};

inline Shape read_shape(const Fields& manifest) {
  const int64_t version = manifest.whole("schema_version", 0, INT32_MAX);
  if (version != kSchemaVersion)
    throw std::runtime_error("schema_version must be " + std::to_string(kSchemaVersion) + ", got " +
                             std::to_string(version) + ": export the checkpoint again, or take the program that fits");
  if (manifest.text("activations") != "float32")
    throw std::runtime_error("activations must be float32 on a CPU, got " + manifest.text("activations"));
  const Fields model = manifest.inner("model");
  if (model.text("cache_kind") != "shared")
    throw std::runtime_error("this program drives MELT's one KV cache; a LoopLM has one for each loop");
  const auto width = [&model](const char* name) { return model.whole(name, 1, kMostWidth); };
  const auto tokens = [&model](const char* name) { return model.whole(name, 1, kMostTokens); };
  Shape shape{};
  shape.layers = model.whole("layers", 1, kMostDepth);
  shape.kv_heads = width("kv_heads");
  shape.head_dim = width("head_dim");
  shape.hidden_size = width("hidden_size");
  shape.vocab_size = tokens("vocab_size");
  shape.max_positions = tokens("max_positions");
  shape.trained_chunk = tokens("trained_chunk");
  shape.prompt_rows = manifest.is_null("prompts") ? 0 : manifest.inner("prompts").whole("rows", 2, kMostWidth);
  shape.has_latent = model.flag("has_latent");
  shape.has_loop_idx = model.text("gate_kind") == "mean";
  shape.has_exit_gate = model.flag("has_exit_gate");
  return shape;
}
