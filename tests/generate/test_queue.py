"""Answers to a file of prompts: complete and once each, after kills and on several ranks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from moma.data.documents import Document
from moma.data.sources.interleaved import InterleavedConfig
from moma.errors import UserError
from moma.generate.mixed import MixedModel
from moma.generate.queue import answer_prompts, read_prompts
from moma.generate.sampling import Sampling
from moma.generate.settings import Settings
from moma.model.transformer import ModelConfig, Transformer
from moma.vocabulary import Vocabulary
from tests.factories import make_tokenizers, solid_image

SETTINGS = {"seed": 3}
SAMPLING = Sampling(temperature=2, top_p=1, seed=3)
COUNT = 7


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = make_tokenizers(tmp_path_factory.mktemp("tokenizers"), block_channels=[8, 16])
    config = ModelConfig(dim=32, layers=2, heads=2, groups="moe_2t2i")
    model = Transformer(config, Vocabulary.load(folder.vocabulary), (0.5, 0.5))
    model.initialize(0)
    with torch.no_grad():
        model.head.weight[model.vocabulary.begin_image] *= 8  # images are likely
    return MixedModel.assemble(model.eval(), folder, 24)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Seven prompts; every second one has an image."""
    folder = tmp_path_factory.mktemp("prompts")
    solid_image("red").read().save(folder / "red.png")
    image = {"type": "image", "image": "red.png"}
    rows = [
        [{"type": "text", "text": f"the red {number}"}, *[image] * (number % 2)]
        for number in range(COUNT)
    ]
    lines = [json.dumps({"segments": row}) + "\n" for row in rows]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return read_prompts(folder / "prompts.jsonl", lambda prompt: None)


@pytest.fixture(scope="module")
def answer(mixed):
    return lambda queue: mixed.answer(queue, 2, Settings("mixed", SAMPLING))


@pytest.fixture(scope="module")
def expected(mixed, prompts):
    """Each prompt's answer alone."""
    contents = [
        [part if isinstance(part, str) else part.read() for part in prompt.segments]
        for prompt in prompts
    ]
    return [
        content
        for number, prompt in enumerate(contents)
        for _, content in mixed.answer([(number, prompt)], 1, Settings("mixed", SAMPLING))
    ]


def answers_in(out):
    """The answers of `results.jsonl`, read as interleaved documents."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(range(1, COUNT + 1))
    answers = []
    for document in InterleavedConfig(path=out / "results.jsonl").documents():
        assert isinstance(document, Document)
        answers.append([*map(comparable, document.segments)])
    return answers


def comparable(part):
    if isinstance(part, str):
        return part
    return np.asarray(part if isinstance(part, Image.Image) else part.read()).tolist()


def assert_complete(out, expected):
    assert answers_in(out) == [[*map(comparable, content)] for content in expected]
    images = sum(not isinstance(part, str) for content in expected for part in content)
    names = {path.name for path in out.iterdir()}
    assert len([name for name in names if name.endswith(".png")]) == images > 0
    kept = {name for name in names if not name.endswith(".png")}
    assert kept == {"results.jsonl", "generate.json", ".moma-output.json"}


def test_every_prompt_gets_the_answer_that_it_gets_alone(prompts, answer, expected, tmp_path):
    assert answer_prompts(prompts, tmp_path / "out", SETTINGS, answer, quiet=True)
    assert_complete(tmp_path / "out", expected)
    assert len({str([*map(comparable, content)]) for content in expected}) > 1


@pytest.mark.parametrize("saved", [0, 1, 4, COUNT])
def test_a_killed_queue_loses_and_doubles_nothing(prompts, answer, expected, tmp_path, saved):
    out, asked = tmp_path / "out", []

    def killed(queue):
        for count, found in enumerate(answer(queue)):
            if count == saved:
                raise KeyboardInterrupt
            yield found
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_prompts(prompts, out, SETTINGS, killed, quiet=True)
    with (out / "part-0.jsonl").open("ab") as part:
        part.write(b'{"prompt": 1, "segm')  # a line that was being written

    def note(queue):
        for number, content in queue:
            asked.append(number)
            yield number, content

    def noted(queue):
        return answer(note(queue))

    assert answer_prompts(prompts, out, SETTINGS, noted, quiet=True)
    assert len(asked) == COUNT - saved
    assert_complete(out, expected)
    assert answer_prompts(prompts, out, SETTINGS, noted, quiet=True)  # nothing is left to do
    assert len(asked) == COUNT - saved
    assert_complete(out, expected)


def test_ranks_share_the_prompts_and_another_number_of_them_goes_on(
    prompts, answer, expected, tmp_path
):
    out = tmp_path / "out"
    assert not answer_prompts(prompts, out, SETTINGS, answer, rank=1, ranks=3, quiet=True)
    assert not (out / "results.jsonl").exists()
    assert not answer_prompts(prompts, out, SETTINGS, answer, rank=0, ranks=2, quiet=True)
    assert answer_prompts(prompts, out, SETTINGS, answer, rank=1, ranks=2, quiet=True)
    assert_complete(out, expected)


def test_other_settings_prompts_and_folders_are_refused(prompts, answer, tmp_path):
    out = tmp_path / "out"
    answer_prompts(prompts, out, SETTINGS, answer, quiet=True)
    with pytest.raises(UserError, match=r"holds answers with other seed; name a new folder"):
        answer_prompts(prompts, out, {"seed": 4}, answer, quiet=True)
    with pytest.raises(UserError, match=r"holds answers with other prompts"):
        answer_prompts(prompts[1:], out, SETTINGS, answer, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1.txt").write_text("mine")
    with pytest.raises(UserError, match="mine: is not empty; name a new folder"):
        answer_prompts(prompts, tmp_path / "mine", SETTINGS, answer, quiet=True)
    (out / "results.jsonl").write_text("no JSON\n")
    with pytest.raises(UserError, match=r"results.jsonl: damaged; begin in a new folder"):
        answer_prompts(prompts, out, SETTINGS, answer, quiet=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "has no prompts"),
        ('{"prompt": "a"}\n', r"p.jsonl, row 1: needs 'segments'"),
        ('\n{"segments": [{"type": "image", "image": "no.png"}]}\n', r"row 2.*no.png"),
    ],
)
def test_malformed_prompts_are_refused_with_their_row(tmp_path, content, message):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "p.jsonl", lambda prompt: None)


@pytest.mark.parametrize("mode", ["text", "image"])
def test_a_prompt_without_space_for_an_answer_is_refused_with_its_row(mixed, tmp_path, mode):
    """As when it is answered; the context has 24 tokens, an image 6."""
    image = solid_image("red").read()
    image.save(tmp_path / "red.png")
    refused = set()
    for size in range(9, 19):
        text = "z" * size
        image_segment = {"type": "image", "image": "red.png"}
        row = {"segments": [image_segment, {"type": "text", "text": text}]}
        (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
        found, expected = "", ""
        try:
            read_prompts(tmp_path / "p.jsonl", lambda prompt: mixed.require_space(prompt, mode))
        except UserError as error:
            found = str(error)
        try:
            mixed.generate([[image, text]], Settings(mode, new_tokens=1))
        except UserError as error:
            expected = f"{tmp_path / 'p.jsonl'}, row 1: {error}"
        assert found == expected
        refused.add(bool(found))
    assert refused == {False, True}
