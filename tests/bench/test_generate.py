"""`moma bench generate`: equal shapes, usual routing, the bytes of a pass, its JSON."""

import json

import pytest
import torch
from typer.testing import CliRunner

from moma.bench.generate import (
    GenerationMode,
    bytes_per_pass,
    moma_variant,
    random_model,
    transformers_variant,
)
from moma.cli import app
from moma.errors import UserError
from moma.model.architecture import ModelConfig
from moma.model.transformer import no_head
from tests.factories import make_vocabulary

CPU, FP32 = torch.device("cpu"), torch.float32
VOCABULARY = make_vocabulary(size=300, codes=range(5, 69), codes_per_image=4)
SMALL = [
    "model.dim=16", "model.layers=2", "model.heads=2", "codec.image_size=64",
    "text_tokenizer.vocabulary_size=320", "codec.codebook_size=32",
]  # fmt: skip
KEYS = {
    "variant", "batch", "mode", "tokens_per_second", "ratio_to_transformers", "ratio_to_limit",
    "passes_per_image",
}  # fmt: skip


def build(groups, **changes):
    values = {"groups": groups, "dim": 64, "layers": 3, "heads": 4, "hidden": 48} | changes
    return random_model(ModelConfig(**values), VOCABULARY, CPU, FP32)


def numbers_in(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_transformers_gets_the_shape_of_dense_and_generates_as_many_tokens():
    dense = build("dense", norm="pre", kv_heads=2)
    port = transformers_variant(dense.config, VOCABULARY, CPU, FP32)
    codec = numbers_in(port.model.get_submodule("model.vqmodel"))
    assert numbers_in(port.model) - codec == numbers_in(dense)
    assert port.run(torch.tensor([[0, 90], [0, 91]]), "text", 5) == 10


@pytest.mark.parametrize("groups", ["moe_4t2i", "mod_moe_4t4i"])
@torch.no_grad()
def test_random_models_select_the_usual_shares(groups):
    torch.manual_seed(0)  # as `bench_generate`
    model = build(groups)
    random = torch.Generator().manual_seed(1)
    tokens_BS = torch.cat(
        (
            torch.randint(69, 300, (4, 200), generator=random),
            torch.randint(5, 69, (4, 200), generator=random),
        )
    )
    routing = model.named_routing("choice", record_selection=True)
    records = model(tokens_BS, routing=routing, head=no_head).routers
    shares: list[float] = []
    for record, router in zip(records, model.routers(), strict=True):
        selected_NE = record.logits_NE[record.eligible_N] > router.threshold_E
        selected_E = selected_NE.float().mean(0)
        expected = 0.25 if record.kind == "depth" else 1 / len(selected_E)
        shares += (selected_E / expected).tolist()
    # Few of these tokens reach the experts of layers with mixture-of-depths.
    assert shares == pytest.approx([1] * len(shares), abs=0.6)
    assert sum(shares) / len(shares) == pytest.approx(1, abs=0.1)


def test_a_token_reads_its_expert_the_layers_it_passes_and_the_rows_of_its_modality():
    """Batch 1; a token of layers 0 and 2 passes with probability 1/4."""
    model, dense = build("mod_moe_1t4i", kv_heads=2), build("dense", kv_heads=2)
    layer, router = dense.layers[0], 4 * 64
    layers = numbers_in(layer) * (1 + 2 / 4) + router * (1 + 2 / 4) + 2 * 64
    cached = 10 * (1 + 2 / 4) * (2 * 2 * 16)
    cases: list[tuple[GenerationMode, int, float]] = [
        ("image", 64, 0),
        ("text", 236, router * (1 + 2 / 4)),
    ]
    for mode, rows, without in cases:
        expected = layers - without + cached + 64 + rows * 64
        assert bytes_per_pass(moma_variant("m", model), mode, 1, 10, "fp32") == 4 * expected
        assert bytes_per_pass(moma_variant("m", model), mode, 1, 10, "bf16") == 2 * expected


def test_sequences_share_weights_but_not_caches():
    variant = moma_variant("dense", build("dense"))
    one, five = (bytes_per_pass(variant, "text", batch, 10, "fp32") for batch in (1, 5))
    assert five - one == 4 * 4 * (10 * 3 * 2 * 64)


def test_json_has_a_record_per_variant_batch_and_mode(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    options = ["--row", "256", "--batch", "1", "--batch", "3", "--tokens", "3", "--repeats", "2"]
    options += ["--drafts", "2"]
    arguments = ["bench", "generate", *options, "--only", "moe_2t2i", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, [*arguments, *SMALL])
    assert result.exit_code != 0 and "--only moe_2t2i" in str(result.exception)
    arguments[arguments.index("moe_2t2i")] = "mod_moe_4t4i"
    result = CliRunner().invoke(app, [*arguments, *SMALL])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    with_drafts = {
        "text": ("dense", "mod_moe_4t4i"),
        "image": ("dense", "dense+drafts", "mod_moe_4t4i", "mod_moe_4t4i+drafts"),
    }
    assert [(row["batch"], row["mode"], row["variant"]) for row in rows] == [
        (batch, mode, variant)
        for batch in (1, 3)
        for mode in ("text", "image")
        for variant in ("transformers", *with_drafts[mode])
    ]
    for row in rows:
        assert row.keys() == KEYS
        assert row["tokens_per_second"] > 0 and row["ratio_to_limit"] > 0
        assert row["variant"] != "transformers" or row["ratio_to_transformers"] == 1
        passes = row["passes_per_image"]
        fewest = 16 // 3 if row["variant"].endswith("drafts") else 16
        assert passes is None if row["mode"] == "text" else fewest <= passes <= 18
    table = CliRunner().invoke(app, [*arguments[:-1], "--mode", "text", "--dtype", "bf16", *SMALL])
    assert table.exit_code == 0 and "mod_moe_4t4i" in table.stdout
    assert "text" in table.stdout and " image " not in table.stdout


def test_no_graphs_reaches_the_preparation(monkeypatch):
    found = []
    monkeypatch.setattr(
        "moma.bench.generate.prepare_decoding", lambda model, graphs: found.append(graphs)
    )
    arguments = ["--row", "256", "--batch", "1", "--mode", "text", "--tokens", "1"]
    arguments += ["--repeats", "1", "--device", "cpu", "--only", "moe_1t1i", "--json"]
    for options in ([], ["--no-graphs"]):
        result = CliRunner().invoke(app, ["bench", "generate", *arguments, *options, *SMALL])
        assert result.exit_code == 0, result.output
    assert found == [True, True, False, False]


def test_what_transformers_lacks_is_refused():
    arguments = ["bench", "generate", "--row", "256", *SMALL, "model.tied_embeddings=true"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert "transformers: Chameleon has no tied_embeddings" in str(result.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported():
    result = CliRunner().invoke(app, ["bench", "generate", "--device", "cuda"])
    assert isinstance(result.exception, UserError) and "no GPU" in str(result.exception)
