"""A model with its tokenizers: text and images go in and come out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moma.errors import UserError
from moma.generate.decode import Sampling
from moma.generate.mixed import MixedModel
from moma.model.transformer import ModelConfig, Transformer
from moma.runs import Tokenizers
from moma.tokenizers.image.codec import CodecConfig, ImageCodec, preprocess
from moma.tokenizers.text import TextTokenizerConfig, train_text_tokenizer, vocabulary_of
from moma.vocabulary import Vocabulary

CODEC = CodecConfig(
    image_size=16,
    patch=4,
    block_channels=(8, 16),
    layers_per_block=1,
    latent_channels=8,
    code_channels=8,
    codebook_size=16,
    norm_groups=4,
    encoder_middle=False,
    middle_attention=False,
)
CONTEXT = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tokenizer and a random codec."""
    tokenizers = Tokenizers(tmp_path_factory.mktemp("tokenizers"))
    config = TextTokenizerConfig(vocabulary_size=320)
    tokenizer = train_text_tokenizer(config, ["the red apple"] * 9, CODEC.codebook_size)
    tokenizer.save(str(tokenizers.text))
    torch.manual_seed(0)
    ImageCodec(CODEC).save(tokenizers.codec)
    vocabulary_of(tokenizer, CODEC.codes_per_side**2).save(tokenizers.vocabulary)
    return tokenizers


@pytest.fixture(scope="module")
def mixed(folder):
    vocabulary = Vocabulary.load(folder.vocabulary)
    config = ModelConfig(dim=32, layers=2, heads=2, groups="moe_2t2i")
    model = Transformer(config, vocabulary, (0.5, 0.5))
    model.initialise(0)
    return MixedModel.assemble(model.eval(), folder, CONTEXT)


def noise(seed, size=(16, 16)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def flat(content):
    """Content as text and pixel values, to be compared."""
    return [part if isinstance(part, str) else np.asarray(part).tolist() for part in content]


def test_the_codec_is_the_saved_one(mixed, folder):
    codec = ImageCodec.load(folder.codec)
    image = noise(1, (20, 31))
    expected = codec.encode(preprocess(image, 16)[None])[0].numpy()
    assert (mixed.codes(image) == expected).all()
    assert mixed.codes(image).shape == (4,)


def test_a_sequence_opens_as_a_document_and_wraps_its_images(mixed):
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
    """Images come back as the codec draws them; neighbouring texts come back as one."""
    parts: list = [noise(part) if isinstance(part, int) else part for part in content]
    expected: list = []
    for part in parts:
        if isinstance(part, str) and expected and isinstance(expected[-1], str):
            expected[-1] += part
        else:
            expected.append(part if isinstance(part, str) else mixed.image(mixed.codes(part)))
    assert flat(mixed.decode(mixed.encode(parts))) == flat(expected)


def test_an_image_is_drawn_from_its_codes(mixed):
    drawn = mixed.image(np.array([0, 5, 15, 3]))
    assert (drawn.size, drawn.mode) == ((16, 16), "RGB")
    other = mixed.image(np.array([1, 5, 15, 3]))
    assert flat([drawn]) != flat([other])


def test_an_image_that_is_cut_off_is_left_out(mixed):
    vocabulary = mixed.model.vocabulary
    ids = mixed.encode(["the", noise(1)])
    assert mixed.decode(ids[:-1]) == ["the"]
    assert mixed.decode(ids[:-3]) == ["the"]
    # A broken image does not spoil the next one.
    whole = vocabulary.wrap_image(np.array([1, 2, 3, 4]))
    (image,) = mixed.decode([*whole[:3], *whole])
    assert flat([image]) == flat([mixed.image(np.array([1, 2, 3, 4]))])


def test_text_on_both_sides_of_an_image_stays_apart(mixed):
    before, image, after = mixed.decode(mixed.encode(["red ", noise(3), " apple"]))
    assert (before, after) == ("red ", " apple")
    assert isinstance(image, Image.Image)


@pytest.mark.parametrize("seed", range(3))
def test_modes_write_what_they_promise(mixed, seed):
    prompts = [["the"], [noise(1), "red"], [noise(2)]]
    sampling = Sampling(temperature=1.5, top_p=1, seed=seed)
    for answer in mixed.generate(prompts, "image", sampling):
        (image,) = answer
        assert isinstance(image, Image.Image) and image.size == (16, 16)
    for answer in mixed.generate(prompts, "text", sampling):
        assert all(isinstance(part, str) for part in answer)
    for answer in mixed.generate(prompts, "mixed", sampling):
        assert answer
        assert all(isinstance(part, str) or part.size == (16, 16) for part in answer)


def test_mixed_answers_hold_images_when_the_model_wants_them(mixed):
    sampling = Sampling(temperature=50, top_p=1)
    answers = mixed.generate([["the"]] * 40, "mixed", sampling)
    kinds = {type(part) is str for answer in answers for part in answer}
    assert kinds == {True, False}


def test_the_same_seed_writes_the_same(mixed):
    def write(seed):
        answers = mixed.generate([["the"], [noise(4)]], "mixed", Sampling(seed=seed))
        return [flat(answer) for answer in answers]

    assert write(1) == write(1)
    assert write(1) != write(2)


def test_an_answer_has_no_more_than_the_wanted_tokens(mixed):
    tokenizer = mixed.tokenizer
    longest = max(len(tokenizer.decode([id_])) for id_ in range(tokenizer.get_vocab_size()))
    (short,) = mixed.generate([["the"]], "text", Sampling(seed=3), new_tokens=2)
    (full,) = mixed.generate([["the"]], "text", Sampling(seed=3))
    assert len("".join(short)) <= 2 * longest < len("".join(full))


def test_no_prompt_and_too_long_a_prompt_are_refused(mixed):
    with pytest.raises(UserError, match="no prompt"):
        mixed.generate([])
    with pytest.raises(UserError, match=f"context of {CONTEXT} tokens leaves only .*; shorten"):
        mixed.generate([["the"], ["zzz " * CONTEXT]])
    with pytest.raises(UserError, match="context"):
        mixed.generate([[noise(index) for index in range(8)]], "image")


@pytest.mark.parametrize("missing", ["tokenizer.json", "codec/config.json"])
def test_a_missing_tokenizer_is_named(mixed, folder, tmp_path, missing):
    broken = Tokenizers(tmp_path / "broken")
    folder.copy_to(broken)
    path = broken.path / missing
    path.rename(tmp_path / "away")
    with pytest.raises(UserError, match=missing.split("/")[0]):
        MixedModel.assemble(mixed.model, broken, CONTEXT)


def test_without_a_codec_there_is_text_alone(mixed, folder, tmp_path):
    tokenizers = Tokenizers(tmp_path / "text")
    folder.copy_to(tokenizers)
    tokenizers.codec.rename(tmp_path / "away")
    alone = MixedModel.assemble(mixed.model, tokenizers, CONTEXT)
    sampling = Sampling(temperature=0)
    assert alone.generate([["the"]], "mixed", sampling) == mixed.generate(
        [["the"]], "text", sampling
    )
    for ask in (
        lambda: alone.generate([["the"]], "image"),
        lambda: alone.generate([[noise(0)]], "text"),
    ):
        with pytest.raises(UserError, match="no folder 'codec'"):
            ask()


def test_several_images_in_a_prompt_are_used_in_order(mixed):
    one, two = noise(1), noise(2)
    vocabulary = mixed.model.vocabulary
    wrapped = [vocabulary.wrap_image(mixed.codes(image)) for image in (one, two)]
    ids = mixed.encode([one, "red", two])
    assert ids[1:7] == wrapped[0] and ids[-6:] == wrapped[1]
    sampling = Sampling(temperature=0)
    together = mixed.generate(
        [[one, two, "red"], [two, one, "red"], [two, "red"]], "text", sampling
    )
    assert len({str(each) for each in together}) > 1


def test_a_limit_of_zero_new_tokens_is_refused(mixed):
    with pytest.raises(UserError, match="new_tokens 0"):
        mixed.generate([["the"]], "text", new_tokens=0)
