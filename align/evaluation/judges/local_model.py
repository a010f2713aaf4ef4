"""A judge model in this process: any causal chat model that transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.evaluation.judges.chat_model import TOO_LONG, Message, Reply
from align.evaluation.judges.prompt import opens_thought
from align.generation.decoding import stop_tokens
from align.generation.text_prompts import complete_prompts
from align.models.shards import weights_sha256
from align.run_folder.artifacts import sha256_file, sha256_json

_PROMPTS = 8
"""That are answered together: of about equal length, so that little is padded."""


class LocalModel:
    """Answers greedily; nothing of the checkpoint's generation config counts but its stop tokens.

    Args:
        folder: a saved model with its tokenizer and chat template (safetensors, no code of its own).
        max_new_tokens: a longer reply is cut, finish reason "length".

    Raises:
        FileNotFoundError: the folder holds no safetensors.
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, folder: Path, max_new_tokens: int = 512) -> None:
        self.name = folder.name
        self.parameters = {"temperature": 0.0, "max_tokens": max_new_tokens}
        weights = weights_sha256(folder)  # first: it says what is wrong with a folder without weights
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if not self.tokenizer.chat_template:
            raise ValueError(f"{folder}: the tokenizer has no chat template; a judge must be a chat model")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()
        self.max_new_tokens = max_new_tokens
        self.stops = stop_tokens(self.model, self.tokenizer)
        self.identity = {
            "weights": weights,
            "files": _digest(folder),
            "decoding": "greedy",
            "max_new_tokens": max_new_tokens,
            "stops": self.stops,
            "dtype": str(dtype),
        }

    def reply(self, prompts: Sequence[Sequence[Message]], on_reply: Callable[[int, Reply], None]) -> None:
        """Answer every prompt, calling `on_reply(index, reply)` as each is ready."""
        self.model.to(self.device)  # not before: policies answer first and want the GPU for themselves
        limit = getattr(self.model.config, "max_position_embeddings", None)
        texts = [self._render(prompt) for prompt in prompts]
        encoded = [self._encode(text) for text in texts]
        fitting = []
        for index, ids in enumerate(encoded):
            if limit and len(ids) + self.max_new_tokens > limit:
                on_reply(index, Reply(f"the prompt has {len(ids)} tokens, the model takes {limit}", TOO_LONG))
            else:
                fitting.append(index)
        fitting.sort(key=lambda index: len(encoded[index]))
        for start in range(0, len(fitting), _PROMPTS):
            batch = fitting[start : start + _PROMPTS]
            own = [encoded[i] for i in batch]
            completions = complete_prompts(self.model, own, self.max_new_tokens, self.stops)
            for index, tokens in zip(batch, completions, strict=True):
                reason = "stop" if tokens[-1] in self.stops else "length"
                # With special tokens: some models mark their thoughts with them.
                spoken = self.tokenizer.decode([token for token in tokens if token not in self.stops])
                text = opens_thought(texts[index]) + spoken
                on_reply(index, Reply(text, reason, len(encoded[index]), len(tokens)))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _render(self, prompt: Sequence[Message]) -> str:
        """The prompt's text up to where the model should speak."""
        try:
            return self._apply_template(list(prompt))
        except TemplateError:  # a template without a system role, e.g. Gemma's
            joined = "\n\n".join(message["content"] for message in prompt)
            return self._apply_template([{"role": "user", "content": joined}])

    def _apply_template(self, messages: list[Message]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _digest(folder: Path) -> str:
    """Of the files that decide a reply beside the weights: config, tokenizer, chat template."""
    names = {".json", ".jinja", ".txt", ".model"}
    files = sorted(file for file in folder.iterdir() if file.suffix in names)
    return sha256_json([(f.name, sha256_file(f)) for f in files if f.name != "generation_config.json"])
