"""A callback that validates at multiples of a number of samples, tokens, steps or epochs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_bsl.callbacks.loop import checks_epoch_ends, set_steps_taken, validate_before_training, validate_when
from lightning_bsl.callbacks.marks import Marks
from lightning_bsl.schedules.progress import Unit


class ValidateEvery(Callback):
    """Validates whenever the clock of a ``BatchLRScheduler`` crosses a multiple of ``n``.

    Lightning's ``val_check_interval`` counts batches, or is a fraction of an epoch: while the batch size grows, it means ever
    more examples, or ever fewer optimizer steps. Here the validation comes after the first optimizer step at which the clock
    reaches or passes a multiple of ``n``; a step that passes several multiples validates once. Micro-batches are one step.

    Nothing else triggers a validation: not the end of an epoch, not ``trainer.should_stop``, and, as with
    ``val_check_interval``, not the end of the run, unless it falls on a multiple.

    The validation is Lightning's own, at its usual place. ``ModelCheckpoint``, ``EarlyStopping`` and the like see a run with
    validations inside epochs: they act after each validation, unless told otherwise. A resumed run validates at the same
    multiples. If its checkpoint was saved after a step and before the validation that this step was due, as by
    ``CheckpointEvery`` with the same ``n``, the resumed run begins with this validation.

    With ``fast_dev_run`` Lightning validates as without the callback. With ``limit_val_batches=0`` there are no validations.

    Args:
        n: Distance of the validations, in ``unit``.
        unit: What the clock counts: ``"samples"``, ``"tokens"`` (if the DataModule has ``tokens_per_sample``), ``"step"``
            (optimizer steps), or ``"epoch"``.

    Raises:
        ValueError: ``n`` is not a whole number of 1 or more, or the unit is not known.
        MisconfigurationException: At the start of a fit: there is no ``BatchLRScheduler``, something else sets the interval of
            the validations, or there is nothing to validate with.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsl import BatchLRScheduler
        >>> callbacks = [BatchLRScheduler(batch_size=8), ValidateEvery(10_000)]
        >>> trainer = Trainer(max_epochs=9, callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    def __init__(self, n: int, unit: Unit = "samples") -> None:
        self.marks = Marks(n, unit)
        self._missed = False  # whether the checkpoint of the run was saved before a validation that was due
        self._active = False
        self._undo = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that nothing else decides when to validate, and replace Lightning's decision."""
        self._missed, self._active = False, stage == "fit" and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if not self._active:
            return
        self._refuse(trainer)
        # what others read as "validations come inside epochs, and over several epochs"
        self._undo.callback(setattr, trainer, "check_val_every_n_epoch", trainer.check_val_every_n_epoch)
        trainer.check_val_every_n_epoch = None
        validate_when(trainer, lambda: self._due(trainer), self._undo)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note whether the validation after the step just taken is still to come."""
        if self._active:
            checkpoint["callbacks"][self.state_key] = {"due": self._is_pending(trainer)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read whether a validation is still to come."""
        if self._active:
            self._missed = checkpoint["callbacks"].get(self.state_key, {"due": False})["due"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at the clock of the run."""
        self.marks.begin(trainer, type(self).__name__)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there are validation data; Lightning has loaded them by now."""
        if not self._active or not trainer.limit_val_batches:
            return
        if not sum(trainer.num_val_batches):
            raise MisconfigurationException(
                f"ValidateEvery({self.marks.n}) has nothing to validate with: there is no validation loader, or it is empty. "
                "Give one, or leave ValidateEvery out"
            )
        if self._missed:
            validate_before_training(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation is done; a checkpoint that is saved from here on does not repeat it."""
        if self._active and not trainer.sanity_checking:
            self._missed = False
            self.marks.see()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore Lightning: after an exception it does not call ``teardown``."""
        self._undo.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore Lightning."""
        if stage == "fit":
            self._undo.close()

    def _is_pending(self, trainer: Trainer) -> bool:
        """Whether the validation after the step just taken is still to come."""
        return trainer.enable_validation and (self._missed or self.marks.crossed(trainer))

    def _due(self, trainer: Trainer) -> bool:
        """Whether Lightning has to validate now, after a batch."""
        if self._is_pending(trainer):
            if self._missed:  # its values are logged at the step to which they belong
                set_steps_taken(trainer, self.marks.progress.step - 1)
            return True
        self._missed = False
        self.marks.see()
        return False

    def _refuse(self, trainer: Trainer) -> None:
        """Refuse what would also decide when to validate, as far as ``setup`` can see it."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, ValidateEvery) for callback in callbacks) > 1:
            raise MisconfigurationException("there are two ValidateEvery among the callbacks; keep one")
        interval = getattr(trainer, "val_check_interval", "a time")  # there is none where it is a time
        epochs = trainer.check_val_every_n_epoch
        if isinstance(interval, int) or interval != 1.0 or epochs != 1:
            raise MisconfigurationException(
                f"ValidateEvery({self.marks.n}) and the Trainer (`val_check_interval={interval}`, "
                f"`check_val_every_n_epoch={epochs}`) would both decide when to validate: leave the Trainer's arguments out"
            )
        if not trainer.enable_validation and trainer.limit_val_batches:
            raise MisconfigurationException(
                f"ValidateEvery({self.marks.n}) needs a method `validation_step` of the LightningModule and a validation "
                "loader, and one of them is missing: add it, or leave ValidateEvery out"
            )
        before = callbacks[: callbacks.index(self)]
        if any(isinstance(callback, EarlyStopping) and checks_epoch_ends(callback) for callback in before):
            raise MisconfigurationException(
                "EarlyStopping stands before ValidateEvery among the callbacks, so it has decided already to look at the ends "
                "of epochs instead of each validation: write ValidateEvery first"
            )
