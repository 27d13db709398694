"""Filling a store: groups of rows are claimed, captured, and written, until none is missing."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from saepipe import progress
from saepipe.claims import CLAIMS, Claims
from saepipe.durable import disk_errors
from saepipe.groups import GroupWriter
from saepipe.language_model import LanguageModel
from saepipe.store import Store
from saepipe.workers import Worker

log = logging.getLogger(__name__)

_WAIT_S = 0.5
_WRITERS = 4

Group = int | None
"""Number of a shuffle group; None stands for the held-out rows."""


def fill(store: Store, model: LanguageModel, worker: Worker) -> int:
    """Capture and write what is missing of a store, together with whoever else does the same.

    Returns when nothing is missing. One thread writes a group while the model reads the next: so two groups are in
    memory at once.

    Args:
        store: An incomplete store.
        model: Its language model.
        worker: Which process this is.

    Returns:
        The tokens that this process captured.

    Raises:
        UserError: No space on the disk, rows that are not finite, or out of memory.
    """
    if store.plan.threads:
        torch.set_num_threads(store.plan.threads)
    with (
        disk_errors("store.dir", store.folder),
        Claims(store.folder / CLAIMS) as claims,
        ThreadPoolExecutor(1, "writer") as thread,
    ):
        return _Filling(store, model, worker, claims, thread).run()


class _Filling:
    """One process' share of the work."""

    def __init__(
        self, store: Store, model: LanguageModel, worker: Worker, claims: Claims, thread: ThreadPoolExecutor
    ) -> None:
        self._store, self._model, self._worker, self._claims, self._thread = store, model, worker, claims, thread
        self._writing: Future[None] | None = None
        self._waited = False

    def run(self) -> int:
        """Take group after group; see `fill`."""
        missing = self._store.missing_groups()
        to_come = set(missing)  # neither done by others nor begun here
        tokens = 0
        with progress.bar("cache", sum(map(self._rows, missing))) as bar:
            while missing:
                group = self._claimed(missing)
                for other in to_come - set(missing) - set(group):
                    bar.update(self._rows(other))
                to_come &= set(missing) - set(group)
                if group:
                    tokens += self._do(group[0], bar)
                elif not self._written():
                    self._wait(missing)
                missing = self._store.missing_groups()
            self._written()
            for other in to_come:
                bar.update(self._rows(other))
        return tokens

    def _rows(self, group: Group) -> int:
        plan = self._store.plan
        return plan.held_out_rows if group is None else plan.group_rows(group)

    def _claimed(self, missing: Sequence[Group]) -> list[Group]:
        """Claim a missing group, the next one from this worker's own beginning; empty where others have them all."""
        begin = self._worker.index * self._store.plan.n_groups // self._worker.count
        later = [group for group in missing if group is not None and group >= begin]
        for group in [*later, *(group for group in missing if group not in later)]:
            if self._claims.take(claim_name(group)):
                if self._store.lacks(group):
                    return [group]
                self._claims.release(claim_name(group))  # done between the list and the claim
        return []

    def _do(self, group: Group, bar: Any) -> int:
        """Capture a group, and hand it to the thread that writes; returns how many tokens were captured."""
        plan = self._store.plan
        writer = GroupWriter(self._store, group)
        if not writer.hooks:  # another process that took it for its own finished it a moment ago
            bar.update(self._rows(group))
            self._claims.release(claim_name(group))
            return 0
        for first in range(0, len(writer.contexts), plan.batch_prompts):
            ids = torch.from_numpy(writer.ids(first, first + plan.batch_prompts).astype("int64"))
            writer.add(first, self._model.capture(ids, writer.hooks))
            bar.update(min(ids.numel(), self._rows(group) - first * plan.context_size))
            if self._writing is not None and self._writing.done():
                self._writing.result()  # a full disk is told at once, not a group later
        self._written()
        self._writing = self._thread.submit(self._write, writer, group)
        return self._rows(group)

    def _write(self, writer: GroupWriter, group: Group) -> None:
        writer.write(threads=_WRITERS if self._model.device.type == "cuda" else 1)
        self._claims.release(claim_name(group))

    def _written(self) -> bool:
        """Wait for the group that is being written; False where there is none."""
        if self._writing is None:
            return False
        self._writing.result()
        self._writing = None
        return True

    def _wait(self, missing: Sequence[Group]) -> None:
        if not self._waited:
            others = ", ".join(self._claims.holders(map(claim_name, missing))) or "others"
            n = f"{len(missing)} group is" if len(missing) == 1 else f"{len(missing)} groups are"
            log.info("%s: %s still with %s", self._store.folder, n, others)
            self._waited = True
        time.sleep(_WAIT_S)


def claim_name(group: Group) -> str:
    """Return the name under which a group is claimed."""
    return "heldout" if group is None else f"{group:06d}"
