#include "checkpoint/binder.h"

#include "checkpoint/test_files.h"

namespace indexcache {
namespace {

const std::vector<DType> kFloat = {DType::kF32, DType::kBF16};

TEST(Binder, HandsOutWhatFits) {
  Checkpoint checkpoint;
  checkpoint.add("norm", filled(DType::kBF16, {4}, 1));
  checkpoint.add("bias", filled(DType::kF32, {2}, 2));
  Binder binder(checkpoint);
  EXPECT_EQ(binder.require("norm", {4}, kFloat).data, checkpoint.find("norm")->data);
  EXPECT_EQ(binder.require("norm", {4}, kFloat).dtype, DType::kBF16);
  EXPECT_TRUE(binder.optional("bias", {2}, kFloat).present());
  EXPECT_FALSE(binder.optional("other", {2}, kFloat).present());
  binder.finish();
  EXPECT_EQ(binder.ignored_summary(), "");
}

TEST(Binder, ReportsEveryProblemAtOnce) {
  Checkpoint checkpoint;
  checkpoint.path = "/models/m";
  checkpoint.add("hidden", filled(DType::kF32, {4096}, 0));
  checkpoint.add("half", filled(DType::kF16, {8}, 0));
  checkpoint.add("fp8", filled(DType::kF8E4M3, {8, 8}, 0));
  checkpoint.add("left", filled(DType::kI32, {2, 3}, 0));
  Binder binder(checkpoint);
  EXPECT_FALSE(binder.require("hidden", {4097}, kFloat).present());
  EXPECT_FALSE(binder.optional("half", {8}, kFloat).present());
  EXPECT_FALSE(binder.require("fp8", {8, 8}, {DType::kBF16}).present());
  EXPECT_FALSE(binder.require("gone", {3, 4}, kFloat).present());
  EXPECT_FALSE(binder.require("gone", {3, 4}, kFloat).present());
  const std::string message = error_of([&] { binder.finish(); });
  expect_contains(
      message, {"/models/m: ", "1 tensors missing, 3 of wrong shape or dtype, 1 surplus",
                "\"hidden\": found [4096] F32, expected [4097] F32 or BF16",
                "\"half\": found [8] F16, expected [8] F32 or BF16",
                "\"fp8\": found [8, 8] F8_E4M3, expected [8, 8] BF16",
                "\"gone\": missing, expected [3, 4] F32 or BF16", "\"left\": surplus, I32 [2, 3]"});
}

TEST(Binder, CutsLongLists) {
  Checkpoint checkpoint;
  for (int i = 0; i < 60; ++i)
    checkpoint.add(fmt::format("surplus{}", i), filled(DType::kU8, {1}, 0));
  Binder binder(checkpoint);
  for (int i = 0; i < 70; ++i) binder.require(fmt::format("missing{}", i), {1}, kFloat);
  const std::string message = error_of([&] { binder.finish(); });
  expect_contains(
      message, {"70 tensors missing", "60 surplus", "and 20 more", "and 10 more", "\"missing49\""});
  EXPECT_EQ(message.find("\"missing50\""), std::string::npos);
}

TEST(Binder, CountsWhatItIgnoresByReason) {
  Checkpoint checkpoint;
  checkpoint.add("model.layers.3.indexer.wk.weight", filled(DType::kF32, {256}, 0));
  checkpoint.add("model.layers.4.indexer.wk.weight", filled(DType::kF32, {256}, 0));
  checkpoint.add("model.layers.4.norm", filled(DType::kF32, {1}, 0));
  checkpoint.add("model.layers.7.eh_proj", filled(DType::kF32, {512}, 0));
  checkpoint.add("model.layers.77.norm", filled(DType::kF32, {1}, 0));
  Binder binder(checkpoint);
  binder.ignore_prefix("model.layers.3.indexer.", "indexers of shared layers");
  binder.ignore_prefix("model.layers.4.indexer.", "indexers of shared layers");
  binder.ignore_prefix("model.layers.7.", "multi-token prediction");
  binder.ignore_prefix("absent.", "never seen");
  binder.require("model.layers.4.norm", {1}, kFloat);
  binder.require("model.layers.77.norm", {1}, kFloat);
  binder.finish();
  ASSERT_EQ(binder.ignored().size(), 2u);
  EXPECT_EQ(binder.ignored()[0].num_tensors, 2u);
  EXPECT_EQ(binder.ignored()[0].num_bytes, 2048u);
  EXPECT_EQ(binder.ignored_summary(),
            "ignored 2 tensors (2.00 KiB): indexers of shared layers; 1 tensors (2.00 KiB): "
            "multi-token prediction");
}

TEST(Binder, AsksForTheScalesOfFp8Weights) {
  const std::vector<DType> allowed = {DType::kBF16, DType::kF8E4M3};
  Checkpoint checkpoint;
  checkpoint.add("a.weight", filled(DType::kF8E4M3, {130, 128}, 0));
  checkpoint.add("a.weight_scale_inv", filled(DType::kF32, {2, 1}, 0));
  checkpoint.add("b.weight", filled(DType::kBF16, {2, 2}, 0));
  Binder good(checkpoint);
  EXPECT_TRUE(good.require_scaled("a.weight", {130, 128}, allowed).scales.present());
  EXPECT_FALSE(good.require_scaled("b.weight", {2, 2}, allowed).scales.present());
  good.finish();

  checkpoint.add("b.weight_scale_inv", filled(DType::kF32, {1, 1}, 0));
  checkpoint.add("c.weight", filled(DType::kF8E4M3, {2, 2}, 0));
  checkpoint.add("d.weight", filled(DType::kF8E4M3, {129, 2}, 0));
  checkpoint.add("d.weight_scale_inv", filled(DType::kF32, {1, 1}, 0));
  Binder bad(checkpoint);
  bad.require_scaled("a.weight", {130, 128}, allowed);
  bad.require_scaled("b.weight", {2, 2}, allowed);
  bad.require_scaled("c.weight", {2, 2}, allowed);
  bad.require_scaled("d.weight", {129, 2}, allowed);
  expect_contains(
      error_of([&] { bad.finish(); }),
      {"\"b.weight_scale_inv\": surplus", "\"c.weight_scale_inv\": missing, expected [1, 1]",
       "\"d.weight_scale_inv\": found [1, 1] F32, expected [2, 1]"});
}

}  // namespace
}  // namespace indexcache
