"""Tags as tokens: a tokenizer that holds each as one, and embeddings that have a row for it."""

from __future__ import annotations

from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preference_data.prompts import Tagset


def add_tags(tokenizer: PreTrainedTokenizerBase, tags: Tagset) -> int:
    """Give every tag its own token where it has none yet; returns how many were added.

    Tags of prompts become special tokens. Those of answers do not: decoding with `skip_special_tokens` must
    keep the time stamps that a model says. Tokens that a released tokenizer has already stay as they are.
    Afterwards the embeddings must fit, see `fit_embeddings`.
    """
    known = tokenizer.get_vocab()
    prompt = [AddedToken(tag, special=True, normalized=False) for tag in tags.prompt if tag not in known]
    answer = [AddedToken(tag, special=False, normalized=False) for tag in tags.answer if tag not in known]
    return int(tokenizer.add_tokens(prompt, special_tokens=True)) + int(tokenizer.add_tokens(answer))


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Grow the embeddings, in and out, to the tokenizer; returns the rows added.

    Released embeddings have rows to spare, and spare rows are used first: nothing ever shrinks. New rows are
    drawn around the mean of the old ones, as transformers does it.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer))
    return max(0, len(tokenizer) - rows)
