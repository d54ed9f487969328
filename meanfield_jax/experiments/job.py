"""The processes of a job that share a sweep: what they tell each other, and how long they wait.

They meet in the coordination service of ``jax.distributed``, not in a collective operation, whose
timeouts cannot be chosen. Waiting is counted in seconds that this process itself was running, so
that a suspended machine, or a job that was stopped as a whole, finds its time where it left it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import jax

# public functions for this do not exist; Orbax uses the same client
from jax._src.distributed import global_state

SWEEPS = itertools.count()
"""Numbers the sweeps of this process; all processes make the same ones, in the same order."""
TURN = 1.0
"""The seconds of one attempt at hearing something."""


class Job:
    """This process and the others.

    Attributes:
        index: The number of this process, from 0.
        count: The number of processes.
        patience: Seconds without a sign of life after which a process is considered dead.
    """

    def __init__(self, patience: float):
        self.index, self.count, self.patience = jax.process_index(), jax.process_count(), patience
        self._prefix = f"meanfield_jax/sweep/{next(SWEEPS)}"
        self._signs = itertools.count()

    @property
    def first(self) -> bool:
        """Whether this is the process that makes the store."""
        return self.index == 0

    def agree(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the first process makes, in all processes; they go on when all have heard of it.

        Args:
            make: Makes something that JSON can hold; called in the first process only.

        Returns:
            The same in all of them.

        Raises:
            RuntimeError: if the first process failed, or some process gave no sign of life.
        """
        if self.count == 1:
            return make()
        if not self.first:
            told = json.loads(self._hear())
            self._client.key_value_set(f"{self._prefix}/heard/{self.index}", "")
            if "error" in told:
                raise RuntimeError(f"process 0 of {self.count} failed: {told['error']}")
            return told
        try:
            with self._signs_of_life():
                made = make()
        except Exception as error:
            self._tell(json.dumps(dict(error=" ".join(str(error).split()))))
            raise
        self._tell(json.dumps(made))
        return made

    def wait(
        self, is_over: Callable[[], bool], num_left: Callable[[], int], said: Callable[[], str]
    ) -> None:
        """Waits for the others.

        Args:
            is_over: Whether there is nothing to wait for any more.
            num_left: What gets smaller as the others work.
            said: Says what has become of the work, for the error.

        Raises:
            RuntimeError: if nothing got smaller for as long as the patience lasts.
        """
        turn = min(TURN, self.patience / 10)
        left, waited = num_left(), 0.0
        while not is_over():
            time.sleep(turn)
            waited += turn
            if (now := num_left()) < left:
                left, waited = now, 0.0
            elif waited > self.patience:
                raise self._silent("another process", "it wrote no chunk", said())

    @contextlib.contextmanager
    def _signs_of_life(self) -> Generator[None]:
        """Lets the others know that this process is at work, unless it is stopped or dead."""
        over = threading.Event()

        def sign() -> None:
            while not over.wait(TURN):
                self._client.key_value_set(f"{self._prefix}/said/{next(self._signs)}", "")

        thread = threading.Thread(target=sign, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _tell(self, text: str) -> None:
        self._client.key_value_set(f"{self._prefix}/said/{next(self._signs)}", text)
        for other in range(1, self.count):
            self._get(f"heard/{other}", f"process {other}")

    def _hear(self) -> str:
        while not (text := self._get(f"said/{next(self._signs)}", "process 0")):
            pass
        return text

    def _get(self, key: str, who: str) -> str:
        turns = max(1, round(self.patience / TURN))
        for _ in range(turns):
            try:
                return self._client.blocking_key_value_get(
                    f"{self._prefix}/{key}", round(1000 * min(TURN, self.patience))
                )
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        raise self._silent(who, "it gave no sign", "nothing is lost, resume the sweep")

    def _silent(self, who: str, what: str, said: str) -> RuntimeError:
        return RuntimeError(
            f"process {self.index} of {self.count}: {who} seems to have died or to be stopped, as "
            f"{what} for {self.patience:.0f} s; {said}"
        )

    @property
    def _client(self) -> Any:
        return global_state.client
