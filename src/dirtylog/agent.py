"""The gentle way to be logged: a program that imports this lets ``dirtylog run pid:N`` in, and nobody has to stop it for that.

``import dirtylog.agent`` starts the agent, a thread that hands a userfaultfd of this process to the same user or to root. Of a
program that cannot be changed, ``python -m dirtylog.agent PROGRAM [ARGS]`` runs it with an agent; ``-m MODULE`` runs a module.
"""

from __future__ import annotations

import runpy
import sys

from dirtylog.linux.agents import Agent

_USAGE = "usage: python -m dirtylog.agent [-m MODULE | PROGRAM] [ARGS]"

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
        runpy.run_path(arguments[0], run_name="__main__")
