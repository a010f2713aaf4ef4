"""Run under torchrun: four DPO steps over the packed backbone, every second pair text alone.

    torchrun --nproc-per-node 2 tests/align/models/packed_ranks.py {ddp|2|3} FOLDER

With one pair per process the second one never has audio. FOLDER holds the models `policy` and `reference`;
the losses are written to its losses.json.
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path

import torch.distributed
from datasets import Dataset
from transformers import Qwen2AudioForConditionalGeneration
from trl import DPOConfig

from align.models.qwen2_audio.packed import pack
from align.training.library_fixes import compile_once
from tests.align.ragged_batch import Rows, pairs
from tests.align.training.test_packed_trl import DPO, arguments, tokenizer

ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": False},
}


def main(stage: str, folder: Path) -> None:
    """Train."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    more = {"per_device_train_batch_size": 2 // int(os.environ["WORLD_SIZE"]), "max_steps": 4}
    more |= {"train_sampling_strategy": "sequential", "ddp_backend": "gloo"}
    if stage != "ddp":
        import deepspeed

        compile_once()  # DeepSpeed's own builds of it would meet those of other tests
        deepspeed.init_distributed(dist_backend="gloo")
        more["deepspeed"] = ZERO | {"zero_optimization": {"stage": int(stage)}}
    settings = DPOConfig(**arguments(folder / "out", **more))  # from here on ZeRO-3 splits what is loaded
    policy, reference = (
        pack(Qwen2AudioForConditionalGeneration.from_pretrained(folder / name))
        for name in ("policy", "reference")
    )
    heard, text = [pairs()[i] for i in (0, 1, 3, 0)], pairs()[2]
    policy.model.audio_tower.embed_positions.requires_grad_(False)  # loading has un-frozen them
    trainer = DPO(
        model=policy,
        ref_model=reference,
        args=settings,
        train_dataset=Dataset.from_list([row for one in heard for row in (one, text)]),
        processing_class=tokenizer(),
        data_collator=Rows(),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        (folder / "losses.json").write_text(json.dumps(losses))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


main(sys.argv[1], Path(sys.argv[2]))
