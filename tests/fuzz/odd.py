"""Cases that fail in every way, for the tests of the pool itself."""

import os
import time

from fuzz.pool import REFUSED, Case, Outcome, Tell


def make(name: str) -> Case:
    def case(number: int, tell: Tell) -> Outcome:
        tell(f"{name} {number}")
        if number == 1:
            raise KeyError("raw")
        if number == 2:
            os._exit(7)
        if number == 3:
            time.sleep(600)
        return Outcome(REFUSED, "")

    return case
