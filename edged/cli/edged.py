"""`edged`: the daemon's command line.

Owns flags and exit codes, nothing else: it checks the settings, says in one line what is wrong with them or
what is not installed, and hands over to `edged.daemon`.

Exit codes: 0 stopped as asked, 64 a command line that makes no sense, 69 (EX_UNAVAILABLE) a library that the
daemon needs is not installed, 78 (EX_CONFIG) a setting is wrong; others are the daemon's own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from edged.config import Config, ConfigError, load_config
from edged.version import __version__

__all__ = ["build_parser", "main"]

EXIT_USAGE = 64
EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78
"""sysexits.h's; systemd shows them by name, and edged.service does not restart on 78."""

DESCRIPTORS = 65536
"""As edged.service's LimitNOFILE; a shell gives 1024, which is less than one leaking app can open."""

_LIBRARIES = ("zmq", "msgpack", "msgspec", "psutil", "watchdog")
"""What the daemon can not do without; the client has the first two."""

_EPILOG = """\
Every other setting stands in edged.toml or in the environment as EDGED_<SECTION>_<KEY>.
With no file at all, edged serves the models folder of the system service or of the user.
exit codes: 0 stopped as asked, 64 bad usage, 69 a library of the daemon's is not installed, 78 a bad setting
"""


class _UsageError(Exception):
    """The command line makes no sense."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(message)


def build_parser() -> argparse.ArgumentParser:
    """The command line of the daemon."""
    parser = _Parser(
        prog="edged",
        description="Serve the models in a folder to the apps on this device.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--models", metavar="DIR", help="the models folder")
    parser.add_argument(
        "--endpoint", metavar="ENDPOINT", help="ipc://DIR/edged.sock; the other sockets lie beside it"
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="the settings file (default: edged.toml, if there)"
    )
    parser.add_argument("--state-dir", metavar="DIR", help="staged models and what was learned")
    parser.add_argument("--cache-dir", metavar="DIR", help="compiled models; may be deleted at any time")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="how much is said")
    parser.add_argument("--log-format", choices=("auto", "text", "json", "journal"), help="how it is said")
    parser.add_argument("--check", action="store_true", help="check the settings, say what they are, and end")
    parser.add_argument("--version", action="version", version=f"edged {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the daemon until it is told to stop; returns the exit code."""
    try:
        args = build_parser().parse_args(argv)
    except _UsageError as e:
        return _refuse(f"{e} (`edged --help` shows what there is)", EXIT_USAGE)
    except SystemExit as e:  # --help and --version
        return int(e.code or 0)
    try:
        config = _load(args)
    except ConfigError as e:
        return _refuse(e.message, EXIT_CONFIG)
    if args.check:
        print(_summary(config))
        return 0
    missing = _missing()
    if missing:
        return _refuse(
            f"this Python has only edged's client: the daemon also needs {', '.join(missing)}; install "
            "`edged[cpu]`, `edged[openvino]` or `edged[cuda]`",
            EXIT_UNAVAILABLE,
        )
    _raise_descriptor_limit()
    from edged import daemon

    code: int = daemon.main(config, reload=lambda: _load(args))
    return code


def _load(args: argparse.Namespace) -> Config:
    """The settings as they are now; asked again on SIGHUP. Raises ConfigError."""
    flags = {
        "server.models": args.models,
        "server.endpoint": args.endpoint,
        "server.state_dir": args.state_dir,
        "server.cache_dir": args.cache_dir,
        "log.level": args.log_level,
        "log.format": args.log_format,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    return load_config(flags=given, environ=os.environ, file=args.config)


def _raise_descriptor_limit() -> None:
    """As many descriptors as the system allows: libzmq aborts the process when a connection finds none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _missing() -> list[str]:
    return [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]


def _summary(config: Config) -> str:
    server = config.server
    return (
        f"the settings are good: models {server.models}, endpoint {server.endpoint}, "
        f"state {server.state_dir}, cache {server.cache_dir}, log {config.log.level}/{config.log.format}"
    )


def _refuse(message: str, code: int) -> int:
    print(f"edged: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
