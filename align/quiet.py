"""What libraries need not tell: progress beside ours, telemetry, deprecations that are theirs to mend."""

from __future__ import annotations

import logging
import os
import warnings

_SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "TQDM_DISABLE": "1",  # we show our own progress
}
_NO_GPU = "Setting accelerator to CPU"


def quieten() -> None:
    """To be called before anything heavy is imported; what the user has set stays."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # accelerate imports DeepSpeed whenever it is installed; without a GPU it would say so on stdout
    logging.getLogger("DeepSpeed").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return _NO_GPU not in str(record.msg)
