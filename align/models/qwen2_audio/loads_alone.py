"""Load a folder with transformers alone and answer as its user would; run as a script in a fresh Python.

    python -I loads_alone.py FOLDER SCRATCH

Imports nothing of ours, so that nothing of ours can help. SCRATCH holds probe.safetensors (wave, ids,
logits) and question.txt. Prints one line of JSON.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor


def main(folder: str, scratch: Path) -> None:
    """Compare ids and logits with those of the probe; see the module."""
    probe = load_file(scratch / "probe.safetensors")
    question = (scratch / "question.txt").read_text(encoding="utf-8")
    processor = AutoProcessor.from_pretrained(folder)
    model, loading = AutoModelForMultimodalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, output_loading_info=True
    )
    content = [{"type": "audio"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, audio=[probe["wave"].numpy()], sampling_rate=16_000, return_tensors="pt")
    same_ids = torch.equal(inputs["input_ids"], probe["ids"])
    difference = float("inf")
    if same_ids:
        with torch.no_grad():
            difference = (model.eval()(**inputs).logits.float() - probe["logits"]).abs().max().item()
    names = sorted([*loading["missing_keys"], *loading["unexpected_keys"]])
    print(json.dumps({"difference": difference, "same_ids": same_ids, "names": names}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
