"""Tags as tokens: a tokenizer that holds each as one, and embeddings that have a row for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preference_data.prompts.prompts import Tagset


def add_tags(tokenizer: PreTrainedTokenizerBase, tags: Tagset) -> list[str]:
    """Give every tag its own token where it has none yet; returns those that were added.

    Tags of prompts become special tokens. Those of answers do not: decoding with `skip_special_tokens` must
    keep the time stamps that a model says. Tokens that a released tokenizer has already stay as they are.
    A model that exists already must then learn of them, see `fit_embeddings`.
    """
    known = tokenizer.get_vocab()
    prompt = [tag for tag in tags.prompt if tag not in known]
    answer = [tag for tag in tags.answer if tag not in known]
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in prompt], special_tokens=True)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in answer])
    return [*prompt, *answer]


@torch.no_grad()
def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: Sequence[str]) -> int:
    """Give the tokens that `add_tags` added their rows in the embeddings, in and out; returns the rows grown.

    Released embeddings have rows to spare, and these are used first: nothing ever shrinks. A new row is the
    mean of those of the tokens that the tag's name is written with, the earlier ones weighing more, so that
    0.45 is not 0.54. Rows around the mean of all, as transformers draws them, are nearly one and the same:
    while the language model is frozen (Qwen-Audio's pre-training) all tasks would be asked alike.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = {id(e.weight): e.weight for e in (model.get_input_embeddings(), model.get_output_embeddings())}
    for tag in added:
        row = tokenizer.convert_tokens_to_ids(tag)
        for weight in tables.values():
            weight[row] = spelled_row(weight, tokenizer, tag)
    return max(0, len(tokenizer) - rows)


def spelled_row(table: Tensor, tokenizer: PreTrainedTokenizerBase, tag: str) -> Tensor:
    """Mean (d,) of the rows of a table (V, d) that spell the tag's name, with weights 1, 1/2, 1/3 ..."""
    spelled = tokenizer(tag.strip("<|>").replace("_", " "), add_special_tokens=False)["input_ids"]
    rows = table[spelled]
    weights = 1 / torch.arange(1, len(rows) + 1, dtype=torch.float32, device=rows.device)
    return ((weights / weights.sum()) @ rows.float()).to(rows.dtype)
