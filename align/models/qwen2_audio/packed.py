"""Qwen2-Audio's backbone over a packed batch: every distinct prefix and every clip once, no padding.

`pack(model)` changes one thing in a loaded model: the class of its inner backbone. A batch that carries a
`packed` (see `packing`) then goes rows in, hidden states of those rows out, with each distinct token
computed once in between; losses, heads and trainers see no difference. Generation fills its cache the same
way (`prefill`). Everything else (transformers' `generate`, left padding, stock batches) takes the stock path.
Weights, saved names and config stay those of the stock.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    DynamicCache,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioModelOutputWithPast

from align.kernels.attention import BACKENDS, Ragged, compute_dtype
from align.kernels.choice import choose
from align.models.packing import PackedBatch
from align.models.qwen2_audio.clips import HALO, KeptClip, KeptClips, PackedClips
from align.models.tower_outputs import Outputs, TowerOutputs

ATTENTION = "packed"
"""The name under which transformers knows our attention."""
_STOCK_ONLY = (
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "output_hidden_states",
    "output_attentions",
    "use_cache",
)


class PackedQwen2AudioModel(Qwen2AudioModel):
    """The stock backbone with a second way through it, for batches that say how they are packed."""

    attention: str | None = None
    """A name of `align.kernels.attention.BACKENDS`; None: chosen by the device."""
    tower_outputs: TowerOutputs | None = None
    """Where the outputs of the tower are kept, while it is frozen."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        packed: PackedBatch | None = None,
        scored: Tensor | None = None,
        **kwargs: Any,
    ) -> Qwen2AudioModelOutputWithPast:
        """Hidden states (N, T, D) of the rows `input_ids` (N, T); anything at padding.

        With `packed`, `input_features` (C, M, F) are its distinct clips to encode. `scored` (S,) are places
        in the flattened rows: with it only their hidden states (1, S, D) come back.

        Raises:
            ValueError: a packed batch meets an argument that only the stock path knows.
        """
        if packed is None:
            return super().forward(
                input_ids=input_ids,
                input_features=input_features,
                attention_mask=attention_mask,
                labels=labels,
                **kwargs,
            )
        kwargs.pop("feature_attention_mask", None)
        if refused := [name for name in _STOCK_ONLY if kwargs.pop(name, None)]:
            raise ValueError(f"a packed batch cannot be run with {refused}: leave `packed` out of the batch")
        hidden = self._hidden(packed, input_features, **kwargs)
        index = packed.index if scored is None else packed.index.flatten()[scored][None]
        # An embedding lookup, because its gradient sums the rows of a shared token in a fixed order.
        return Qwen2AudioModelOutputWithPast(
            last_hidden_state=F.embedding(index, hidden), attention_mask=attention_mask, labels=labels
        )

    def prefill(self, packed: PackedBatch, features: Tensor | None) -> tuple[Tensor, DynamicCache]:
        """Hidden states (L, D) of the packed row, and every layer's keys and values (1, H, L, D) of it."""
        cache = DynamicCache(config=self.config.text_config)
        return self._hidden(packed, features, past_key_values=cache, use_cache=True), cache

    def _hidden(self, packed: PackedBatch, features: Tensor | None, **kwargs: Any) -> Tensor:
        """Hidden states (L, D) of the packed row."""
        embedded = self.get_input_embeddings()(packed.tokens)
        if packed.clips is not None and (features is not None or not packed.clips.n_encoded):
            vectors = self.encode(features, packed.clips).to(embedded.dtype)
            embedded = embedded.index_copy(0, packed.audio_at, vectors[packed.audio_from])
        elif "past_key_values" not in kwargs:
            # Other ranks may have audio, and ZeRO-3 and DDP wait for everyone's share of the tower. Alone
            # as well, so that the optimizer sees the same gradients: see `align.training.processes`.
            embedded = embedded + 0 * self._encode_silence(embedded).sum()
        states: Tensor = self.language_model(
            inputs_embeds=embedded[None],
            attention_mask={"full_attention": None},
            position_ids=packed.positions[None],
            attend=self._attend(packed.sees, embedded, self.config.text_config),
            **{"use_cache": False, **kwargs},
        ).last_hidden_state
        return states[0]

    def encode(self, features: Tensor | None, clips: PackedClips | KeptClips) -> Tensor:
        """Audio vectors (V, D) of distinct clips, of which `features` (C, M, F) are those to encode."""
        if isinstance(clips, KeptClips):
            outputs = clips.outputs(self._encode_kept, features)
        else:
            assert features is not None
            outputs = self._encode(features, clips)
        vectors: Tensor = self.multi_modal_projector(outputs[None])[0]
        return vectors

    @torch.no_grad()
    def _encode_kept(self, mel: Tensor, clip: KeptClip) -> Tensor:
        """Outputs (v, d) of a clip, which are kept from now on.

        In the precision of the tower's weights, whatever the rest computes in: all stages share them.
        """
        device = self.audio_tower.conv1.weight.device
        with torch.autocast(device.type, enabled=False):
            outputs = self._encode(mel, PackedClips.of([clip.n_frames]).to(device))
        if self.tower_outputs is not None:
            self.tower_outputs.put(clip.name, Outputs(outputs.cpu(), clip.n_frames))
        return outputs

    def _encode(self, features: Tensor, clips: PackedClips) -> Tensor:
        """Outputs (V, d) of the tower for `features` (C, M, F): what the stock tower gives, unpadded.

        The stock tower encodes 30 s of every clip, masks the padding and throws its output away.
        """
        tower = self.audio_tower
        mel = features.to(device=tower.conv1.weight.device, dtype=tower.conv1.weight.dtype)
        grid = F.gelu(tower.conv2(F.gelu(tower.conv1(mel)))).transpose(1, 2)
        # Positions through the module, not its weight: ZeRO-3 gathers weights when modules are called.
        frames = (grid[clips.clip, clips.position] + tower.embed_positions(clips.position))[None]
        attend = self._attend(clips.sees, frames, self.config.audio_config)
        for layer in tower.layers:
            frames = layer(frames, None, attend=attend)
        pooled = tower.avg_pooler(frames[:, clips.pooled].transpose(1, 2)).transpose(1, 2)
        outputs: Tensor = tower.layer_norm(pooled)[0]
        return outputs

    def _encode_silence(self, like: Tensor) -> Tensor:
        n_frames = 4
        mel = torch.zeros(1, self.audio_tower.num_mel_bins, n_frames + HALO, device=like.device)
        return self.encode(mel, PackedClips.of([n_frames]).to(like.device)).to(like.dtype)

    def _attend(self, sees: Ragged, states: Tensor, config: Any) -> Callable[..., Tensor]:
        heads = config.num_attention_heads
        dtype, width = compute_dtype(states), states.shape[-1] // heads
        name = self.attention or choose(states.device, dtype, heads, width)
        return partial(BACKENDS[name], sees=sees)


def pack(
    model: Qwen2AudioForConditionalGeneration, attention: str | None = None
) -> Qwen2AudioForConditionalGeneration:
    """Give a loaded model the packed backbone, in place; before PEFT or a trainer wraps it.

    `attention` names a back end; without it `align.kernels.choice` takes one.

    Raises:
        ValueError: the model has something that the packed path does not compute.
    """
    audio, text = model.config.audio_config, model.config.text_config
    dropped = [audio.dropout, audio.attention_dropout, audio.activation_dropout, audio.encoder_layerdrop]
    if any(dropped) or text.attention_dropout:
        raise ValueError("the model has dropout, which the packed backbone does not draw: set packed: false")
    return pack_for_inference(model, attention)


def pack_for_inference(
    model: Qwen2AudioForConditionalGeneration, attention: str | None = None
) -> Qwen2AudioForConditionalGeneration:
    """`pack` for a model in eval mode, which draws no dropout.

    Raises:
        ValueError: the language model has sliding-window layers.
    """
    if set(model.config.text_config.layer_types) != {"full_attention"}:
        raise ValueError(
            "the model has sliding-window layers, which packing does not know: to train set packed: false; "
            "to generate set use_sliding_window: false in the text_config of its config.json"
        )
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    # save_pretrained finds the Hub's weight names by class name, and knows no class but transformers' own.
    stock_names = get_checkpoint_conversion_mapping("Qwen2AudioModel")
    register_checkpoint_conversion_mapping("PackedQwen2AudioModel", stock_names, overwrite=True)
    model.model.__class__ = PackedQwen2AudioModel
    model.model.attention = attention
    model.set_attn_implementation(ATTENTION)  # lasting, not per call: checkpointing recomputes later
    return model


def keep_tower_outputs(
    model: Qwen2AudioForConditionalGeneration, run: Path | None, limit_gb: float | None = None
) -> TowerOutputs | None:
    """Keep the outputs of a packed model's tower, which is frozen, in the folder of a run.

    They may take `limit_gb`, 10^9 bytes. Returns where collators find them; None where nothing is kept:
    without a run, or of a small tower.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where it will compute
    model.model.tower_outputs = TowerOutputs.of_run(run, model.model.audio_tower, device, limit_gb)
    return model.model.tower_outputs


def is_packed(model: nn.Module) -> bool:
    """Whether `model`, however wrapped, has the packed backbone."""
    return any(isinstance(module, PackedQwen2AudioModel) for module in model.modules())


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attend: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (1, H, L, D) in, (1, L, H, D) out; stock without `attend`."""
    if attend is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attend(query, key, value, scale=scaling).transpose(1, 2), None
