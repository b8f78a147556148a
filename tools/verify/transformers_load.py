#!/usr/bin/env python3
"""Loads a checkpoint with Hugging Face transformers and compares its logits and text with ours.

Usage: indexcache logits -m MODEL --tokens IDS.json --greedy 64 --dtype f32 -o OUT.safetensors
       tools/verify/transformers_load.py MODEL IDS.json OUT.safetensors [f32|bf16]
Fails if a weight is missing or surplus, if the relative error of the logits exceeds 1e-4 in f32 or
1e-2 in bf16, or if the greedy continuation differs. Runs on a GPU where torch has one.
"""
import json
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

BOUND = {"f32": 1e-4, "bf16": 1e-2}

model_path, ids_path, ours_path = sys.argv[1:4]
kind = sys.argv[4] if len(sys.argv) > 4 else "f32"
device = "cuda" if torch.cuda.is_available() else "cpu"
model, report = AutoModelForCausalLM.from_pretrained(
    model_path, dtype={"f32": torch.float32, "bf16": torch.bfloat16}[kind],
    attn_implementation="eager", output_loading_info=True)
for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    found = sorted(map(str, report[name]))
    print(f"{name}: {len(found)} {found[:5]}")
    if found:
        sys.exit(1)
print("indexer_types:", getattr(model.config, "indexer_types", None))
model = model.to(device).eval()
ids = torch.tensor([json.load(open(ids_path))], device=device)
ours = load_file(ours_path)
with torch.no_grad():
    theirs = model(ids).logits[0].float().cpu()
error = ((ours["logits"] - theirs).norm() / theirs.norm()).item()
best = (ours["logits"].argmax(-1) == theirs.argmax(-1)).float().mean().item()
print(f"{kind}, {ids.shape[1]} tokens: relative error of the logits {error:.3g}, "
      f"same best token {100 * best:.2f}%")
failed = error > BOUND[kind]
if "greedy" in ours:
    wanted = ours["greedy"].tolist()
    with torch.no_grad():
        text = model.generate(ids, max_new_tokens=len(wanted), min_new_tokens=len(wanted),
                              do_sample=False)[0, ids.shape[1]:].tolist()
    same = next((i for i, (a, b) in enumerate(zip(wanted, text)) if a != b), len(wanted))
    print(f"greedy continuation: the first {same} of {len(wanted)} tokens are equal")
    failed |= same != len(wanted)
sys.exit(failed)
