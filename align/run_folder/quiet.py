"""How libraries behave below us: no progress beside ours, no telemetry, threads that share their cores.

Deprecations are theirs to mend, so nobody is told.
"""

from __future__ import annotations

import logging
import os
import warnings

_SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin for long starve everyone else on a shared machine
    "GOMP_SPINCOUNT": "10000",  # but none at all halves the speed of small models: some 10 us, then sleep
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
