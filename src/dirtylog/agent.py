"""The gentle way to be logged: a program that imports this lets ``dirtylog run pid:N`` in, and nobody has to stop it for that.

``import dirtylog.agent`` starts the agent, a thread that hands a userfaultfd of this process to the same user or to root. Of a
program that cannot be changed, ``python -m dirtylog.agent PROGRAM [ARGS]`` runs it with an agent; ``-m MODULE`` runs a module.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from dirtylog.linux.agents import Agent

_USAGE = "usage: python -m dirtylog.agent [-m MODULE | PROGRAM] [ARGS]"


def _run_script(path: str) -> None:
    """Run a script in this module, which is ``__main__`` as the script's would be, and stays so for threads that outlive it."""
    code = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(path).resolve().parent)
    module = vars(sys.modules["__main__"])
    begins_with = {"__name__": "__main__", "__file__": str(Path.cwd() / path), "__spec__": None, "__builtins__": __builtins__}
    # From here on the names of this module are gone.
    module.clear()
    module.update(begins_with)
    exec(code, module)  # noqa: S102 - to run the user's program is what this is for


if __name__ != "__main__":
    AGENT = Agent()
    """This process's agent; ``AGENT.handed_over`` counts what it gave away."""
else:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        print(_USAGE, file=sys.stderr)  # noqa: T201 - as a program
        sys.exit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
    AGENT = Agent()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        if Path(arguments[0]).is_file():
            _run_script(arguments[0])
        else:
            runpy.run_path(arguments[0], run_name="__main__")
