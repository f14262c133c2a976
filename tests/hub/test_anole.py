"""Anole: Chameleon with a trained image head, and in its converted copies with the decoder."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import moma
from moma.errors import UserError
from moma.generate.sampling import Sampling
from moma.generate.settings import Settings
from moma.hub.chameleon import import_chameleon
from moma.hub.chameleon_codec import load_chameleon_codec, original_layout
from moma.hub.folder import read_config
from moma.runs import Run
from moma.tokenizers.image.codec import to_pil
from moma.train.restore import load_run
from tests.factories import make_codec
from tests.hub.chameleon_port import CODES_PER_IMAGE, port_logits, random_port, save

pytest.importorskip("transformers")


def save_anole(port, folder):
    """Save the port with a decoder among its image weights, as `leloy/Anole-7b-v0.1-hf` has it."""
    file = save(port, folder) / "model.safetensors"
    weights = load_file(file)
    shape = load_chameleon_codec(folder).config.model_dump() | {"decoder": True}
    decoder = {
        f"model.vqmodel.{name}": value.contiguous()
        for name, value in original_layout(make_codec(seed=3, **shape)).items()
        if name.startswith(("decoder.", "post_quant_conv."))
    }
    assert len(decoder) > 20 and not decoder.keys() & weights.keys() - {
        "model.vqmodel.post_quant_conv.weight",
        "model.vqmodel.post_quant_conv.bias",
    }
    save_file(weights | decoder, file, metadata={"format": "pt"})


@torch.no_grad()
def test_the_image_head_is_kept_and_draws_as_in_transformers(tmp_path):
    port, run = random_port(), Run(tmp_path / "run")
    save_anole(port, tmp_path / "anole")
    notes = import_chameleon(tmp_path / "anole", run)
    assert not any("decoder" in note for note in notes)
    model, mixed = load_run(run)[0], moma.load(run.path)
    codes = torch.tensor(model.vocabulary.image_codes)
    assert torch.equal(model.head.weight[codes], port.lm_head.weight[codes])
    (content,) = mixed.generate([["a red"]], Settings("image", Sampling(temperature=0)))
    ids = [*mixed.encode(["a red"]), model.vocabulary.begin_image]
    for _ in range(CODES_PER_IMAGE):
        logits_V = port_logits(port, torch.tensor([ids]))[0, -1]
        ids.append(int(codes[logits_V[codes].argmax()]))
    drawn_L = torch.from_numpy(model.vocabulary.code_of_id[ids[-CODES_PER_IMAGE:]])
    assert len(drawn_L.unique()) > 2
    expected = to_pil(load_chameleon_codec(tmp_path / "anole").decode(drawn_L[None])[0])
    assert content[-1] == expected


@pytest.mark.parametrize("name", ["consolidated.pth", "models/7b/consolidated.00.pth"])
def test_the_release_in_pickles_is_refused_unopened(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"not opened")
    with pytest.raises(UserError, match=r"consolidated\..*pth is a pickle.* safetensors"):
        read_config(tmp_path)
