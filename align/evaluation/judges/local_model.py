"""A judge model in this process: any causal chat model that transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.evaluation.judges.prompt import Message
from align.evaluation.judges.reply_cache import TOO_LONG, Reply
from align.models.shards import weights_sha256


class LocalModel:
    """Answers greedily, one prompt at a time, so that no reply depends on its neighbours' padding.

    Args:
        folder: a saved model with its tokenizer and chat template (safetensors, no code of its own).
        max_new_tokens: a longer reply is cut, finish reason "length".

    Raises:
        FileNotFoundError: the folder holds no safetensors.
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, folder: Path, max_new_tokens: int = 512) -> None:
        self.name = folder.name
        self.max_new_tokens = max_new_tokens
        self.identity = {"weights": weights_sha256(folder), "max_new_tokens": max_new_tokens}
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if not self.tokenizer.chat_template:
            raise ValueError(f"{folder}: the tokenizer has no chat template; a judge must be a chat model")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        self.model = model.to(self.device).eval()

    def reply(self, prompts: Sequence[Sequence[Message]], on_reply: Callable[[int, Reply], None]) -> None:
        """Answer every prompt, calling `on_reply(index, reply)` as each is ready."""
        for index, prompt in enumerate(prompts):
            on_reply(index, self._one(prompt))

    @torch.no_grad()
    def _one(self, prompt: Sequence[Message]) -> Reply:
        ids = self._encode(prompt).to(self.device)
        n = ids.shape[1]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit and n + self.max_new_tokens > limit:
            return Reply(f"the prompt has {n} tokens, the model takes {limit}", TOO_LONG)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
        )
        answer = output[0, n:].tolist()
        ends = self.model.generation_config.eos_token_id
        stopped = bool(answer) and answer[-1] in (ends if isinstance(ends, list) else [ends])
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        return Reply(text, "stop" if stopped else "length", n, len(answer))

    def _encode(self, prompt: Sequence[Message]) -> torch.Tensor:
        """Token ids (1, T) up to where the model should speak."""
        try:
            text = self._render(prompt)
        except TemplateError:  # a template without a system role, e.g. Gemma's
            text = self._render([{"role": "user", "content": "\n\n".join(one["content"] for one in prompt)}])
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return ids

    def _render(self, prompt: Sequence[Message]) -> str:
        return self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
