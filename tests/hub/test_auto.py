"""A run in `transformers`: the same logits, the same greedy decoding, text and images both ways."""

import json
import shutil
import warnings
from copy import deepcopy

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, GenerationConfig
from transformers.generation import utils as generation

import moma
import moma.hub.auto  # registers
from moma.errors import UserError
from moma.generate.decode import decode
from moma.generate.sampling import Sampling
from moma.generate.sequence import Branch, Options, Request
from moma.hub.auto import GrammarProcessor
from moma.hub.moma_format import export_moma, import_moma
from moma.runs import Run
from moma.train.restore import load_run


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("auto") / "model"
    export_moma(tiny_run, out)
    return out


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def inputs(processor):
    """Two documents of unequal length, one with an image."""
    return processor(["red", "a blue <image> and"], [Image.new("RGB", (20, 16), "blue")])


@torch.no_grad()
def causal_logits(run: Run, ids_BS: torch.Tensor) -> torch.Tensor:
    model = load_run(run)[0]
    return model(ids_BS, routing=model.named_routing("causal")).head


def test_logits_are_those_of_the_run(tiny_run, model, inputs):
    with torch.no_grad():
        logits_BSV = model(**inputs).logits
    for ids_S, mask_S, logits_SV in zip(*inputs.values(), logits_BSV, strict=True):
        expected_SV = causal_logits(tiny_run, ids_S[mask_S.bool()][None])[0]
        torch.testing.assert_close(logits_SV[mask_S.bool()], expected_SV, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["text", "image", "mixed"])
def test_greedy_generation_is_our_own(tiny_run, model, inputs, mode):
    ours = moma.load(tiny_run.path)
    options = Options(mode, ours.context, 24, Sampling(temperature=0))
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values(), strict=True)]
    expected: list[list[int]] = [[], []]
    requests = [Request([Branch(each)], options) for each in prompts]
    for new in decode(ours.model, enumerate(requests)):
        expected[new.number] += new.tokens
    answer_BS = model.generate(**inputs, mode=mode, do_sample=False, max_new_tokens=24)
    padding = model.model.vocabulary.padding
    new_BS = answer_BS[:, inputs["input_ids"].shape[1] :]
    assert [[id_ for id_ in row if id_ != padding] for row in new_BS.tolist()] == expected


def test_caches_and_beams_change_nothing_else(model, inputs):
    plain = {"do_sample": False, "max_new_tokens": 6, "mode": "text"}
    cached = model.generate(**inputs, **plain)
    assert torch.equal(cached, model.generate(**inputs, **plain, use_cache=False))
    beams = [model.generate(**inputs, **plain, num_beams=2, use_cache=c) for c in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "mixed", "max_new_tokens": 2},
        {"mode": "image", "generation_config": GenerationConfig(max_new_tokens=2)},
        {"mode": "text", "generation_config": GenerationConfig(temperature=0.5)},
    ],
    ids=["new tokens", "image", "no limit"],
)
def test_arguments_cause_no_warning(model, inputs, monkeypatch, given):
    logged = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(generation.logger, name, lambda *arguments: logged.append(arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**inputs, **given)
    assert not logged


@pytest.mark.parametrize("of_config", [True, False], ids=["configuration", "arguments"])
def test_one_image_is_generated_unless_another_id_ends_it(model, inputs, of_config):
    """Whoever loads the exported configuration has not chosen how an image ends."""
    vocabulary, prompt_BS = model.model.vocabulary, inputs["input_ids"][:1, -2:]
    span, first = vocabulary.image_span, vocabulary.begin_image

    def generated(**given):
        given = {"max_new_tokens": 2 * span} | given
        if of_config:
            given = {"generation_config": GenerationConfig(**given)}
            copy = deepcopy(given)
        answer_BS = model.generate(prompt_BS, mode="image", **given)
        assert not of_config or given["generation_config"] == copy["generation_config"]
        return answer_BS.shape[1] - 2

    assert generated() == generated(eos_token_id=model.generation_config.eos_token_id) == span
    assert generated(eos_token_id=first) == 1


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ({"max_new_tokens": 9}, 2 + 9),
        ({"max_length": 9}, 9),
        ({"generation_config": GenerationConfig(max_new_tokens=9)}, 2 + 9),
        ({}, 64),
    ],
    ids=["new tokens", "length", "configuration", "context"],
)
def test_images_begin_only_if_they_fit(model, inputs, monkeypatch, given, length):
    """Whatever limits the length, the grammar has the same limit."""
    limits = []

    class Watched(GrammarProcessor):
        def __init__(self, vocabulary, mode, limit):
            limits.append(limit)
            super().__init__(vocabulary, mode, limit)

    monkeypatch.setattr("moma.hub.auto.GrammarProcessor", Watched)
    prompt_BS = inputs["input_ids"][:1, -2:]
    answer_BS = model.generate(prompt_BS, **given)
    assert limits == [length] and answer_BS.shape[1] <= length


def test_images_are_read_and_written(tiny_run, processor, inputs):
    ours = moma.load(tiny_run.path)
    image = Image.new("RGB", (20, 16), "blue")
    content: list[str | Image.Image] = ["a blue ", image, " and"]
    assert inputs["input_ids"][1].tolist() == ours.encode(content)
    before, decoded, after = processor.decode(inputs["input_ids"][1])
    assert (before, after) == ("a blue ", " and")
    assert decoded == ours.decode(ours.encode(content))[1]
    assert processor.batch_decode(inputs["input_ids"])[0] == ["red"]
    with pytest.raises(UserError, match="fewer images"):
        processor("<image><image>", [image])
    with pytest.raises(UserError, match="more images"):
        processor("red", [image])


def test_the_loss_is_the_mean_cross_entropy(model, inputs):
    ids_BS = inputs["input_ids"][1:]
    output = model(ids_BS, labels=ids_BS)
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids_BS[0, 1:])
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.model.embedding.weight.grad.abs().sum() > 0


def test_what_transformers_saves_is_imported(tiny_run, model, processor, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    run = Run(tmp_path / "run")
    assert import_moma(tmp_path / "saved", run) == []
    (one, _), (other, _) = load_run(run), load_run(tiny_run)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_routers_stay_in_fp32(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    assert {d for name, d in dtypes.items() if "router" in name} == {torch.float32}
    assert dtypes["model.embedding.weight"] == torch.bfloat16


def test_a_new_model_has_our_initialization(tiny, folder, model):
    new = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    expected = tiny.model_copy(update={"seed": 0}).build_model(model.model.vocabulary)
    for name, value in expected.state_dict().items():
        assert torch.equal(new.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    "missing", ["model.norm.weight", "model.layers.0.experts.groups.0.router.cutoff_means_3E"]
)
def test_missing_weights_are_refused(folder, tmp_path, missing):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "broken")
    file = tmp_path / "broken/model.safetensors"
    weights = {name: value.clone() for name, value in load_file(file).items()}
    del weights[missing]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=missing.removeprefix("model.")):
        AutoModelForCausalLM.from_pretrained(tmp_path / "broken")


def test_tied_embeddings_and_auxiliary_routing(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["recipe"]["model"]["tied_embeddings"] = config["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config | {"causal_routing": "auxiliary"}))
    new = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert new.model.head.weight is new.model.embedding.weight
    assert new.model.named_routing("causal").experts.uses_auxiliary
    new.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.model.head.weight is again.model.embedding.weight
    assert torch.equal(again.model.embedding.weight, new.model.embedding.weight)
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    import_moma(tmp_path / "saved", Run(tmp_path / "run"))
    imported = load_run(Run(tmp_path / "run"))[0]
    assert torch.equal(imported.head.weight, new.model.embedding.weight)
