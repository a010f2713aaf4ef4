"""The command `align`, also as `python -m align`."""

import os
import signal


def main() -> None:
    """Run the command. Ctrl-C while it still imports ends it with 75: nothing has begun."""
    signal.signal(signal.SIGINT, _leave)
    from align.cli.main import main as run_command

    run_command()


def _leave(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(75)  # at once: an exception could be lost in a library's import


if __name__ == "__main__":
    main()
