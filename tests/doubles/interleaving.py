"""The programs of a launch at once, in Triton's interpreter.

The interpreter runs one program after another, so programs that wait for each other would hang there. Here each is a thread,
one runs at a time, and at every access to global memory another may go on, as a seed has it: some far ahead, some far behind.
Accesses happen in one order for all; what a GPU may reorder is not seen.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from basinescape.kernels.tiles import Tiles
from triton.runtime.interpreter import GridExecutor, interpreter_builder

SMALL = Tiles(blocks=((64, 4), (256, 8)), tile=(64, 8))  # in the place of the usual ones: samples of 257 elements have tiles
ACCESSES = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
TURNS = 200_000  # more than any launch here takes: after so many, it hangs


class Program(threading.Thread):
    """One program of a launch, which waits for its turn before each access."""

    def __init__(self, body: Callable[[], None], paused: threading.Semaphore):
        super().__init__(daemon=True)
        self.body, self.index, self.paused = body, interpreter_builder.grid_idx, paused
        self.turn, self.over, self.error = threading.Semaphore(0), False, None

    def run(self) -> None:
        self.turn.acquire()
        try:
            self.body()
        except BaseException as error:
            self.error = error
        self.over = True
        self.paused.release()

    def wait(self) -> None:
        self.paused.release()
        self.turn.acquire()


class Together:
    """A kernel's function: called for one program after another, and with the last of them runs all."""

    def __init__(self, function: Callable[..., None], rng: random.Random):
        self.function, self.rng = function, rng
        self.__name__, self.__globals__ = function.__name__, function.__globals__
        self.__signature__ = inspect.signature(function)
        self.programs: list[Program] = []
        self.paused = threading.Semaphore(0)

    def __call__(self, **arguments: object) -> None:
        self.programs.append(Program(lambda: self.function(**arguments), self.paused))
        if all(at + 1 == size for at, size in zip(interpreter_builder.grid_idx, interpreter_builder.grid_dim, strict=True)):
            self._run()

    def _run(self) -> None:
        eagerness = {program: self.rng.random() ** 4 + 0.01 for program in self.programs}
        for program in self.programs:
            program.start()
        for _ in range(TURNS):
            live = [program for program in self.programs if not program.over]
            if not live:
                return
            (program,) = self.rng.choices(live, [eagerness[program] for program in live])
            interpreter_builder.grid_idx = program.index
            program.turn.release()
            self.paused.acquire()
            if program.error is not None:
                raise program.error
        raise AssertionError(f"{len(live)} of {len(self.programs)} programs still wait after {TURNS} turns")


def _taking_turns(access: Callable[..., object]) -> Callable[..., object]:
    def wrapped(*arguments: object) -> object:
        program = threading.current_thread()
        if isinstance(program, Program):
            program.wait()
        return access(*arguments)

    return wrapped


@contextmanager
def interleaved(seed: int) -> Iterator[None]:
    """Run all launches so; `seed` decides who goes on."""
    rng, make = random.Random(seed), GridExecutor.__init__

    def init(self: GridExecutor, function: Callable[..., None], *arguments: object, **keywords: object) -> None:
        make(self, function, *arguments, **keywords)
        self.fn = Together(function, rng)

    accesses = {name: _taking_turns(getattr(interpreter_builder, name)) for name in ACCESSES}
    with patch.object(GridExecutor, "__init__", init), patch.multiple(interpreter_builder, **accesses):
        yield
