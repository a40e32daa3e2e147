"""Micro-batches by length: the steps stay the same, and so does what is trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from harness.cases import GROWING, SHRINKING
from harness.data import own
from harness.files import flat
from harness.fits import fit, out_of_memory, trained
from harness.loops import whole_steps
from harness.modules import assert_close, equal
from harness.processes import Pair
from harness.sentences import Predictor, Sentences, pad, train_sentences_by_hand
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler, BatchSizeDataModule
from lightning_bsl.callbacks.micro_batches import MemoryCeiling, Parts
from lightning_bsl.data.sampler import Cut
from lightning_bsl.schedules import Milestones

N, LONGEST, BOUND = 61, 12, 24


SENTENCES = Sentences(LONGEST)


def data(number: int | None = None, **options: Any) -> BatchSizeDataModule:
    options = {"lengths": SENTENCES.sizes, "max_device_tokens": BOUND, "collate_fn": pad} | options
    return own(SENTENCES, samples_per_epoch=number, **options)


class Words(Predictor):
    """The loss is a mean over tokens.

    Args:
        dropout: Probability.
        memory: Padded tokens that fit.
    """

    def __init__(self, dropout: float = 0.0, memory: float = 10**6) -> None:
        super().__init__(dropout)
        self.memory = memory
        self.journal: list[tuple[int, list[int]]] = []  # steps before, and the examples
        self.failures: list[int] = []
        self.announced: list[Any] = []

    def on_train_epoch_start(self) -> None:
        self.announced.append(self.trainer.num_training_batches)

    def losses(self, batch: Any) -> Tensor:
        """Of each token, 0 for padding."""
        tokens = batch["tokens"][:, 1:]
        losses = nn.functional.cross_entropy(self.logits(batch).transpose(1, 2), tokens, reduction="none")
        return losses * (tokens > 0)

    def loss(self, batch: Any) -> Tensor:
        return self.losses(batch).sum() / self.loss_terms(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch["tokens"].numel() > self.memory:
            self.failures.append(len(batch["tokens"]))
            self.journal = [each for each in self.journal if each[0] != self.trainer.global_step]  # the step is undone
            raise out_of_memory()
        self.journal.append((self.trainer.global_step, batch["index"].tolist()))
        return self.loss(batch)

    def loss_terms(self, batch: Any) -> Any:
        return (batch["tokens"][:, 1:] > 0).sum()


class Documents(Words):
    """The loss is a mean over examples: each has the mean over its tokens."""

    loss_terms = None  # type: ignore[assignment]

    def loss(self, batch: Any) -> Tensor:
        return (self.losses(batch).sum(dim=1) / (batch["tokens"][:, 1:] > 0).sum(dim=1)).mean()


def by_hand(model: Words, steps: Any, clip: float | None = None) -> Words:
    return train_sentences_by_hand(model, SENTENCES, steps, clip)


def steps_of(schedule: Any, epochs: int = 2) -> list[list[int]]:
    return flat(whole_steps(schedule, N, epochs))


def cost(indices: list[int]) -> int:
    return int(SENTENCES.sizes[indices].max()) * len(indices)


def check_steps(journal: list[tuple[int, list[int]]], steps: list[list[int]], bound: float = BOUND) -> None:
    """Every step has its examples, each once, in micro-batches within the bound."""
    found: list[list[int]] = [[] for _ in steps]
    for step, indices in journal:
        assert cost(indices) <= bound
        found[step] += indices
    assert list(map(sorted, found)) == list(map(sorted, steps))


@pytest.mark.parametrize("kind", [Words, Documents])
@pytest.mark.parametrize("schedule", [GROWING, SHRINKING])
@pytest.mark.parametrize(("cap", "clip", "options"), [(None, None, {}), (3, 0.05, {}), (4, None, {"max_device_tokens": None})])
def test_equals_a_plain_loop(kind: Any, schedule: Any, cap: Any, clip: Any, options: dict[str, Any]) -> None:
    model, scheduler = kind(), BatchLRScheduler(schedule, None, cap)
    fit(model, data(**options), scheduler, max_epochs=2, gradient_clip_val=clip)
    steps = steps_of(schedule)
    assert_close(model, by_hand(kind(), steps, clip))
    check_steps(model.journal, steps, 10**6 if options else BOUND)
    assert max(len(indices) for _, indices in model.journal) <= (cap or N)
    assert scheduler.plan is not None
    assert (scheduler.plan.steps, scheduler.plan.samples) == (len(steps), 2 * N) == scheduler.progress[1:3]
    assert sum(model.announced) == len(model.journal)


def test_fewer_micro_batches_and_less_padding_than_by_number() -> None:
    by_length, by_number = Words(), Words()
    fit(by_length, data(), BatchLRScheduler(30), max_epochs=2)
    fit(by_number, data(lengths=None, max_device_tokens=None), BatchLRScheduler(30, None, BOUND // LONGEST), max_epochs=2)
    padded = [sum(cost(indices) for _, indices in model.journal) for model in (by_length, by_number)]
    assert len(by_length.journal) < 0.75 * len(by_number.journal)
    assert padded[0] < 0.9 * padded[1]
    assert_close(by_length, by_number)


@pytest.mark.parametrize("options", [{}, {"max_device_tokens": None}])
def test_one_piece_is_left_alone(options: dict[str, Any]) -> None:
    known, unknown = Words(), Words()
    bound = {"max_device_tokens": 10**5} | options
    fit(known, data(**bound), BatchLRScheduler(GROWING), max_epochs=2)
    fit(unknown, data(lengths=None, max_device_tokens=None), BatchLRScheduler(GROWING), max_epochs=2)
    assert equal(known, unknown) and known.journal == unknown.journal


@pytest.mark.parametrize("options", [{"drop_last": True}, {"number": 50}, {"num_workers": 2}])
def test_other_epochs(options: dict[str, Any]) -> None:
    model, plain, scheduler, other = Words(), Words(), BatchLRScheduler(GROWING), BatchLRScheduler(GROWING)
    fit(model, data(**options), scheduler, max_epochs=2)
    fit(plain, data(lengths=None, max_device_tokens=None, **options), other, max_epochs=2)
    assert_close(model, plain)
    assert scheduler.plan == other.plan and scheduler.progress == other.progress
    check_steps(model.journal, [indices for _, indices in plain.journal])


class SaveAll(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{len(module.journal):03}.ckpt")


@pytest.mark.parametrize("memory", [None, 100])
@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
def test_resumes_bit_for_bit(memory: int | None, tmp_path: Path) -> None:
    def go(model: Words, *callbacks: Callback, **options: Any) -> BatchLRScheduler:
        torch.manual_seed(4)
        scheduler = BatchLRScheduler(GROWING, 0.3, None if memory is None else "auto")
        given = data() if memory is None else data(max_device_tokens=None)
        fit(model, given, scheduler, *callbacks, max_epochs=2, **options)
        return scheduler

    whole = Words(0.2, memory or 10**6)
    scheduler = go(whole, SaveAll(tmp_path))
    assert len({step for step, _ in whole.journal}) < len(whole.journal)
    for path in sorted(tmp_path.iterdir())[:: 9 if memory is None else 5]:
        model = Words(0.2, memory or 10**6)
        resumed = go(model, ckpt_path=path)
        assert equal(model, whole), path
        assert model.journal == [each for each in whole.journal if each[0] >= model.journal[0][0]] if model.journal else True
        assert resumed.state_dict()["micro_batch_tokens"] == scheduler.state_dict()["micro_batch_tokens"]


@pytest.mark.parametrize("interval", [3, 0.5])
def test_validations_inside_an_epoch(interval: float) -> None:
    class Validated(Words):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", self.loss(batch), batch_size=len(batch["index"]))

    model = Validated()
    datamodule = data()
    datamodule.val_set = SENTENCES
    fit(model, datamodule, BatchLRScheduler(GROWING), max_epochs=2, val_check_interval=interval)
    assert_close(model, by_hand(Words(), steps_of(GROWING)))


def test_an_adaptive_schedule() -> None:
    def go(**options: Any) -> tuple[Words, AdaptiveBatchLRScheduler]:
        def at_some(trainer: Trainer, scheduler: Any) -> bool:
            return bool(scheduler.progress.step % 4 == 0)

        scheduler = AdaptiveBatchLRScheduler(4, 0.1, at_some, maximum=30, check_every=2)
        return trained(Words(), data(**options), scheduler, max_epochs=3), scheduler

    (model, scheduler), (plain, other) = go(), go(lengths=None, max_device_tokens=None)
    assert scheduler.segments == other.segments and len(scheduler.segments) > 2
    check_steps(model.journal, [indices for _, indices in plain.journal])
    assert_close(model, plain)


def test_without_a_scheduler_a_batch_stays_a_step() -> None:
    with pytest.warns(UserWarning, match=r"`max_device_tokens=24` has no effect.*`BatchLRScheduler\(batch_size=16\)`"):
        model = trained(Words(), data(batch_size=16), max_epochs=1)
    assert [len(indices) for _, indices in model.journal] == [16, 16, 16, 13]


# --- refusals


class Sampled(BatchSizeDataModule):
    def train_dataloader(self) -> Any:
        sampler = RandomSampler(SENTENCES, replacement=True)
        return DataLoader(SENTENCES, batch_size=4, sampler=sampler, collate_fn=pad)


class Plain(BatchSizeDataModule):
    """A loader of its own, over the training set."""

    def train_dataloader(self) -> Any:
        return DataLoader(self.train_set, batch_size=4, shuffle=True, collate_fn=pad)  # type: ignore[arg-type]


class Elsewhere(BatchSizeDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(Sentences(LONGEST, 30), batch_size=4, shuffle=True, collate_fn=pad)


LENGTHS: dict[str, Any] = {"lengths": SENTENCES.sizes, "max_device_tokens": BOUND}


@pytest.mark.parametrize(
    ("datamodule", "cap", "trainer", "message"),
    [
        (lambda: data(), "auto", {}, "`max_device_tokens=24` and `max_device_batch_size='auto'`"),
        (lambda: data(), None, {"accumulate_grad_batches": 2}, "`accumulate_grad_batches=2` with a BatchSizeDataModule"),
        (lambda: data(), None, {"limit_train_batches": 5}, "`max_device_tokens=24` splits the steps"),
        (lambda: data(max_device_tokens=11), None, {}, "has a length of 12, above `max_device_tokens=11`"),
        (lambda: data(lengths=SENTENCES.sizes[:-1]), None, {}, "60 `lengths` for 61"),
        (lambda: data(lengths=None), None, {}, "needs the lengths"),
        (lambda: Sampled(SENTENCES, **LENGTHS), None, {}, "has a sampler of its own"),
        (lambda: Elsewhere(SENTENCES, **LENGTHS), None, {}, "over another data set"),
    ],
)
def test_refusals(datamodule: Any, cap: Any, trainer: dict[str, Any], message: str) -> None:
    model = Words()
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        fit(model, datamodule(), BatchLRScheduler(GROWING, None, cap), **trainer)
    assert not model.journal


def test_an_interval_of_validations_that_a_later_epoch_has_no_room_for() -> None:
    class Validated(Words):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            """Nothing."""

    datamodule = data()
    datamodule.val_set = SENTENCES
    schedule = Milestones([4, 61], at=[1], unit="epoch")
    model = Validated()
    fit(model, datamodule, BatchLRScheduler(schedule), max_epochs=2)
    few = model.announced[1]
    with pytest.raises(MisconfigurationException, match=f"an epoch will have only {few} of them"):
        fit(Validated(), datamodule, BatchLRScheduler(schedule), max_epochs=2, val_check_interval=few + 1)
    fit(Validated(), datamodule, BatchLRScheduler(schedule), max_epochs=2, val_check_interval=few)


@pytest.mark.parametrize("bound", [60, 24])
def test_batch_norm_gets_a_warning_and_never_one_example(bound: int) -> None:
    class Normal(Documents):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1, dtype=torch.float64)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.norm(batch["tokens"].double().mean(1, keepdim=True)).mean()

    model, scheduler = Normal(), BatchLRScheduler(10)
    plain = Words()
    fit(plain, data(max_device_tokens=bound, drop_last=True), BatchLRScheduler(10), max_epochs=2)
    with pytest.warns(UserWarning, match=f"steps of more than {bound} padded tokens a process"):
        if any(len(indices) == 1 for _, indices in plain.journal):
            with pytest.raises(MisconfigurationException, match="BatchNorm needs two"):
                fit(model, data(max_device_tokens=bound, drop_last=True), scheduler, max_epochs=2)
            assert not model.journal or len(model.journal) == 1
        else:
            fit(model, data(max_device_tokens=bound, drop_last=True), scheduler, max_epochs=2)


def test_a_loader_of_ones_own_over_the_training_set() -> None:
    model, plain = Words(), Words()
    fit(model, Plain(SENTENCES, **LENGTHS), scheduler := BatchLRScheduler(GROWING), max_epochs=2)
    loader = DataLoader(SENTENCES, batch_size=4, shuffle=True, collate_fn=pad)
    torch.manual_seed(scheduler._fit.seed)
    fit(plain, loader, BatchLRScheduler(GROWING), max_epochs=2)
    assert_close(model, plain)
    check_steps(model.journal, [indices for _, indices in plain.journal])


# --- processes


def two(kind: str, schedule: Any, cap: Any, options: dict[str, Any], memory: float) -> Any:
    model = {"Words": Words, "Documents": Documents}[kind](memory=memory)
    scheduler = BatchLRScheduler(schedule, None, cap)
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "max_epochs": 2} | options
    given = {"max_device_tokens": options.pop("max_device_tokens", BOUND)}
    fit(model, data(**given), scheduler, **options)
    state = scheduler.state_dict()["micro_batch_tokens"]
    return [each.tolist() for each in model.parameters()], model.journal, scheduler.progress[1:3], state, model.failures


@pytest.mark.parametrize("kind", ["Words", "Documents"])
@pytest.mark.parametrize(("schedule", "tokens", "cap"), [(GROWING, BOUND, None), (SHRINKING, None, None), (GROWING, None, 3)])
def test_two_processes_train_as_one(kind: str, schedule: Any, tokens: Any, cap: Any, pair: Pair) -> None:
    steps = steps_of(schedule)
    reference = by_hand({"Words": Words, "Documents": Documents}[kind](), steps)
    answers = pair(two, kind, schedule, cap, {"max_device_tokens": tokens}, 10**6)
    for weights, _, progress, _, _ in answers:
        assert progress == (len(steps), 2 * N)
        for found, wanted in zip(weights, reference.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted.detach(), rtol=1e-12, atol=1e-13)
    journals = [journal for _, journal, *_ in answers]
    assert [step for step, _ in journals[0]] == [step for step, _ in journals[1]]  # equally many in each step
    for number, step in enumerate(steps):
        parts = [indices for journal in journals for at, indices in journal if at == number]
        assert set(flat(parts)) == set(step)
        assert all(cost(part) <= (tokens or 10**6) and len(part) <= (cap or N) for part in parts)


def other_lengths() -> str:
    lengths = SENTENCES.sizes.clone()
    try:
        lengths[0] += int(os.environ["RANK"])
        options: Any = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        fit(Words(), data(lengths=lengths), BatchLRScheduler(GROWING), **options)
    except MisconfigurationException as error:
        return str(error)
    return ""


def test_lengths_that_differ_between_processes(pair: Pair) -> None:
    for message in pair(other_lengths):
        assert "the lengths of the training examples differ between the processes" in message


# --- the ceiling


@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
@pytest.mark.parametrize("kind", [Words, Documents])
def test_the_ceiling_remembers_tokens(kind: Any) -> None:
    """A step of long examples does not halve the ones after it."""
    memory = 60
    model, scheduler = kind(memory=memory), BatchLRScheduler(GROWING, None, "auto")
    fit(model, data(max_device_tokens=None), scheduler, max_epochs=2)
    steps = steps_of(GROWING)
    assert_close(model, by_hand(kind(), steps))
    bound = scheduler.state_dict()["micro_batch_tokens"]
    assert bound is not None and bound <= memory and scheduler.state_dict()["micro_batch_size"] is None
    # once the bound is known, each step takes as many at once as it allows
    for number, step in list(enumerate(steps))[-4:]:
        longest = int(SENTENCES.sizes[step].max())
        parts = [indices for at, indices in model.journal if at == number]
        assert len(parts) == -(-len(step) // max(1, int(bound // longest)))


@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
def test_one_long_example_does_not_halve_the_rest() -> None:
    class Rare(Sentences):
        """The longest comes in the first step."""

        def __init__(self) -> None:
            super().__init__(LONGEST)
            self.sizes = torch.full((N,), 3)
            self.sizes[0] = 48
            self.tokens = [torch.ones(int(size), dtype=torch.int64) for size in self.sizes]

    rare = Rare()

    def sizes(**options: Any) -> list[int]:
        model = Words(memory=100)
        fit(model, own(rare, collate_fn=pad, shuffle=False, **options), BatchLRScheduler(20, None, "auto"), max_epochs=1)
        return [len(indices) for _, indices in model.journal]

    assert sizes() == [2] * 10 + [2] * 20 + [1]
    assert sizes(lengths=rare.sizes) == [2] * 10 + [20, 20, 1]  # 2 x 48 tokens, or 32 examples of 3


def test_the_bound_of_tokens() -> None:
    ceiling = MemoryCeiling()
    ceiling.begin(8, 8, Parts(longest=(10.0,)))
    assert ceiling._most(8) == 8
    ceiling._bound(4)
    for longest, most in ((10.0, 4), (5.0, 8), (12.0, 3), (41.0, 1)):
        ceiling.begin(8, 8, Parts(longest=(longest, 3.0)))
        assert ceiling._most(8) == most
    other = MemoryCeiling()
    other.load_state_dict(ceiling.state_dict())
    assert (other.size, other.tokens) == (None, 40.0)


def test_each_process_has_to_show_that_it_has_room() -> None:
    ceiling = MemoryCeiling()
    ceiling.begin_fit(Cut(0, 2))

    def tried(examples: int, size: int, *longest: float) -> bool:
        ceiling.begin(examples, examples, Parts(longest=longest))
        return ceiling._was_tried(size)

    assert not tried(8, 4, 12.0, 6.0)
    ceiling._note_tried(4)
    assert tried(8, 4, 12.0, 6.0) and tried(8, 2, 12.0, 6.0)
    assert not tried(8, 4, 6.0, 12.0)  # the other has tried 24 tokens
    assert not tried(8, 2, 6.0, 12.0)  # and no example as long
    assert not tried(10, 5, 12.0, 6.0)
    ceiling.begin(9, 9)
    ceiling._tried.clear()
    ceiling._note_tried(4)  # 4 examples in 2 and 2, and 5 in 2 and 3
    assert tried(5, 3) and not tried(6, 3)


@pytest.mark.parametrize("kind", ["Words", "Documents"])
def test_two_processes_find_one_ceiling(kind: str, pair: Pair) -> None:
    steps = steps_of(GROWING)
    reference = by_hand({"Words": Words, "Documents": Documents}[kind](), steps)
    answers = pair(two, kind, GROWING, "auto", {"max_device_tokens": None}, 40)
    assert answers[0][3] == answers[1][3] is not None
    assert answers[0][4] + answers[1][4]
    for weights, *_ in answers:
        for found, wanted in zip(weights, reference.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted.detach(), rtol=1e-12, atol=1e-13)


def test_nothing_changes_where_lengths_are_unknown() -> None:
    assert trained(Words(), data(lengths=None, max_device_tokens=None), BatchLRScheduler(4, None, "auto"), max_steps=2).journal
