"""Shell completion, generated from the parser itself, so that it can not fall behind it.

`edgectl completion bash` (or `zsh`) prints the script; the packaged copies are tested to be that output.
Names of models are asked of the daemon as they are completed, in at most a second, and silently; since bash
expands the words that it completes from, `models --names` prints none that a model could not really have.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

__all__ = ["SHELLS", "script"]

SHELLS = ("bash", "zsh")

_NOTHING = "COMPREPLY=()"

_BASH = """\
# bash completion for edgectl; printed by `edgectl completion bash`.
_edgectl() {{
    local cur prev command word i
    COMPREPLY=()
    cur="${{COMP_WORDS[COMP_CWORD]}}"
    prev="${{COMP_WORDS[COMP_CWORD-1]}}"
    command=""
    for ((i = 1; i < COMP_CWORD; i++)); do
        word="${{COMP_WORDS[i]}}"
        case "$word" in
            {commands_alternation}) command="$word"; break ;;
        esac
    done
    case "$command:$prev" in
{value_cases}    esac
    if [[ -z "$command" ]]; then
        mapfile -t COMPREPLY < <(compgen -W "{top_words}" -- "$cur")
        return
    fi
    if [[ "$cur" == -* ]]; then
        case "$command" in
{option_cases}        esac
        return
    fi
    case "$command" in
{positional_cases}    esac
}}
_edgectl_models() {{
    edgectl models --names --timeout 1 2>/dev/null
}}
complete -F _edgectl edgectl
"""

_ZSH = """\
#compdef edgectl
# zsh completion for edgectl; printed by `edgectl completion zsh`.
_edgectl_models() {{
    local -a models
    models=("${{(@f)$(edgectl models --names --timeout 1 2>/dev/null)}}")
    compadd -a models
}}
_edgectl() {{
    local context state line
    _arguments -C \\
{top_options}        '1:command:(({commands_described}))' \\
        '*::argument:->argument'
    [[ "$state" == argument ]] || return
    case "$words[1]" in
{cases}    esac
}}
_edgectl "$@"
"""


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The completion script of `parser` for `shell`, one of SHELLS."""
    return _bash(parser) if shell == "bash" else _zsh(parser)


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _helps(parser: argparse.ArgumentParser) -> dict[str, str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {a.dest: str(a.help or "") for a in action._choices_actions}
    return {}


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [a for a in parser._actions if a.option_strings]


def _positionals(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [
        a for a in parser._actions if not a.option_strings and not isinstance(a, argparse._SubParsersAction)
    ]


def _words(parser: argparse.ArgumentParser) -> str:
    return " ".join(s for a in _options(parser) for s in a.option_strings)


def _bash_values(action: argparse.Action) -> str:
    """The bash that completes this action's value."""
    if action.choices:
        return f'mapfile -t COMPREPLY < <(compgen -W "{" ".join(map(str, action.choices))}" -- "$cur")'
    match action.metavar:
        case "MODEL":
            return 'mapfile -t COMPREPLY < <(compgen -W "$(_edgectl_models)" -- "$cur")'
        case "DIR":
            return 'mapfile -t COMPREPLY < <(compgen -d -- "$cur")'
        case "PATH" | "FILE" | "OUT":
            return 'mapfile -t COMPREPLY < <(compgen -f -- "$cur")'
        case _:
            return _NOTHING


def _bash_value_cases(parser: argparse.ArgumentParser) -> Iterator[str]:
    """What follows an option that takes a value; one that can not be completed completes to nothing."""
    nothing: dict[str, None] = {}
    for name, sub in {"": parser, **_commands(parser)}.items():
        for action in _options(sub):
            if action.nargs == 0:
                continue
            values = _bash_values(action)
            if values == _NOTHING:
                nothing.update(dict.fromkeys(f"*:{s}" for s in action.option_strings))
            else:
                patterns = "|".join(f"{name}:{s}" for s in action.option_strings)
                yield f"        {patterns}) {values}; return ;;\n"
    yield f"        {'|'.join(nothing)}) {_NOTHING}; return ;;\n"


def _bash(parser: argparse.ArgumentParser) -> str:
    commands = _commands(parser)
    value_cases = _bash_value_cases(parser)
    option_cases, positional_cases = [], []
    for name, sub in commands.items():
        option_cases.append(
            f'            {name}) mapfile -t COMPREPLY < <(compgen -W "{_words(sub)}" -- "$cur") ;;\n'
        )
        for action in _positionals(sub)[:1]:
            positional_cases.append(f"        {name}) {_bash_values(action)} ;;\n")
    return _BASH.format(
        commands_alternation="|".join(commands),
        value_cases="".join(value_cases),
        top_words=" ".join([*commands, _words(parser)]),
        option_cases="".join(option_cases),
        positional_cases="".join(positional_cases),
    )


def _zsh_quote(text: str) -> str:
    return text.replace("'", "’").replace("[", "(").replace("]", ")").replace(":", " -").replace("%%", "%")


def _zsh_value(action: argparse.Action) -> str:
    label = str(action.metavar or action.dest)
    if action.choices:
        return f":{label}:({' '.join(map(str, action.choices))})"
    match action.metavar:
        case "MODEL":
            return f":{label}:_edgectl_models"
        case "DIR":
            return f":{label}:_files -/"
        case "PATH" | "FILE" | "OUT":
            return f":{label}:_files"
        case _:
            return f":{label}: "


def _zsh_options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in _options(parser):
        value = "" if action.nargs == 0 else _zsh_value(action)
        for option in action.option_strings:
            yield f"'{option}[{_zsh_quote(str(action.help or ''))}]{value}'"


def _zsh(parser: argparse.ArgumentParser) -> str:
    helps = _helps(parser)
    cases = []
    for name, sub in _commands(parser).items():
        specs = [*_zsh_options(sub), *(f"'{n}{_zsh_value(a)}'" for n, a in enumerate(_positionals(sub), 1))]
        cases.append(f"        {name})\n            _arguments \\\n                ")
        cases.append(" \\\n                ".join(specs) + " ;;\n")
    described = " ".join(f'{name}\\:"{_zsh_quote(text)}"' for name, text in helps.items())
    return _ZSH.format(
        top_options="".join(f"        {spec} \\\n" for spec in _zsh_options(parser)),
        commands_described=described,
        cases="".join(cases),
    )
