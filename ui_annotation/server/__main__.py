"""Serve Argilla from one folder: `python -m server --home HOME`. SIGTERM and Ctrl-C end it in order.

Behind a proxy, set FORWARDED_ALLOW_IPS to its address (or addresses and networks, separated by commas). Only
from there do X-Forwarded-Proto and X-Forwarded-For count, and of the latter the last entry that is not one of
these addresses. No other header says where a request comes from.
"""

import argparse
import asyncio
import gc
import ipaddress
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType

import uvicorn

from . import configuration, home

LOCAL = "127.0.0.1"
STOP_PATIENCE_S = 3


class AnnouncedServer(uvicorn.Server):
    """Writes server.json once it takes requests and removes it before it stops taking them."""

    def __init__(self, config: uvicorn.Config, url: str, folder: Path, sign_ins: home.Credentials) -> None:
        super().__init__(config)
        self._url, self._folder, self._sign_ins = url, folder, sign_ins

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and announce the server only if it really started."""
        await super().startup(sockets)
        if not self.started:
            return
        home.write_json(self._folder / "server.json", {"pid": os.getpid(), "url": self._url})
        print(f"Argilla serves at {self._url}; sign-ins: {self._folder / 'credentials.json'}", flush=True)
        if sys.stdout.isatty():  # a log must not hold passwords, nor is there a reason to print them again
            for name in self._sign_ins.added:
                print(f"  {name}: {self._sign_ins.users[name]['password']}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Withdraw the announcement, then stop in order."""
        (self._folder / "server.json").unlink(missing_ok=True)
        await super().shutdown(sockets)


def main() -> int:
    """Run until a signal ends it.

    Returns:
        0 after an orderly end, 1 when it could not serve; the reason is on stderr.
    """
    options = _options()
    os.umask(0o077)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _end)
    try:
        return _serve(options)
    except home.StartRefused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="server", description="Argilla, with everything it needs in one folder."
    )
    parser.add_argument("--home", type=Path, required=True, help="state folder; nobody else may read it")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--host", default=LOCAL, help="other than 127.0.0.1 only behind a TLS proxy")
    parser.add_argument("--workspace", default="audio")
    parser.add_argument(
        "--annotators",
        type=lambda names: [name.strip() for name in names.split(",") if name.strip()],
        help="a,b: accounts that must be there",
    )
    parser.add_argument(
        "--while-stdin", action="store_true", help="end when stdin does, so with whoever holds its other end"
    )
    return parser.parse_args()


def _serve(options: argparse.Namespace) -> int:
    folder = options.home.absolute()
    proxies = _proxies()
    home.check_name("workspace", options.workspace)
    home.prepare(folder)
    home.lock(folder)
    if options.while_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True, name="stdin").start()
    (folder / "server.json").unlink(missing_ok=True)  # of a server that was killed
    listening = _listen(options.host, options.port)
    home.empty_scratch(folder)
    sign_ins = home.credentials(folder, options.annotators)
    configuration.configure(folder, sign_ins.auth_secret)
    configuration.check_services()
    gc.disable()  # a seventh of the start would be looking for garbage among what stays
    _prepare_argilla(options.workspace, sign_ins, {home.OWNER, *sign_ins.added, *(options.annotators or ())})

    from .front import app

    gc.freeze()
    gc.enable()
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=STOP_PATIENCE_S,
        lifespan="on",
        proxy_headers=bool(proxies),
        forwarded_allow_ips=proxies,
    )
    url = f"http://{options.host}:{listening.getsockname()[1]}"
    server = AnnouncedServer(config, url, folder, sign_ins)
    server.run(sockets=[listening])
    return 0 if server.started else 1


def _proxies() -> list[str]:
    """Who may say for whom they ask: everybody who can connect could, if this were everybody."""
    proxies = [item.strip() for item in os.environ.get("FORWARDED_ALLOW_IPS", "").split(",") if item.strip()]
    for item in proxies:
        try:
            everybody = ipaddress.ip_network(item).prefixlen == 0
        except ValueError:
            everybody = True
        if everybody:
            raise home.StartRefused(
                f"FORWARDED_ALLOW_IPS: {item!r} is no address of a proxy. Name it, as in 172.18.0.2, or its "
                "network, as in 172.18.0.0/28; without a proxy leave it unset"
            )
    return proxies


def _listen(host: str, port: int) -> socket.socket:
    """Take the port at once: what may fail fails before the slow part."""
    try:
        return socket.create_server((host, port), backlog=1024)
    except OSError as error:
        raise home.StartRefused(
            f"port {port} on {host}: {error.strerror}. Name another with --port, or use --port 0"
        ) from error


def _prepare_argilla(workspace: str, sign_ins: home.Credentials, members: set[str]) -> None:
    if not configuration.uses_real_redis():
        configuration.keep_jobs_in_process()
    from . import accounts  # imports Argilla: only now is its environment complete

    accounts.migrate()
    asyncio.run(accounts.seed(workspace, sign_ins.users, members))
    from . import argilla_fixes, search_engine  # noqa: F401  search_engine: importing it registers it

    argilla_fixes.apply()


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
