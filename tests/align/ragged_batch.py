"""A small Qwen2-Audio with weights of order 1, and an awkward batch for it, packed or as the stock wants it.

Four pairs: one clip of odd length; another with answers that begin alike; text alone; two clips, one of
which a pair before has heard. A common system prompt, ragged answers, one clip of the full length.
"""

import math

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from align.models.features import Clip, stack
from align.models.qwen2_audio.clips import n_audio_tokens, pack_rows, stack_unpadded

AUDIO, PAD, VOCAB, BINS, FULL = 7, 0, 64, 8, 160
N_FRAMES = (87, 42, 160)


def small_model(dtype=torch.float32, seed=0, layers=2):
    """Random weights scaled so that attention is not uniform; keys are shared by two heads each."""
    torch.manual_seed(seed)
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": 24,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "encoder_layers": layers,
            "num_mel_bins": BINS,
            "max_source_positions": FULL // 2,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "vocab_size": VOCAB,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": PAD,
        },
        audio_token_index=AUDIO,
    )
    model = Qwen2AudioForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.3 if "embed_positions" in name else 0.05 if weight.ndim == 1 else None
            if "norm" in name and name.endswith("weight"):
                continue
            weight.copy_(torch.randn(weight.shape) * (scale or 1 / math.sqrt(weight[0].numel())))
    model.generation_config.eos_token_id = 2
    return model.to(dtype)


def clips(seed=0):
    """Three clips as `ClipFeatures` gives them: random mel, then silence."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for n in N_FRAMES:
        mel = torch.randn(BINS, min(n + 3, FULL), generator=draw)
        mel[:, n + 2 :] = -1.5  # two frames hear the clip's end, as with Whisper's hop of 10 ms
        found.append(Clip(mel, n, FULL))
    return found


def pairs(seed=0):
    """Rows `prompt_ids, chosen_ids, rejected_ids, clips`."""
    draw = torch.Generator().manual_seed(seed)

    def words(n):
        return torch.randint(10, VOCAB, (n,), generator=draw).tolist()

    system, opening = words(6), words(5)

    def prompt(heard, before, after):
        audio = [token for clip in heard for token in [AUDIO] * n_audio_tokens(N_FRAMES[clip]) + words(2)]
        return system + words(before) + audio + words(after)

    return [
        {
            "prompt_ids": prompt(heard, before, after),
            "chosen_ids": common + words(chosen),
            "rejected_ids": common + words(rejected),
            "clips": list(heard),
        }
        for heard, before, after, common, chosen, rejected in (
            ((0,), 3, 9, [], 12, 21),
            ((1,), 2, 4, opening, 7, 3),
            ((), 8, 11, [], 5, 17),
            ((2, 0), 1, 6, [], 30, 4),
        )
    ]


class Rows:
    """A collator: rows of `pairs` to TRL's [chosen; rejected] batch; `min_shared` None: the stock form."""

    def __init__(self, min_shared=4):
        self.min_shared = min_shared
        self.clips = clips()

    def __call__(self, rows):
        """Collate."""
        sides = [(row, side) for side in ("chosen_ids", "rejected_ids") for row in rows]
        ids = [torch.tensor(row["prompt_ids"] + row[side]) for row, side in sides]
        scored = [
            torch.arange(len(r)) >= len(row["prompt_ids"]) for r, (row, _) in zip(ids, sides, strict=True)
        ]
        batch = text_batch(ids) | audio_batch(
            ids, [row["clips"] for row, _ in sides], self.clips, self.min_shared
        )
        batch["completion_mask"] = pad_sequence(scored, batch_first=True).long()
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch


def text_batch(ids):
    """input_ids and attention_mask, right padded."""
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


def audio_batch(ids, row_clips, known, min_shared):
    """Stock: a padded clip per use. Packed: distinct clips and `packed`."""
    if min_shared is None:
        return stack([known[clip] for own in row_clips for clip in own])
    used = sorted({clip for own in row_clips for clip in own})
    renamed = [[used.index(clip) for clip in own] for own in row_clips]
    distinct = [known[clip] for clip in used]
    packed = pack_rows(ids, renamed, [clip.n_frames for clip in distinct], AUDIO, min_shared)
    return stack_unpadded(distinct) | {"packed": packed}


def gradients(model):
    """Name -> gradient of all parameters that got one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(ours, theirs):
    """Largest relative gradient difference of any tensor; both must have the same ones."""
    assert ours.keys() == theirs.keys()
    assert ours
    largest = max(gradient.double().norm() for gradient in theirs.values())
    return max(
        float((ours[name].double() - theirs[name].double()).norm() / theirs[name].double().norm())
        for name in ours
        if theirs[name].double().norm() > 1e-9 * largest
    )
