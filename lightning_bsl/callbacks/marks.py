"""The multiples of a number on the clock of a run, at which something happens once each."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_bsl.callbacks.batch_lr import BatchLRScheduler, scheduler_of
from lightning_bsl.schedules import Progress
from lightning_bsl.schedules.checks import check_whole
from lightning_bsl.schedules.progress import Unit, check_unit, crosses


class Marks:
    """The multiples of ``n`` in ``unit`` on the clock of a ``BatchLRScheduler``.

    It follows from the clock before and after a step whether the step crossed a mark, so a resumed run has the same marks.

    Args:
        n: Distance of the marks.
        unit: Its unit.

    Attributes:
        progress: The clock that is read.

    Raises:
        ValueError: ``n`` is not a whole number of 1 or more, or the unit is not known.
    """

    def __init__(self, n: int, unit: Unit) -> None:
        check_whole("n", n)
        check_unit(unit)
        self.n, self.unit = n, unit
        self._scheduler: BatchLRScheduler | None = None
        self._seen = Progress()

    @property
    def progress(self) -> Progress:
        """The clock."""
        return self._scheduler.progress if self._scheduler is not None else Progress()

    def begin(self, trainer: Trainer, name: str) -> None:
        """Called in ``on_fit_start``, when the clock of a checkpoint is restored: begin at the clock of the run.

        Args:
            trainer: The Trainer.
            name: Name of the callback that has the marks.

        Raises:
            MisconfigurationException: There is no ``BatchLRScheduler``, or it does not count in ``unit``.
        """
        self._scheduler = scheduler_of(trainer)
        if self._scheduler is None:
            raise MisconfigurationException(
                f"{name} reads the clock of a BatchLRScheduler, but there is none among the callbacks: add one (with "
                "`BatchLRScheduler(batch_size)` the batch size is constant), or use Lightning's `val_check_interval` and "
                "`ModelCheckpoint(every_n_train_steps=...)`"
            )
        if self.unit == "tokens" and self.progress.horizon.tokens_per_sample is None:
            raise MisconfigurationException(
                f"`{name}({self.n}, unit='tokens')`: the number of tokens of an example is not known. Give the DataModule an "
                "attribute `tokens_per_sample`, or write `unit='samples'`"
            )
        self.see()

    def see(self) -> None:
        """Whatever the clock has crossed by now has been dealt with."""
        self._seen = self.progress

    def crossed(self, trainer: Trainer) -> bool:
        """Whether the step that was completed since ``see`` crossed a mark.

        Args:
            trainer: The Trainer.
        """
        now = self.progress
        if now.step == self._seen.step:
            return False
        # the clock counts an epoch only in `on_train_epoch_end`, but its last step completes it
        after = now.next_epoch() if trainer.is_last_batch else now
        return crosses(self._seen._replace(epoch=now.epoch), after, self.n, self.unit)
