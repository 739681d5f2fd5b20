"""`loralloc completion`: a script by which a shell completes verbs, flags and files."""

from __future__ import annotations

import argparse
import sys

SCRIPT = """\
_loralloc() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" flags=""
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=( $(compgen -W "{verbs}" -- "$current") )
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    if [[ "$current" == -* ]]; then
        COMPREPLY=( $(compgen -W "$flags" -- "$current") )
    fi
}}
complete -o default -o bashdefault -F _loralloc loralloc
"""

ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "completion",
        help="print a script that lets a shell complete",
        description="Print a script that completes verbs, flags and files.",
        epilog='bash: eval "$(loralloc completion bash)"; zsh likewise, with zsh.',
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(run=run, verbs=verbs)


def run(args: argparse.Namespace) -> int:
    """Print the script, with the flags as they are now."""
    from loralloc.runs.flags import flags

    of_runs = [f"--{flag.name}" for group in flags().values() for flag in group]
    cases = []
    for name, parser in args.verbs.choices.items():
        own = [option for action in parser._actions for option in action.option_strings]
        found = own + (of_runs if parser.get_default("takes_more_flags") else [])
        words = " ".join(dict.fromkeys(word for word in found if word.startswith("--")))
        cases.append(f'        {name}) flags="{words}" ;;')
    script = SCRIPT.format(verbs=" ".join(args.verbs.choices), cases="\n".join(cases))
    sys.stdout.write((ZSH if args.shell == "zsh" else "") + script)
    return 0
