#!/usr/bin/env python3
"""Loads a checkpoint with Hugging Face transformers and compares its logits with ours.

Usage: indexcache logits -m MODEL --tokens IDS.json -o OUT.safetensors --dtype f32
       tools/verify/transformers_load.py MODEL IDS.json OUT.safetensors
Fails if a weight is missing or surplus, or if the relative error of the logits exceeds 1e-4.
"""
import json
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

model_path, ids_path, ours_path = sys.argv[1:]
model, report = AutoModelForCausalLM.from_pretrained(
    model_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    found = sorted(map(str, report[kind]))
    print(f"{kind}: {len(found)} {found[:5]}")
    if found:
        sys.exit(1)
print("indexer_types:", getattr(model.config, "indexer_types", None))
ours = load_file(ours_path)["logits"]
with torch.no_grad():
    theirs = model(torch.tensor([json.load(open(ids_path))])).logits[0].float()
error = ((ours - theirs).norm() / theirs.norm()).item()
same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
print(f"relative error of the logits {error:.3g}, same best token {100 * same:.1f}%")
sys.exit(error > 1e-4)
