"""`moma bench layer`: variants are comparable, and counts are right."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from moma.bench.layer import STRATEGIES, FirstSlices, Sizes, Stack, _job, variants
from moma.cli import app
from moma.errors import UserError

CPU = torch.device("cpu")
DIM, TOKENS = 64, 128
KEYS = {
    "dim", "ffn", "variant", "milliseconds", "ratio_to_floor", "ratio_to_dense", "peak_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def modules():
    return variants(DIM, TOKENS)


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, TOKENS, DIM), (torch.arange(TOKENS) // (TOKENS // 2))[None]


def operations(module) -> int:
    job = _job(module, DIM, Sizes(tokens=TOKENS), CPU)
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def test_every_variant_has_the_operations_of_its_baseline(modules):
    """Routers and gates add at most a few hundredths, at this small width."""
    count = {name: operations(module) for name, module in modules.items()}
    assert count["floor"] == count["dense"]
    assert count["mod_floor"] * 4 == count["dense"]
    for name in STRATEGIES:
        assert 1 <= count[name] / count["floor"] < 1.05
    for gated in ("mod", "mod_moe_1t1i", "mod_moe_4t4i"):
        assert 1 <= count[gated] / count[f"{gated}_floor"] < 1.05


def test_the_floor_is_one_feed_forward_for_each_slice():
    stack = Stack(4, DIM, 24)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x_ND = torch.randn(32, DIM)
    gate, up, down = stack.parameters()
    parts = [
        (torch.nn.functional.silu(x @ gate[e]) * (x @ up[e])) @ down[e]
        for e, x in enumerate(x_ND.chunk(4))
    ]
    torch.testing.assert_close(stack(x_ND), torch.cat(parts))
    first = FirstSlices(stack, 16)(x_ND[None], torch.zeros(1, 32))[0]
    assert torch.equal(first[16:], x_ND[16:])
    torch.testing.assert_close(first[:16], x_ND[:16] + stack(x_ND[:16]))


def test_strategies_do_the_same_work(modules):
    x, modality = halves()
    results = []
    for name in STRATEGIES:
        modules[name].load_state_dict(modules["sequential"].state_dict())
        results.append(modules[name](x, modality))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mod", "mod_moe_1t1i", "mod_moe_4t4i"])
def test_a_gate_takes_a_quarter_and_leaves_the_rest(modules, name):
    x, modality = halves()
    untouched = (modules[name](x, modality) == x).all(2).sum()
    assert TOKENS * 3 // 4 <= untouched < TOKENS


def test_the_verb_prints_one_json_list():
    sizes = ["--dim", "32", "--dim", "64", "--tokens", "64", "--repeats", "2", "--eager"]
    result = CliRunner().invoke(app, ["bench", "layer", *sizes, "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert {row["dim"]: row["ffn"] for row in rows} == {32: 128, 64: 256}
    assert all(row.keys() == KEYS and row["peak_bytes"] > 0 for row in rows)
    for dim in (32, 64):
        of = {row["variant"]: row for row in rows if row["dim"] == dim}
        assert of.keys() == modules_named()
        for name, against in (("grouped", "floor"), ("mod_moe_1t1i", "mod_moe_1t1i_floor")):
            ratio = of[against]["milliseconds"] / of[name]["milliseconds"]
            assert of[name]["ratio_to_floor"] == pytest.approx(ratio)
        ratio = of["dense"]["milliseconds"] / of["batched"]["milliseconds"]
        assert of["batched"]["ratio_to_dense"] == pytest.approx(ratio)
        assert of["dense"]["ratio_to_dense"] == of["floor"]["ratio_to_floor"] == 1


def modules_named() -> set[str]:
    gated = ("mod", "mod_moe_1t1i", "mod_moe_4t4i")
    return {"dense", "floor", *STRATEGIES, *gated, *(f"{name}_floor" for name in gated)}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--dtype", "fp8", "'fp32', 'bf16'"),
        ("--device", "tpu", "'cpu', 'cuda'"),
        ("--tokens", "100", "multiple of 32"),
    ],
)
def test_values_that_cannot_be_measured_are_refused(option, value, message):
    result = CliRunner().invoke(app, ["bench", "layer", option, value])
    assert result.exit_code != 0 and message in f"{result.output} {result.exception}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported():
    result = CliRunner().invoke(app, ["bench", "layer", "--device", "cuda"])
    assert isinstance(result.exception, UserError) and "no GPU" in str(result.exception)
