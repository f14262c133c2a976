"""The endpoint through the `openai` package, over HTTP: answers are those of the model."""

import base64
import io

import openai
import pytest
from PIL import Image

from moma.generate.guidance import Guidance
from moma.generate.sampling import Sampling
from moma.generate.settings import Settings
from moma.serve.engine import Engine
from tests.serve.models import comparable, noise, png_url, read_url, running

GREEDY = Sampling(temperature=0)
USER = [{"role": "user", "content": "the"}]


@pytest.fixture(scope="module")
def client(mixed):
    with (
        Engine(mixed, max_active=4) as engine,
        running(engine) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        yield client


def chat(client, messages=USER, extra=None, **options):
    return client.chat.completions.create(
        model="model", messages=messages, extra_body=extra, **options
    )


def content_of(message):
    """Text and images of a message, in order."""
    content, start, text = [], 0, message.content
    for image in getattr(message, "images", []):
        offset = image["text_offset"]
        content += [text[start:offset]] if offset > start else []
        content.append(read_url(image["image_url"]["url"]))
        start = offset
    return content + ([text[start:]] if len(text) > start else [])


def test_a_text_is_that_of_the_model(client, mixed):
    answer = chat(client, extra={"mode": "text"}, temperature=0)
    assert [answer.choices[0].message.content] == mixed.generate(
        [["the"]], Settings("text", GREEDY)
    )[0]
    assert (answer.object, answer.model) == ("chat.completion", "model")
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens == len(mixed.encode(["the"]))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_every_setting_reaches_the_model(client, mixed):
    sampling = Sampling(1.7, 0.8, 5, top_k=40, min_p=0.01, repetition_penalty=1.5)
    given = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.5, "mode": "text"}
    sampled = {"temperature": 1.7, "top_p": 0.8, "seed": 5}
    found = chat(client, extra=given, **sampled, max_tokens=9, stop=["a", "e"])
    settings = Settings("text", sampling, 9, stop=["a", "e"])
    assert content_of(found.choices[0].message) == mixed.generate([["the"]], settings)[0]
    short = chat(client, extra={"mode": "text"}, **sampled, max_completion_tokens=1)
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (1, "length")


def test_texts_and_images_of_all_messages_are_one_document(client, mixed):
    image = noise(3, (40, 20))
    parts = [
        {"type": "text", "text": "red "},
        {"type": "image_url", "image_url": {"url": png_url(image), "detail": "high"}},
    ]
    messages = [{"role": "system", "content": "the "}, {"role": "user", "content": parts}]
    extra = {"mode": "image", "images": 2, "text_guidance": 3.0, "image_guidance": 1.2}
    found = chat(client, messages, extra, temperature=0)
    settings = Settings("image", GREEDY, images=2, guidance=Guidance(3, 1.2))
    (expected,) = mixed.generate([["the ", "red ", image]], settings)
    message = found.choices[0].message
    assert message.content == "" and comparable(content_of(message)) == comparable(expected)


def test_text_and_images_are_in_order(client, mixed):
    kinds = set()
    for seed in range(6):
        settings = Settings("mixed", Sampling(50, 1.0, seed))
        (expected,) = mixed.generate([["the"]], settings)
        found = chat(client, temperature=50, top_p=1, seed=seed)
        assert comparable(content_of(found.choices[0].message)) == comparable(expected)
        kinds.add(tuple(type(part) is str for part in expected)[:3])
    assert len(kinds) > 1


def test_a_streamed_answer_is_the_whole_one_in_pieces(client):
    options = {"temperature": 50, "top_p": 1, "seed": 0, "n": 2}
    whole = chat(client, **options)
    stream = chat(client, **options, stream=True, stream_options={"include_usage": True})
    texts, images, ends = ["", ""], ([], []), {}  # type: ignore[var-annotated]
    for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            assert choice.index not in ends
            texts[choice.index] += choice.delta.content or ""
            for image in getattr(choice.delta, "images", []):
                assert image["text_offset"] == len(texts[choice.index])
                images[choice.index].append(image)
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert usage == whole.usage
    for number, choice in enumerate(whole.choices):
        assert texts[number] == choice.message.content
        assert images[number] == getattr(choice.message, "images", [])
        assert ends[number] == choice.finish_reason
    assert any(images) and any(texts)


def test_upper_rows_of_images_are_streamed_if_they_are_wanted(client):
    def parts(partial):
        extra = {"mode": "image", "images": 3, "partial_images": partial}
        stream = chat(client, extra=extra, stream=True, seed=1)
        return [
            (image.get("partial", False), read_url(image["image_url"]["url"]).size)
            for chunk in stream
            for choice in chunk.choices
            for image in getattr(choice.delta, "images", [])
        ]

    assert parts(False) == [(False, (16, 16))] * 3
    assert set(parts(True)) <= {(False, (16, 16)), (True, (16, 8))}


def test_several_answers_have_successive_seeds(client, mixed):
    found = chat(client, extra={"mode": "text"}, n=3, seed=2**32 - 2, temperature=2)
    for choice, seed in zip(found.choices, (2**32 - 2, 2**32 - 1, 0), strict=True):
        settings = Settings("text", Sampling(2.0, seed=seed))
        assert content_of(choice.message) == mixed.generate([["the"]], settings)[0]
    assert found.usage.prompt_tokens == len(mixed.encode(["the"]))


def test_without_a_seed_answers_differ(client):
    found = [chat(client, extra={"mode": "image"}, temperature=9, top_p=1) for _ in range(4)]
    assert len({answer.choices[0].message.images[0]["image_url"]["url"] for answer in found}) > 1


def test_images_are_generated(client, mixed):
    found = client.images.generate(
        model="model", prompt="red", n=2, size="16x16", response_format="b64_json",
        extra_body={"seed": 4, "text_guidance": 2.0},
    )  # fmt: skip
    drawn = [Image.open(io.BytesIO(base64.b64decode(each.b64_json))) for each in found.data]
    for number, image in enumerate(drawn):
        settings = Settings("image", Sampling(seed=4 + number), guidance=Guidance(2, 1))
        assert comparable([image]) == comparable(mixed.generate([["red"]], settings)[0])
    assert found.created and found.size == "16x16"


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert model == client.models.retrieve("model")
    assert (model.id, model.object, model.owned_by) == ("model", "model", "moma")
    with pytest.raises(openai.NotFoundError, match="this server has 'model'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="no model of this name"):
        client.chat.completions.create(model="other", messages=USER)
