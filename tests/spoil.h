// Ways to spoil a good checkpoint folder, and the program run on what comes of it: the tests of
// what is refused.
#pragma once

#include <cstring>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "base/json.h"
#include "checkpoint/test_files.h"
#include "tests/program.h"

namespace indexcache {

// One copy of a good generated checkpoint, to be spoiled.
struct Model {
  std::string path;

  std::string operator/(const std::string& name) const { return path + "/" + name; }
  void write(const std::string& name, const std::string& bytes) const {
    std::filesystem::remove_all(*this / name);  // a hard link to the good file
    std::ofstream(*this / name, std::ios::binary) << bytes;
  }
  std::string read(const std::string& name) const { return read_file(*this / name); }
  void remove(const std::string& name) const { std::filesystem::remove_all(*this / name); }
  void change_json(const std::string& name, const std::function<void(Json&)>& change) const {
    Json json = load_json(*this / name);
    change(json);
    write(name, json.dump());
  }
  // Changes the header of model.safetensors and keeps its data.
  void change_header(const std::function<void(Json&)>& change) const {
    const std::string bytes = read("model.safetensors");
    uint64_t size;
    std::memcpy(&size, bytes.data(), 8);
    Json header = parse_json(std::string_view(bytes).substr(8, size), "header");
    change(header);
    const std::string text = header.dump();
    write("model.safetensors", little_endian64(text.size()) + text + bytes.substr(8 + size));
  }
};

using Spoil = std::function<void(const Model&)>;

// Most spoil one file in one of these ways.
inline Spoil file(const std::string& name, const std::string& bytes) {
  return [=](const Model& m) { m.write(name, bytes); };
}
inline Spoil cut(const std::string& name, size_t keep) {
  return [=](const Model& m) { m.write(name, m.read(name).substr(0, keep)); };
}
inline Spoil replaced(const std::string& name, const std::string& from, const std::string& to) {
  return [=](const Model& m) {
    std::string text = m.read(name);
    ASSERT_NE(text.find(from), std::string::npos) << from;
    m.write(name, text.replace(text.find(from), from.size(), to));
  };
}
inline Spoil json_set(const std::string& name, const std::string& pointer, const Json& value) {
  return [=](const Model& m) {
    m.change_json(name, [&](Json& json) { json[Json::json_pointer(pointer)] = value; });
  };
}
inline Spoil config(const std::string& key, const Json& value) {
  return json_set("config.json", "/" + key, value);
}
inline Spoil header(const std::string& tensor, const std::string& field, const Json& value) {
  return [=](const Model& m) { m.change_header([&](Json& json) { json[tensor][field] = value; }); };
}
inline Spoil scale(const std::string& tensor, float value) {
  return [=](const Model& m) {
    std::string bytes = m.read("model.safetensors");
    uint64_t size;
    std::memcpy(&size, bytes.data(), 8);
    const Json json = parse_json(std::string_view(bytes).substr(8, size), "header");
    const uint64_t at = json.at(tensor).at("data_offsets").at(0).get<uint64_t>();
    std::memcpy(bytes.data() + 8 + size + at, &value, 4);
    m.write("model.safetensors", bytes);
  };
}
inline Spoil header_bytes(const std::string& header_text) {
  return file("model.safetensors", safetensors_bytes(header_text));
}

// One fault: which good checkpoint is spoiled how, the command that meets it, and what its message
// must name. kBoth: inspect and run, which say the same.
enum class Base { kPlain, kSharded, kFp8 };
enum class Use { kInspect, kRun, kBoth, kLogits };

struct Case {
  std::string name;
  Spoil spoil;
  std::vector<std::string> words;
  Use use = Use::kInspect;
  Base base = Base::kPlain;
  std::vector<std::string> more_args = {};
};

// Good generated checkpoints, and the program run on spoiled copies of them.
class BadInput : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new TempFolder;
    if (!program_is_built()) return;
    const std::vector<std::string> synth = {"synth", "tiny", "--layers", "2"};
    for (const auto& [name, more] : std::vector<std::pair<std::string, std::vector<std::string>>>{
             {"plain", {}}, {"sharded", {"--max-shard-mib", "1"}}, {"fp8", {"--weights", "fp8"}}}) {
      std::vector<std::string> args = synth;
      args.insert(args.end(), more.begin(), more.end());
      args.insert(args.end(), {"-o", *folder_ / name});
      const ProgramResult made = run_program(args);
      EXPECT_EQ(made.exit_code, 0) << made.err;
      // What the cases spoil must be good.
      const ProgramResult good = run_program({"run", "-m", *folder_ / name, "-p", "x", "-n", "1"});
      EXPECT_EQ(good.exit_code, 0) << good.err;
    }
  }
  static void TearDownTestSuite() { delete folder_; }
  void SetUp() override {
    ASSERT_TRUE(program_is_built()) << INDEXCACHE_BINARY << " is absent: build indexcache-cli";
  }

  static Model copy_base(Base base) {
    const char* bases[] = {"plain", "sharded", "fp8"};
    const Model model{*folder_ / "spoiled"};
    std::filesystem::remove_all(model.path);
    std::filesystem::create_directory(model.path);
    for (const auto& entry :
         std::filesystem::directory_iterator(*folder_ / bases[static_cast<int>(base)]))
      std::filesystem::create_hard_link(entry.path(), model / entry.path().filename().string());
    return model;
  }

  // Of further arguments, names of files in the model's folder become their paths.
  static std::vector<std::string> arguments(const Case& c, Use use, const Model& model) {
    std::vector<std::string> args = {"inspect", "-m", model.path};
    if (use == Use::kRun) args = {"run", "-m", model.path, "-n", "1"};
    if (use == Use::kRun && c.more_args.empty()) args.insert(args.end(), {"-p", "x"});
    if (use == Use::kLogits)
      args = {"logits", "-m", model.path, "--tokens", model / "ids.json", "-o", model / "out"};
    for (const std::string& arg : c.more_args) {
      std::error_code too_long;
      args.push_back(std::filesystem::is_regular_file(model / arg, too_long) ? model / arg : arg);
    }
    return args;
  }

  static void run_cases(const std::vector<Case>& cases) {
    for (const Case& c : cases) {
      SCOPED_TRACE(c.name);
      const Model model = copy_base(c.base);
      c.spoil(model);
      std::string message;
      for (const Use use :
           c.use == Use::kBoth ? std::vector{Use::kInspect, Use::kRun} : std::vector{c.use}) {
        const ProgramResult result = run_program(arguments(c, use, model));
        expect_failure(result, 1);
        for (const std::string& word : c.words)
          EXPECT_NE(result.err.find(word), std::string::npos) << word << " in " << result.err;
        EXPECT_FALSE(std::filesystem::exists(model / "out"));
        const std::string said =
            result.err.substr(std::min(result.err.find("error: "), result.err.size()));
        if (!message.empty()) {
          EXPECT_EQ(said, message);
        }
        message = said;
      }
      if (std::getenv("INDEXCACHE_PRINT_ERRORS"))
        std::printf("%-32s %s", c.name.c_str(), message.c_str());
    }
  }

  inline static TempFolder* folder_ = nullptr;
};

}  // namespace indexcache
