"""The annotation server's own Python environment: argilla-server cannot live beside our pydantic."""

from pathlib import Path

from align.run_folder.server_environment import LOCKED, ServerEnvironment

ARGILLA = ServerEnvironment(
    name="argilla",
    server="the annotation server (Argilla)",
    install_command="align annotate install",
    costs="about a minute, 600 MB",
    variable="ALIGN_ARGILLA_ENV",
    lock_file=Path(__file__).parent / "server" / "requirements.lock",
    pip_options=LOCKED,
    proof="import argilla_server, fakeredis, rq, soundfile, uvicorn, aiosqlite, alembic.command",
    pythons=((3, 11), (3, 13)),  # argilla-server 2.8 pins libraries that have no builds for later ones
    # Argilla leaves files there when it is imported
    proof_variables={"TMPDIR": "{scratch}", "ARGILLA_HOME_PATH": "{scratch}", "HF_HUB_OFFLINE": "1"},
)
