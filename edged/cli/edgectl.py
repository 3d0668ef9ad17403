"""`edgectl`: everything that a person or a fleet script asks of the daemon.

Owns the command line: what may be said, and what becomes of it. What the commands do is in `commands`,
`updates` and `bench`.

Exit codes: 0 done, 1 refused or failed, 2 time-out, 3 no daemon, 64 a command line that makes no sense.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from edged.cli import completion
from edged.cli.session import (
    AWAY,
    EXIT_FAILED,
    EXIT_NOT_RUNNING,
    EXIT_OK,
    EXIT_TIMEOUT,
    EXIT_USAGE,
    START_HINT,
    Failure,
    Session,
)
from edged.cli.tables import clean
from edged.errors import Code, EdgedError
from edged.version import __version__

__all__ = ["build_parser", "main"]

_EXIT_INTERRUPTED = 130
_EXIT_BROKEN_PIPE = 141
"""As a shell reports SIGINT and SIGPIPE."""

_TIMEOUT_S = 30.0
_LOGS_ASK_S = 5.0
"""Whose journal it is can be found out without the daemon too, if it gives no answer."""
_UPDATE_TIMEOUT_S = 300.0
"""A compile for an accelerator on a small board takes minutes."""

_DESCRIPTION = "Ask the edged inference daemon: what it serves, on what, how fast; and give it new models."

_EPILOG = """\
exit codes: 0 done, 1 refused or failed (with the reason), 2 time-out, 3 no daemon, 64 bad usage
environment: EDGED_ENDPOINT names the daemon's socket, NO_COLOR turns colours off
"""

_INPUT_HELP = """\
inputs:
  -i NAME=@FILE.npy        an array
  -i NAME=@FILE.json       JSON, nested lists or a number
  -i NAME=@PICTURE.png     a picture (needs pillow), also .jpg, .webp, .bmp …
  -i NAME='[[1, 2, 3]]'    JSON in place; for BYTES also plain text
  -i @FILE.npz             all inputs at once, each under its name; a golden sample will do
A model with one input needs no NAME=. A missing batch dimension is added.

pictures: resized (bilinear) to the declared height and width, in the declared layout: 1, 3 or 4
channels in the second place are NCHW, in the last NHWC; [H, W] is one grey picture, [1, 784] a flat
grey one of 28 × 28. Pixels become 0 to 1 for floats, 0 to 255 for integers; --image-scale S makes it
0 to S. A model that wants means and deviations taken off needs an .npy.
"""


_TUNE_HELP = """\
Measures runtime × device × threads × instances × batch beside the one that serves, as far as the model's
settings leave them open. Requests go on; they come first. The best of what is shown to answer the same is
remembered for this content on this machine, and the model is reloaded with it beside the old one: no request
is lost. Before that nothing changes, and Ctrl-C ends it. Without a terminal, --yes applies it. What speaks
against another runtime is listed; to run the model there all the same takes a yes of its own.
"""

_OPERATORS_HELP = """\
By itself the daemon moves a model to another runtime only if each operator on its way is in a table of
those on which the two were shown to agree. The table that comes with edged holds for the versions and the
instruction set that it was made on; this makes one here. It takes some 10 minutes of a processor, and asks
nothing of the daemon.
"""


class _UsageError(Exception):
    """The command line makes no sense."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message}\n{self.format_usage().strip()}")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="edgectl",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"edgectl {__version__}")
    _common(parser, default=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_updates(commands)
    _add_questions(commands)
    _add_infer(commands)
    _add_bench(commands)
    _add_tune(commands)
    _add_operators(commands)
    _add_bad_day(commands)
    sub = _command(commands, "completion", "print the completion script for a shell", common=False)
    sub.add_argument("shell", choices=completion.SHELLS, help="the shell")
    return parser


def _common(parser: argparse.ArgumentParser, default: Any) -> None:
    """Options that may stand before the command and behind it; there they must not undo what stood here."""
    json_default = False if default is None else default
    parser.add_argument(
        "--json", action="store_true", default=json_default, help="answer with one JSON document"
    )
    parser.add_argument(
        "--endpoint", metavar="ENDPOINT", default=default, help="the daemon's socket, ipc://DIR/edged.sock"
    )


def _command(
    commands: argparse._SubParsersAction[Any],
    name: str,
    text: str,
    *,
    common: bool = True,
    timeout_s: float | None = _TIMEOUT_S,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if common:
        _common(sub, argparse.SUPPRESS)
        if timeout_s is not None:
            sub.add_argument(
                "--timeout",
                type=_seconds,
                default=timeout_s,
                metavar="S",
                help=f"give up after so many seconds (default {timeout_s:g})",
            )
    return sub


def _add_updates(commands: argparse._SubParsersAction[Any]) -> None:
    sub = _command(
        commands,
        "put",
        "publish a model into the models folder, whole or not at all",
        timeout_s=_UPDATE_TIMEOUT_S,
    )
    sub.add_argument(
        "path", metavar="PATH", type=Path, help="a .onnx, a .xml with its .bin, or a bundle directory"
    )
    sub.add_argument("--name", metavar="NAME", help="the model's name (default: the file's)")
    sub.add_argument("--models", metavar="DIR", type=Path, help="the models folder (default: the daemon's)")
    settings = sub.add_mutually_exclusive_group()
    settings.add_argument(
        "--settings", metavar="FILE", type=Path, help="the model's settings (default: a .toml beside PATH)"
    )
    settings.add_argument("--no-settings", action="store_true", help="leave a .toml beside PATH where it is")
    sub.add_argument(
        "--wait",
        action="store_true",
        help="stay until the daemon serves this very content with these settings (0), refuses it (1), or "
        "has said neither in time (2)",
    )
    sub = _command(
        commands,
        "wait",
        "wait until a model serves (0), is refused (1), or neither in time (2)",
        timeout_s=_UPDATE_TIMEOUT_S,
    )
    sub.add_argument("model", metavar="MODEL", help="the model's name")
    sub.add_argument(
        "--sha256",
        metavar="HASH",
        help="this content, as `edgectl put --json` names it: sha256sum of a model that is one file",
    )


def _add_questions(commands: argparse._SubParsersAction[Any]) -> None:
    _command(commands, "status", "show the daemon, its models, devices and resources")
    sub = _command(commands, "models", "list the models with state and reason")
    sub.add_argument("--names", action="store_true", help="only the names, one a line")
    sub = _command(commands, "stats", "show counts and times of each model")
    sub.add_argument("model", metavar="MODEL", nargs="?", help="only this one")
    _command(commands, "devices", "list the devices with verdict and hint")
    sub = _command(commands, "watch", "show events as they come, until Ctrl-C")
    sub.add_argument("--count", metavar="N", type=_count, help="end after so many events")
    sub.add_argument(
        "--topic", metavar="TOPIC", action="append", help="only this topic, such as model.state; repeatable"
    )
    sub = _command(commands, "load", "ask the daemon to load a model (again)")
    sub.add_argument("model", metavar="MODEL", help="the model's name")
    sub = _command(commands, "unload", "take a model out of service until load, or until its bytes change")
    sub.add_argument("model", metavar="MODEL", help="the model's name")


def _add_bad_day(commands: argparse._SubParsersAction[Any]) -> None:
    sub = _command(commands, "doctor", "look for what is wrong with daemon and machine, and say what to type")
    sub.add_argument("--all", action="store_true", help="show what is in order too")
    _add_unit(sub)
    sub = _command(
        commands, "explain", "say where a model came from, why it runs where it does, what happened"
    )
    sub.add_argument("model", metavar="MODEL", help="the model's name")

    sub = _command(commands, "top", "show what goes on, live: requests, latencies, queues, memory, heat")
    sub.add_argument("--once", action="store_true", help="one interval, then end")
    sub.add_argument(
        "--interval", metavar="S", type=_seconds, default=1.0, help="seconds between two looks (default 1)"
    )
    sub.add_argument(
        "--sort",
        choices=("requests", "latency", "memory", "name"),
        default="requests",
        help="the order of the models (default requests)",
    )
    sub = _command(
        commands, "logs", "show the daemon's journal, or one model's part of it", timeout_s=_LOGS_ASK_S
    )
    sub.add_argument("model", metavar="MODEL", nargs="?", help="only what is about this model")
    sub.add_argument("-f", "--follow", action="store_true", help="go on as lines come, until Ctrl-C")
    sub.add_argument("-n", "--lines", metavar="N", type=_count, default=50, help="the newest N (default 50)")
    sub.add_argument("--since", metavar="TIME", help="from then on, as journalctl takes it: today, -2h")
    sub.add_argument("-x", "--explain", action="store_true", help="with what each event means and asks for")
    _add_unit(sub)

    sub = _command(
        commands, "support-bundle", "write one file with all that a developer needs, and no secrets"
    )
    sub.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        type=Path,
        help="a .tar.gz that is not there yet (default: edged-support-HOST-TIME.tar.gz here)",
    )
    _add_unit(sub)


def _add_unit(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--unit", metavar="UNIT", default="edged", help="the system's service (default edged)")


def _add_model_and_inputs(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="the model's name")
    _add_inputs(sub)
    sub.add_argument(
        "--model-version", metavar="V", dest="version", help="a version (default: the serving one)"
    )


def _add_inputs(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "-i", "--input", metavar="INPUT", action="append", default=[], help="an input, see below; repeatable"
    )
    sub.add_argument("--image-scale", metavar="S", type=float, help="pixels become 0 to S")


def _add_infer(commands: argparse._SubParsersAction[Any]) -> None:
    sub = _command(commands, "infer", "send one request and show the answer", epilog=_INPUT_HELP)
    _add_model_and_inputs(sub)
    sub.add_argument("-o", "--output", metavar="NAME", action="append", help="only this output; repeatable")
    sub.add_argument("--npz", metavar="OUT", type=Path, help="write the outputs to this .npz as well")


def _add_bench(commands: argparse._SubParsersAction[Any]) -> None:
    sub = _command(
        commands,
        "bench",
        "measure a model through the daemon, and beside the bare runtime",
        epilog=_INPUT_HELP,
    )
    _add_model_and_inputs(sub)
    sub.add_argument(
        "--seconds", metavar="S", type=_seconds, default=5.0, help="how long each side runs (default 5)"
    )
    sub.add_argument(
        "--clients", metavar="N", type=_count, default=1, help="then so many client processes at once"
    )
    sub.add_argument("--rate", metavar="HZ", type=float, help="paced: so many requests a second per client")
    _add_shape(sub)
    sub.add_argument("--onnx", metavar="FILE", type=Path, help="the model's file, for the bare runtime")
    sub.add_argument("--no-bare", action="store_true", help="without the comparison")


def _add_shape(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--shape",
        metavar="NAME=DIMS",
        action="append",
        default=[],
        help="the shape of a made-up input, x=1x3x224x224; repeatable",
    )


def _add_tune(commands: argparse._SubParsersAction[Any]) -> None:
    sub = _command(
        commands,
        "tune",
        "measure how a model runs best here, and run it so",
        timeout_s=_UPDATE_TIMEOUT_S,
        epilog=f"{_TUNE_HELP}\n{_INPUT_HELP}",
    )
    sub.add_argument("model", metavar="MODEL", help="the model's name")
    _add_inputs(sub)
    _add_shape(sub)
    sub.add_argument(
        "--aim",
        choices=("latency", "throughput"),
        default="latency",
        help="the shortest time of a request (default), or the most rows a second",
    )
    sub.add_argument(
        "--budget", metavar="TIME", type=_budget, default=60.0, help="how long to measure (default 60s)"
    )
    sub.add_argument("--yes", action="store_true", help="apply the best that is proven without a question")
    sub.add_argument(
        "--accept-unproven",
        action="store_true",
        help="with --yes: apply the best even if its answers are not shown to be the same",
    )
    sub.add_argument(
        "--export", action="store_true", help="then write it into the model's settings file, for its twins"
    )


def _add_operators(commands: argparse._SubParsersAction[Any]) -> None:
    sub = _command(
        commands,
        "operators",
        "find out on which operators two runtimes agree on this device, as root or the daemon's user",
        epilog=_OPERATORS_HELP,
    )
    sub.add_argument(
        "--reference",
        metavar="RUNTIME:DEVICE",
        type=_side,
        default=("onnxruntime", "CPU"),
        help="what models run on (default onnxruntime:CPU)",
    )
    sub.add_argument(
        "--candidate",
        metavar="RUNTIME:DEVICE",
        type=_side,
        default=("openvino", "CPU"),
        help="where they might be moved (default openvino:CPU)",
    )
    sub.add_argument(
        "--only",
        metavar="OP",
        action="append",
        help="only this operator, or this signature as `edgectl explain` shows it; repeatable",
    )
    sub.add_argument("--state-dir", metavar="DIR", type=Path, help="the daemon's (default: it is asked)")


def _side(text: str) -> tuple[str, str]:
    from edged.cli.operators import side

    return side(text)


def _budget(text: str) -> float:
    from edged.cli.tune import budget

    return budget(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return value


def _handlers() -> dict[str, Callable[[Session, argparse.Namespace], int]]:
    """The commands' code, imported when one of them runs: `--help` and completion need no numpy."""
    from edged.cli import bench, bundle, commands, doctor, explain, logs, operators, top, tune, updates

    return {
        "put": updates.put,
        "wait": updates.wait,
        "status": commands.status,
        "models": commands.models,
        "stats": commands.stats,
        "devices": commands.devices,
        "watch": commands.watch,
        "load": commands.load,
        "unload": commands.unload,
        "infer": commands.infer,
        "bench": bench.bench,
        "tune": tune.tune,
        "operators": operators.operators,
        "doctor": doctor.doctor,
        "logs": logs.logs,
        "top": top.top,
        "support-bundle": bundle.support_bundle,
        "explain": explain.explain_command,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code and raises nothing."""
    try:
        args = build_parser().parse_args(argv)
    except _UsageError as e:
        print(f"edgectl: {e}\n`edgectl --help` names the commands", file=sys.stderr)
        return EXIT_USAGE
    except SystemExit as e:  # --help and --version
        return int(e.code or 0)
    try:
        if args.command == "completion":
            print(completion.script(args.shell, build_parser()), end="")
            return EXIT_OK
        code = _run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_OK if args.command == "watch" else _EXIT_INTERRUPTED
    except BrokenPipeError:
        # `edgectl … | head`: nobody reads on, and the interpreter's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE


def _run(args: argparse.Namespace) -> int:
    # While put, wait and tune wait, each single question to the daemon still has to be answered soon.
    timeout_s = min(args.timeout, _TIMEOUT_S) if args.command in ("put", "wait", "tune") else args.timeout
    try:
        with Session(endpoint=args.endpoint, as_json=args.json, timeout_s=timeout_s) as session:
            return _handlers()[args.command](session, args)
    except Failure as e:
        sentence = _with_next(e.message, f"`edgectl {args.command} --help` tells how it is used")
        return _fail(args, sentence, e.code, {"message": e.message, "reason": e.reason})
    except EdgedError as e:
        return _fail(args, _sentence(e, args), _exit_code(e), e.to_wire())


def _exit_code(e: EdgedError) -> int:
    if e.reason in AWAY:
        return EXIT_NOT_RUNNING
    if e.reason == "BAD_ENDPOINT":
        return EXIT_USAGE
    if e.code is Code.DEADLINE_EXCEEDED:
        return EXIT_TIMEOUT
    return EXIT_FAILED


def _sentence(e: EdgedError, args: argparse.Namespace) -> str:
    """What happened, and what to type next."""
    if e.reason in AWAY:
        return e.message if "systemctl start" in e.message else f"{e.message}; {START_HINT}"
    text = e.message if e.reason is None else f"{e.message} [{e.reason}]"
    if e.retry_after_ms is not None:
        text += f" (again after {e.retry_after_ms} ms)"
    return _with_next(text, _next(e, args.command, getattr(args, "model", None)))


def _next(e: EdgedError, command: str, model: str | None) -> str:
    match e.code:
        case Code.NOT_FOUND:
            return "`edgectl models` lists what there is"
        case Code.INVALID_ARGUMENT | Code.UNIMPLEMENTED:
            return f"`edgectl {command} --help` tells how it is used"
        case Code.DEADLINE_EXCEEDED | Code.RESOURCE_EXHAUSTED | Code.CANCELLED:
            return "`edgectl top` shows what keeps it busy"
        case Code.INTERNAL:
            return "`edgectl logs` has more of it"
        case Code.PERMISSION_DENIED:
            return "`edgectl doctor` says which group is missing"
        case _ if model is not None:
            return f"`edgectl explain {shlex.quote(model)}` says why"
        case _:
            return "`edgectl doctor` looks for the cause"


def _with_next(text: str, command: str) -> str:
    """The text, with a command to type where it names none itself."""
    return text if "`" in text or "usermod" in text else f"{text}; {command}"


def _fail(args: argparse.Namespace, sentence: str, code: int, error: dict[str, Any]) -> int:
    if args.json:
        print(json.dumps({"error": {**error, "exit_code": code}}))
    print(f"edgectl: {clean(sentence)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
