"""`moma bench layer`: the variants are comparable, and its JSON has the documented keys."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from moma.bench.layer import (
    ContiguousExperts,
    FirstTokens,
    Sizes,
    bench_layer,
    implementations,
    training_job,
    variants,
)
from moma.cli import app
from moma.errors import UserError
from moma.model.routing import Routing

CPU = torch.device("cpu")
IMPLEMENTATIONS = implementations(CPU)
DIM, TOKENS = 64, 128
WITH_DEPTH = ("mod", "mod_moe_1t1i", "mod_moe_4t4i")
KEYS = {
    "dim", "ffn", "variant", "milliseconds", "ratio_to_floor", "ratio_to_dense", "peak_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def modules():
    return variants(DIM, TOKENS, CPU)


def half_image_tokens() -> tuple[torch.Tensor, torch.Tensor, Routing]:
    modality_1N = (torch.arange(TOKENS) // (TOKENS // 2))[None]
    return torch.randn(1, TOKENS, DIM), modality_1N, Routing()


def operations(module) -> int:
    job = training_job(module, DIM, Sizes(tokens=TOKENS), CPU)
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def test_every_variant_has_the_operations_of_its_baseline(modules):
    """Routers add less than 5%, at this small width."""
    count = {name: operations(module) for name, module in modules.items()}
    assert count["floor"] == count["dense"]
    assert count["mod_floor"] * 4 == count["dense"]
    for name in IMPLEMENTATIONS:
        assert 1 <= count[name] / count["floor"] < 1.05
    for architecture in WITH_DEPTH:
        assert 1 <= count[architecture] / count[f"{architecture}_floor"] < 1.05


def test_triton_is_measured_where_its_kernels_run():
    assert IMPLEMENTATIONS == ["sequential", "batched", "grouped"]
    with torch.device("meta"):
        on_gpu = variants(32, 32, torch.device("cuda"))
    assert set(on_gpu) - set(variants(32, 32, CPU)) == {"triton"}


def test_the_floor_applies_each_expert_to_a_contiguous_part():
    experts = ContiguousExperts(4, DIM, 24)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x_1ND, modality_1N = torch.randn(1, 32, DIM), torch.zeros(1, 32)
    gate, up, down = experts.parameters()

    def expected(x_1ND: torch.Tensor) -> torch.Tensor:
        parts = [
            (torch.nn.functional.silu(x @ gate[e]) * (x @ up[e])) @ down[e]
            for e, x in enumerate(x_1ND.chunk(4, dim=1))
        ]
        return torch.cat(parts, dim=1)

    torch.testing.assert_close(experts(x_1ND, modality_1N, Routing())[0], expected(x_1ND))
    first, _ = FirstTokens(experts, 16)(x_1ND, modality_1N, Routing())
    assert torch.equal(first[:, 16:], x_1ND[:, 16:])
    torch.testing.assert_close(first[:, :16], x_1ND[:, :16] + expected(x_1ND[:, :16]))


def test_implementations_have_equal_results(modules):
    inputs, results = half_image_tokens(), []
    for name in IMPLEMENTATIONS:
        modules[name].load_state_dict(modules["sequential"].state_dict())
        results.append(modules[name](*inputs)[0])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", WITH_DEPTH)
def test_mixture_of_depths_changes_at_most_a_quarter_of_the_tokens(modules, name):
    inputs = half_image_tokens()
    unchanged = (modules[name](*inputs)[0] == inputs[0]).all(2).sum()
    assert TOKENS * 3 // 4 <= unchanged < TOKENS


def test_json_has_a_record_per_width_and_variant():
    sizes = ["--dim", "32", "--dim", "64", "--tokens", "64", "--repeats", "2", "--eager"]
    result = CliRunner().invoke(app, ["bench", "layer", *sizes, "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert {row["dim"]: row["ffn"] for row in rows} == {32: 128, 64: 256}
    assert all(row.keys() == KEYS and row["peak_bytes"] > 0 for row in rows)
    for dim in (32, 64):
        of = {row["variant"]: row for row in rows if row["dim"] == dim}
        assert of.keys() == {
            *("dense", "floor", *IMPLEMENTATIONS, *WITH_DEPTH),
            *(f"{name}_floor" for name in WITH_DEPTH),
        }
        for name, against in (("grouped", "floor"), ("mod_moe_1t1i", "mod_moe_1t1i_floor")):
            ratio = of[against]["milliseconds"] / of[name]["milliseconds"]
            assert of[name]["ratio_to_floor"] == pytest.approx(ratio)
        ratio = of["dense"]["milliseconds"] / of["batched"]["milliseconds"]
        assert of["batched"]["ratio_to_dense"] == pytest.approx(ratio)
        assert of["dense"]["ratio_to_dense"] == of["floor"]["ratio_to_floor"] == 1


def test_compilation_is_announced(monkeypatch, capsys):
    monkeypatch.setattr("moma.progress.SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr("moma.bench.layer.can_compile", lambda device: True)
    for compiled in (True, False):
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled
            bench_layer(Sizes((32,), tokens=32, repeats=1, device="cpu", compiled=compiled))
        assert ("compiling mod_moe_4t4i, width 32" in capsys.readouterr().err) == compiled


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--dtype", "fp8", "'fp32', 'bf16'"),
        ("--device", "tpu", "'cpu', 'cuda'"),
        ("--tokens", "100", "multiple of 32"),
    ],
)
def test_invalid_options_are_refused(option, value, message):
    result = CliRunner().invoke(app, ["bench", "layer", option, value])
    assert result.exit_code != 0 and message in f"{result.output} {result.exception}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported():
    result = CliRunner().invoke(app, ["bench", "layer", "--device", "cuda"])
    assert isinstance(result.exception, UserError) and "no GPU" in str(result.exception)
