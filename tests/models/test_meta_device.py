"""Models made without computing on the meta device are those that transformers makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_models
from srlm_cli.models.load import load_model
from srlm_cli.models.meta_device import load_lightly


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_weights_and_buffers_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    tiny_models.save(tmp_path, kind)
    ours = load_model(str(tmp_path), "float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for one, other in (
        (ours.named_parameters(), theirs.named_parameters()),
        (ours.named_buffers(), theirs.named_buffers()),
    ):
        one, other = dict(one), dict(other)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def test_a_model_that_computes_as_it_is_made_is_made_as_ever() -> None:
    tries = []

    def load() -> torch.Tensor:
        tries.append(1)
        with torch.device("meta"):
            return torch.arange(3) * torch.empty(3)

    assert load_lightly(load).is_meta
    assert len(tries) == 2


def test_any_other_error_is_raised_at_once() -> None:
    tries = []

    def load() -> None:
        tries.append(1)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        load_lightly(load)
    assert tries == [1]
