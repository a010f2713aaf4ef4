"""DeepSpeed compiles an op on a CPU when it is first used."""

import os
import shutil

import pytest

CAN_COMPILE = shutil.which("g++") is not None


def need_compiler() -> None:
    """Where there is none the test skips, saying so; with CI=true it fails."""
    if not CAN_COMPILE:
        missing = "DeepSpeed compiles an op on a CPU and there is no g++: apt-get install g++"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)


def possible(cases: list[str]) -> list[str]:
    """Of cases named by their strategies those that can run here."""
    return [case for case in cases if CAN_COMPILE or "zero" not in case]
