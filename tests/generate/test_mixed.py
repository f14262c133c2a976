"""A model with its tokenizers: text and images as input and output."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moma.errors import UserError
from moma.generate.guidance import Guidance
from moma.generate.mixed import MixedModel
from moma.generate.sampling import Sampling
from moma.generate.settings import Settings
from moma.generate.stream import ContentStream, ImagePart, StopStrings, TextPiece, collect
from moma.model.routing import ROUTINGS
from moma.model.transformer import ModelConfig, Transformer
from moma.runs import Tokenizers
from moma.tokenizers.image.codec import ImageCodec, preprocess
from moma.vocabulary import Vocabulary
from tests.factories import make_tokenizers

CONTEXT = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text tokenizer and a random codec of 4 codes per image."""
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"), block_channels=[8, 16])


@pytest.fixture(scope="module")
def mixed(folder):
    vocabulary = Vocabulary.load(folder.vocabulary)
    config = ModelConfig(dim=32, layers=2, heads=2, groups="moe_2t2i")
    model = Transformer(config, vocabulary, (0.5, 0.5))
    model.initialize(0)
    model.causal_routing = ROUTINGS["auxiliary"]
    return MixedModel.assemble(model.eval(), folder, CONTEXT)


def noise(seed, size=(16, 16)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def comparable(content):
    """Return content as text and pixel values."""
    return [part if isinstance(part, str) else np.asarray(part).tolist() for part in content]


def test_the_codec_is_the_saved_one(mixed, folder):
    codec = ImageCodec.load(folder.codec)
    image = noise(1, (20, 31))
    expected = codec.encode(preprocess(image, 16)[None])[0].numpy()
    assert (mixed.codes(image) == expected).all()
    assert mixed.codes(image).shape == (4,)


def test_a_sequence_begins_like_a_document_and_wraps_its_images(mixed):
    vocabulary = mixed.model.vocabulary
    image = noise(2)
    ids = mixed.encode(["the", image])
    text = mixed.tokenizer.encode("the").ids
    assert ids == [vocabulary.beginning, *text, *vocabulary.wrap_image(mixed.codes(image))]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.one_of(st.text(st.characters(codec="utf-8"), min_size=1), st.integers(0, 99)),
        max_size=5,
    )
)
def test_content_is_encoded_and_decoded(mixed, content):
    """Images are returned as the codec decodes them; adjacent texts are joined."""
    parts: list = [noise(part) if isinstance(part, int) else part for part in content]
    expected: list = []
    for part in parts:
        if isinstance(part, str) and expected and isinstance(expected[-1], str):
            expected[-1] += part
        else:
            expected.append(part if isinstance(part, str) else mixed.image(mixed.codes(part)))
    assert comparable(mixed.decode(mixed.encode(parts))) == comparable(expected)


def test_an_image_is_decoded_from_its_codes(mixed):
    decoded = mixed.image(np.array([0, 5, 15, 3]))
    assert (decoded.size, decoded.mode) == ((16, 16), "RGB")
    other = mixed.image(np.array([1, 5, 15, 3]))
    assert comparable([decoded]) != comparable([other])


def test_an_incomplete_image_is_left_out(mixed):
    vocabulary = mixed.model.vocabulary
    ids = mixed.encode(["the", noise(1)])
    assert mixed.decode(ids[:-1]) == ["the"]
    assert mixed.decode(ids[:-3]) == ["the"]
    # An incomplete image does not affect the next one.
    complete = vocabulary.wrap_image(np.array([1, 2, 3, 4]))
    (image,) = mixed.decode([*complete[:3], *complete])
    assert comparable([image]) == comparable([mixed.image(np.array([1, 2, 3, 4]))])


def test_texts_before_and_after_an_image_are_separate(mixed):
    before, image, after = mixed.decode(mixed.encode(["red ", noise(3), " apple"]))
    assert (before, after) == ("red ", " apple")
    assert isinstance(image, Image.Image)


@pytest.mark.parametrize("seed", range(3))
def test_every_mode_generates_its_kind_of_content(mixed, seed):
    prompts = [["the"], [noise(1), "red"], [noise(2)]]
    sampling = Sampling(temperature=1.5, top_p=1, seed=seed)
    for answer in mixed.generate(prompts, Settings("image", sampling)):
        (image,) = answer
        assert isinstance(image, Image.Image) and image.size == (16, 16)
    for answer in mixed.generate(prompts, Settings("text", sampling)):
        assert all(isinstance(part, str) for part in answer)
    for answer in mixed.generate(prompts, Settings("mixed", sampling)):
        assert answer
        assert all(isinstance(part, str) or part.size == (16, 16) for part in answer)


def test_mixed_mode_generates_both_text_and_images(mixed):
    sampling = Sampling(temperature=50, top_p=1)
    answers = mixed.generate([["the"]] * 40, Settings("mixed", sampling))
    kinds = {type(part) is str for answer in answers for part in answer}
    assert kinds == {True, False}


def test_the_seed_determines_the_content(mixed):
    def content(seed):
        answers = mixed.generate([["the"], [noise(4)]], Settings("mixed", Sampling(seed=seed)))
        return [comparable(answer) for answer in answers]

    assert content(1) == content(1)
    assert content(1) != content(2)


def test_new_tokens_limits_a_continuation(mixed):
    tokenizer = mixed.tokenizer
    longest = max(len(tokenizer.decode([id_])) for id_ in range(tokenizer.get_vocab_size()))
    (short,) = mixed.generate([["the"]], Settings("text", Sampling(seed=3), new_tokens=2))
    (full,) = mixed.generate([["the"]], Settings("text", Sampling(seed=3)))
    assert len("".join(short)) <= 2 * longest < len("".join(full))


def test_missing_and_too_long_prompts_are_refused(mixed):
    with pytest.raises(UserError, match="no prompt"):
        mixed.generate([])
    with pytest.raises(UserError, match=f"context of {CONTEXT} tokens leaves only .*; shorten"):
        mixed.generate([["the"], ["zzz " * CONTEXT]])
    with pytest.raises(UserError, match="context"):
        mixed.generate([[noise(index) for index in range(8)]], Settings("image"))


@pytest.mark.parametrize("missing", ["tokenizer.json", "codec/config.json"])
def test_a_missing_tokenizer_is_named(mixed, folder, tmp_path, missing):
    broken = Tokenizers(tmp_path / "broken")
    folder.copy_to(broken)
    (broken.path / missing).rename(tmp_path / "away")
    with pytest.raises(UserError, match=missing.split("/")[0]):
        MixedModel.assemble(mixed.model, broken, CONTEXT)


def test_a_model_without_a_codec_generates_only_text(mixed, folder, tmp_path):
    tokenizers = Tokenizers(tmp_path / "text")
    folder.copy_to(tokenizers)
    tokenizers.codec.rename(tmp_path / "away")
    text_only = MixedModel.assemble(mixed.model, tokenizers, CONTEXT)
    sampling = Sampling(temperature=0)
    assert text_only.generate([["the"]], Settings("mixed", sampling)) == mixed.generate(
        [["the"]], Settings("text", sampling)
    )
    for call in (
        lambda: text_only.generate([["the"]], Settings("image")),
        lambda: text_only.generate([[noise(0)]], Settings("text")),
    ):
        with pytest.raises(UserError, match="no folder 'codec'"):
            call()


def test_several_images_in_a_prompt_are_used_in_order(mixed):
    one, two = noise(1), noise(2)
    vocabulary = mixed.model.vocabulary
    wrapped = [vocabulary.wrap_image(mixed.codes(image)) for image in (one, two)]
    ids = mixed.encode([one, "red", two])
    assert ids[1:7] == wrapped[0] and ids[-6:] == wrapped[1]
    sampling = Sampling(temperature=0)
    together = mixed.generate(
        [[one, two, "red"], [two, one, "red"], [two, "red"]], Settings("text", sampling)
    )
    assert len({str(each) for each in together}) > 1


def test_a_limit_of_zero_new_tokens_is_refused(mixed):
    with pytest.raises(UserError, match="new_tokens 0"):
        mixed.generate([["the"]], Settings("text", new_tokens=0))


def test_stop_strings_end_a_text_and_are_left_out(mixed):
    (whole,) = mixed.generate([["the"]], Settings("text", Sampling(seed=3)))
    stop = whole[0][len(whole[0]) // 2 :][:3]
    (answer,) = mixed.generate([["the"]], Settings("text", Sampling(seed=3), stop=["never", stop]))
    assert answer == [whole[0][: whole[0].index(stop)]]
    with pytest.raises(UserError, match="an empty string would end every answer"):
        mixed.generate([["the"]], Settings(stop=[""]))


def test_a_stop_string_may_have_characters_of_several_tokens(mixed):
    stops = StopStrings(mixed.tokenizer, mixed.model.vocabulary, ["漢字😀"])
    ids = mixed.tokenizer.encode("words, then 漢字😀").ids
    assert [stops(ids[:count]) for count in range(1, len(ids) + 1)] == [False] * (len(ids) - 1) + [
        True
    ]


def test_streamed_pieces_add_up_to_the_answer(mixed):
    prompts = [["the"], [noise(4), "red"]]
    sampling = Sampling(temperature=5, top_p=1, seed=0)
    expected = mixed.generate(prompts, Settings("mixed", sampling))
    events: list[list] = [[], []]
    for number, event in mixed.stream(prompts, Settings("mixed", sampling), has_rows=True):
        events[number].append(event)
    for parts, answer in zip(events, expected, strict=True):
        assert comparable(collect(parts)) == comparable(answer)
    assert len(events[0]) > len(expected[0])
    rows = [e for e in events[0] + events[1] if isinstance(e, ImagePart) and not e.is_complete]
    assert {part.image.size for part in rows} == {(16, 8)}


def test_the_upper_rows_of_an_image_are_those_of_the_whole_image(mixed):
    vocabulary = mixed.model.vocabulary
    stream = ContentStream(mixed.tokenizer, vocabulary, mixed.image)
    tokens = vocabulary.wrap_image(np.array([1, 2, 3, 4]))
    assert stream.add(tokens[:2], True) == []
    (part,) = stream.add(tokens[2:3], True)
    assert isinstance(part, ImagePart) and not part.is_complete
    assert part.image.size == (16, 8)
    assert comparable(collect(stream.add(tokens[3:]))) == comparable([mixed.image(np.arange(1, 5))])


def texts(events):
    return [event.text for event in events if isinstance(event, TextPiece)]


def test_no_character_is_divided(mixed):
    text = "a é 漢字 😀 b"
    stream = ContentStream(mixed.tokenizer, mixed.model.vocabulary, mixed.image)
    pieces = [
        piece for id_ in mixed.tokenizer.encode(text).ids for piece in texts(stream.add([id_]))
    ]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, *texts(stream.finish())]) == text


@pytest.mark.parametrize("size", [1, 3, 200])
def test_a_long_text_is_streamed_whole(mixed, size):
    text = "some words, é 漢字 😀 and more " * 30
    stream = ContentStream(mixed.tokenizer, mixed.model.vocabulary, mixed.image, ["never"])
    ids = mixed.tokenizer.encode(text).ids
    pieces = [p for at in range(0, len(ids), size) for p in texts(stream.add(ids[at : at + size]))]
    assert "".join([*pieces, *texts(stream.finish())]) == text


def test_what_may_begin_a_stop_string_is_kept_back(mixed):
    stream = ContentStream(mixed.tokenizer, mixed.model.vocabulary, mixed.image, ["abc"])
    encode = mixed.tokenizer.encode
    pieces = [
        piece for part in ("xa", "b", "d ab") for piece in texts(stream.add(encode(part).ids))
    ]
    assert "".join(pieces) == "xabd "
    assert texts(stream.finish()) == ["ab"]


def test_guidance_adds_the_logits_of_partial_prompts(mixed):
    image = noise(1)
    assert Guidance(3, 1.2).branches(["a", image]) == [
        (["a", image], 3), ([image], pytest.approx(-1.8)), ([], pytest.approx(-0.2)),
    ]  # fmt: skip
    assert Guidance(3, 1.2).branches(["a"]) == [(["a"], 3), ([], -2)]
    assert Guidance(3, 1.5).branches([image]) == [([image], 1.5), ([], -0.5)]
    sampling = Sampling(temperature=0)
    plain = mixed.generate([["the"]], Settings("image", sampling))
    ones = mixed.generate([["the"]], Settings("image", sampling, guidance=Guidance(1, 1)))
    strong = mixed.generate([["the"]], Settings("image", sampling, guidance=Guidance(30, 1)))
    assert comparable(plain[0]) == comparable(ones[0]) != comparable(strong[0])
    with pytest.raises(UserError, match="guidance applies to images only"):
        mixed.generate([["the"]], Settings("text", guidance=Guidance()))
    with pytest.raises(UserError, match="the scale of text must be finite"):
        Guidance(text=float("nan"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"images": 0}, "images 0: must be at least 1"), ({"drafts": -1}, "drafts -1: must be")],
)
def test_numbers_that_are_too_small_are_refused(mixed, options, message):
    with pytest.raises(UserError, match=message):
        mixed.generate([["the"]], Settings("image", **options))


def test_several_images_and_drafts(mixed):
    sampling = Sampling(temperature=1, seed=3)
    (answer,) = mixed.generate([["the"]], Settings("image", sampling, images=3))
    assert [part.size for part in answer] == [(16, 16)] * 3
    (drafted,) = mixed.generate([["the"]], Settings("image", sampling, images=3, drafts=3))
    assert comparable(drafted) == comparable(answer)


def test_guidance_encodes_an_image_once(mixed, monkeypatch):
    whole, encoded = mixed.codec.encode, list[int]()

    def encode(images_B3HW):
        encoded.append(len(images_B3HW))
        return whole(images_B3HW)

    monkeypatch.setattr(mixed.codec, "encode", encode)
    image = Image.new("RGB", (16, 16), "red")
    request = mixed.request(["the", image], Settings("image", guidance=Guidance(3, 2)))
    assert encoded == [1]
    prompts = [["the", image], [image], []]
    assert [branch.prompt for branch in request.branches] == [mixed.encode(p) for p in prompts]
