"""A trained toy policy, once for all tests of what completes."""

import pytest


@pytest.fixture(scope="session")
def toy(tiny, tmp_path_factory):
    """The folder of the policy; its clips are `tiny.audio`."""
    from tests.align.generation import toy_policy

    folder = tmp_path_factory.mktemp("toy") / "policy"
    toy_policy.train(tiny.policy, tiny.audio, folder)
    return folder
