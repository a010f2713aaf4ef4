"""A small policy that has learned to say which tone it hears, and the slow, obvious twin of the engine."""

import json

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, Qwen2AudioForConditionalGeneration

from align.generation.engine import Completion, Request
from align.models.chat import (
    assistant,
    encode_completion,
    encode_prompt,
    encode_text,
    expand_audio,
    join,
    system,
    user,
)
from align.models.features import ClipFeatures, stack
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.clips import n_audio_tokens

QUESTIONS = {
    "Is the tone high or low?": ("The tone is high.", "The tone is low."),
    "high?": ("high", "low"),
    "Generate the caption in English:": ("A high tone.", "A low tone. A low tone. A low tone."),
}


def messages(request):
    """The chat of a request, message by message."""
    chat, left = system(request.system), len(request.audios)
    for turn in request.history:
        chat += [user(turn.question, len(turn.audios)), assistant(turn.answer)]
        left -= len(turn.audios)
    return [*chat, user(request.text, left)]


def encode(processor, request, clips):
    """Token ids of a request's prompt, audio tokens repeated."""
    prompt = (
        encode_text(processor, request.text) if request.plain else encode_prompt(processor, messages(request))
    )
    audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    return expand_audio(prompt, [n_audio_tokens(clip.n_frames) for clip in clips], audio_id)


def train(policy, root, to, steps=60):
    """Fit a saved policy to `QUESTIONS` about `0.wav` to `3.wav`, of which the odd ones are low."""
    processor, model = qwen2_audio.load_processor(policy), qwen2_audio.load_model(policy)
    clips = ClipFeatures(processor, root)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids, labels, heard = [], [], []
    for question, answers in QUESTIONS.items():
        for i in range(4):
            clip = clips([f"{i}.wav"])
            prompt = encode(processor, Request(question, (f"{i}.wav",)), clip)
            row = join(prompt, encode_completion(processor, answers[i % 2]))
            ids.append(torch.tensor(row.ids))
            labels.append(torch.where(torch.tensor(row.mask) == 1, ids[-1], -100))
            heard += clip
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        **stack(heard),
    }
    targets = pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:]
    for _ in range(steps):
        loss = F.cross_entropy(model(**batch).logits[:, :-1].transpose(1, 2), targets, ignore_index=-100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    qwen2_audio.save(model, processor, to)


class Stock:
    """Stock transformers: one request at a time, clips padded to the model's window, `generate`, greedy."""

    def __init__(self, policy, root):
        self.processor = qwen2_audio.load_processor(policy)
        self.model = Qwen2AudioForConditionalGeneration.from_pretrained(policy, dtype=torch.float32).eval()
        ends = self.model.generation_config.eos_token_id
        pad = self.processor.tokenizer.pad_token_id
        self.model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
        self.clips = ClipFeatures(self.processor, root)

    @torch.no_grad()
    def complete(self, request, max_new_tokens):
        """One greedy completion."""
        clips = self.clips(request.audios)
        ids = torch.tensor([encode(self.processor, request, clips).ids])
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **stack(clips),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[0, ids.shape[1] :]
        logps = torch.stack(out.logits, 1)[0].log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        text = self.processor.tokenizer.decode(tokens, skip_special_tokens=not request.plain)
        return Completion(text, tokens.tolist(), logps.tolist())


def with_generation_config(policy, to, **settings):
    """A copy of a saved policy whose generation config has these settings too."""
    to.mkdir()
    for path in policy.iterdir():
        (to / path.name).symlink_to(path)
    config = json.loads((policy / "generation_config.json").read_text())
    (to / "generation_config.json").unlink()
    (to / "generation_config.json").write_text(json.dumps(config | settings))
    return to
