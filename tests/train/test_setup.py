"""The policy as a training begins with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import tiny_models
from srlm_cli.models.load import load_model
from srlm_cli.train.setup import own_weights


def pages_of_files(net: torch.nn.Module) -> set[str]:
    """Return the names of the weights that are pages of a file of weights."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    ranges = [tuple(int(edge, 16) for edge in line[0].split("-")) for line in lines]
    return {
        name for name, weight in net.named_parameters() if any(low <= weight.data_ptr() < high for low, high in ranges)
    }


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells where weights are")
def test_weights_that_are_trained_are_not_pages_of_a_file(tmp_path: Path) -> None:
    net = load_model(str(tiny_models.save(tmp_path)), "float32")
    before = {name: weight.clone() for name, weight in net.named_parameters()}
    assert pages_of_files(net) == before.keys()
    for name, weight in net.named_parameters():
        weight.requires_grad_("layers.0." in name)
    own_weights(net)
    assert pages_of_files(net) == {name for name in before if "layers.0." not in name}
    assert all(torch.equal(weight, before[name]) for name, weight in net.named_parameters())
    assert net.get_output_embeddings().weight.data_ptr() in {weight.data_ptr() for weight in net.parameters()}
