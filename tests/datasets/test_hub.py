"""The libraries of the text extra, and a hub that does not answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from harness.commands import run_python
from lightning_bsl.datasets import ELI5Category, PydocTopics
from lightning_bsl.datasets.hub import check_reachable
from lightning_bsl.models import distilgpt2


def test_what_needs_the_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "datasets", "tokenizers", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    uses = (distilgpt2, PydocTopics(cache_dir=str(tmp_path)).prepare_data, ELI5Category().fetch)
    for use, name in zip(uses, ("transformers", "tokenizers", "huggingface_hub")):
        with pytest.raises(ModuleNotFoundError, match=rf"{name}, which.*pip install 'lightning_bsl\[text\]'"):
            use()


@pytest.mark.slow
def test_without_the_extra(tmp_path: Path) -> None:
    """Everything else imports and runs; what needs the extra names it."""
    code = """if True:
        import sys
        import lightning  # torchmetrics looks for what is installed, and imports it
        sys.modules |= dict.fromkeys(("transformers", "datasets", "tokenizers", "huggingface_hub"))
        import lightning_bsl.callbacks, lightning_bsl.app.compose
        from lightning_bsl.datasets import Digits, ELI5Category, PydocTopics
        from lightning_bsl.models import Classifier, cnn5, distilgpt2
        Digits().setup("fit"), Classifier(cnn5(), 10)
        for use in (distilgpt2, PydocTopics(cache_dir=sys.argv[1]).prepare_data, ELI5Category().fetch):
            try:
                use()
            except ModuleNotFoundError as error:
                print(error)
    """
    printed = run_python("-c", code, tmp_path, folder=tmp_path)
    assert [line.split()[3] for line in printed.splitlines()] == ["transformers,", "tokenizers,", "huggingface_hub,"]
    assert printed.count("pip install 'lightning_bsl[text]'") == 3


def test_asks_once_for_the_repository_and_its_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answer(_: Any, name: str, repo_type: str, revision: str | None, timeout: float) -> None:
        asked.append((name, repo_type, revision))
        if name == "a/model":
            raise huggingface_hub.utils.OfflineModeIsEnabled("offline mode")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", answer)
    check_reachable("a/dataset", "dataset", "Do this.", "refs/convert/parquet")
    with pytest.raises(ConnectionError, match=r"a/model cannot be reached on huggingface.co \(offline mode\)\. Do that\."):
        check_reachable("a/model", "model", "Do that.")
    assert asked == [("a/dataset", "dataset", "refs/convert/parquet"), ("a/model", "model", None)]
