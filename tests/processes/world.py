"""Processes that train together, forked from one that has loaded everything.

Run: python tests/processes/world.py MODULE FOLDER NUMBER...

For each number that many processes carry out `MODULE.checks(folder)`, a mapping of names to
functions, in its order, or with `MODULE:NAME,NAME` some of them; what each returned, or the error
that it raised, goes into `FOLDER/NUMBER-INDEX.json`.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
# Gloo looks up the machine's own name otherwise, which not every machine resolves.
if sys.platform == "linux":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import faulthandler
import functools
import gc
import importlib
import json
import socket
import threading
import traceback
import warnings

PATIENCE_S = float(os.environ.get("PATIENCE_S", "120"))
"""How long a check may take; whoever waits longer for the others says where."""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def join(number: int, index: int, port: int) -> None:
    """Be one of so many processes, as a launcher says it."""
    names = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    if number > 1:
        os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def fork(number: int, work) -> list[int]:
    """The exit codes of so many processes, each of which carries out `work(index)`."""
    port = free_port()
    started = []
    for index in range(number):
        process = os.fork()
        if not process:
            code = 70
            try:
                join(number, index, port)
                code = work(index) or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        started.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]


def carry_out(module: str, chosen: list[str], folder: Path, number: int, index: int) -> None:
    """Some checks of a module as one of so many processes."""
    warnings.simplefilter("ignore")
    path = folder / f"{number}-{index}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name, check in importlib.import_module(module).checks(folder / f"{number}").items():
        if name not in chosen:
            continue
        faulthandler.dump_traceback_later(PATIENCE_S)  # where each waits, before one ends
        end = threading.Timer(PATIENCE_S + 10, os._exit, (71,))
        end.daemon = True
        end.start()
        try:
            found[name] = check()
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            if os.environ.get("SHOW"):
                traceback.print_exc()
        end.cancel()
    faulthandler.cancel_dump_traceback_later()
    path.write_text(json.dumps(found))


def main(module: str, folder: str, *numbers: str) -> None:
    """Fork once for each number, or for each check where the module says `APART`."""
    module, _, chosen = module.partition(":")
    loaded = importlib.import_module(module)
    gc.freeze()  # else each process copies and collects what all have
    for number in map(int, numbers):
        where = Path(folder) / f"{number}"
        where.mkdir(parents=True, exist_ok=True)
        names = chosen.split(",") if chosen else list(loaded.checks(where))
        for group in [[name] for name in names] if getattr(loaded, "APART", False) else [names]:
            work = functools.partial(carry_out, module, group, Path(folder), number)
            codes = fork(number, work)
            if any(codes):
                raise SystemExit(f"{group}: of {number} processes some ended with {codes}")


if __name__ == "__main__":
    main(*sys.argv[1:])
