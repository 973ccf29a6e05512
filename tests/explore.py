"""Puts every question of the catalogue to the explorer, and prints the answers: ``make explore``.

With ``--stories`` the stories of the unsafe orders too, as docs/ordering.md has them; ``--replay NAME SEED`` tells one schedule.
"""

from __future__ import annotations

import argparse
import sys
import time

from interleave.catalogue import SAFE, UNSAFE
from interleave.explorer import explore, replay


def main() -> int:
    """Explore, and return 1 if an answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stories", action="store_true", help="only the unsafe orders, with their stories")
    parser.add_argument("--replay", nargs=2, metavar=("NAME", "SEED"), help="tell the schedule of a seed")
    options = parser.parse_args()
    if options.replay:
        name, seed = options.replay
        question = next((one for one in (*SAFE, *UNSAFE) if one.name == name), None)
        if question is None:
            parser.error(f"{name!r} is no question; they are: {', '.join(one.name for one in (*SAFE, *UNSAFE))}")
        try:
            wrong, story = replay(question.scene(), seed)
        except ValueError as error:
            parser.error(str(error))
        print("\n".join(story), wrong or "nothing is lost", sep="\n")
        return 0
    wrong_answers = schedules = states = 0
    for question in UNSAFE if options.stories else (*UNSAFE, *SAFE):
        began = time.perf_counter()
        result = explore(question.scene, bound=question.bound)
        schedules, states = schedules + result.schedules, states + result.states
        right = question.safe != bool(result.violations)
        wrong_answers += not right
        answer = "safe" if not result.violations else "UNSAFE"
        print(f"{'' if right else 'WRONG '}{answer:<6} {question.name}: {result}, {time.perf_counter() - began:.1f} s", flush=True)
        if result.violations and (options.stories or not right):
            print(result.violations[0])
    print(f"{schedules} schedules, {states} states, {wrong_answers} wrong answers")
    return min(wrong_answers, 1)


if __name__ == "__main__":
    sys.exit(main())
