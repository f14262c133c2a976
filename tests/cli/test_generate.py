"""Options of `moma generate`; its other tests are in `test_root.py`."""

import json
import shutil

import pytest

from tests.command_line import refuses, succeeds


def test_every_option_changes_the_answer(trained):
    def answer(*options):
        return succeeds(
            "generate", trained / "run", "--prompt", "box 3", "--mode", "text", *options
        )

    plain = answer("--temperature", "2")
    for option in (("--top-k", "1"), ("--min-p", "1"), ("--repetition-penalty", "50")):
        assert answer("--temperature", "2", *option) != plain
    assert answer("--temperature", "2", "--stop", plain.strip()[0]) != plain
    assert answer("--temperature", "2", "--stop", "\n", "--stop", " ").strip(" \n").count(" ") == 0
    both = answer("--temperature", "2", "--samples", "2")
    assert both.startswith(plain.rstrip("\n")) and len(both) > len(plain)


def test_answers_are_routed_by_thresholds_unless_auxiliary_routers_are_requested(trained):
    def answer(routing):
        options = ("--mode", "text", "--temperature", "2", "--routing", routing)
        return succeeds("generate", trained / "run", "--prompt", "box 3", *options)

    assert answer("causal") == answer("threshold") != answer("auxiliary")


def test_images_are_guided_and_drafted(trained, tmp_path):
    def drawn(name, *options):
        out = tmp_path / name
        printed = succeeds(
            "generate",
            trained / "run",
            "--prompt",
            "box 3",
            "--mode",
            "image",
            "--out",
            out,
            *options,
        )
        return [(out / line.rsplit("/")[-1]).read_bytes() for line in printed.split()]

    (plain,) = drawn("plain")
    assert drawn("drafts", "--drafts", "3") == [plain]
    assert drawn("guided", "--text-guidance", "40") != [plain]
    assert drawn("one", "--text-guidance", "1") == [plain]
    assert len(drawn("several", "--images", "2", "--samples", "2")) == 4


def test_answers_by_other_thresholds_are_not_mixed(trained, tmp_path):
    run, prompts, out = tmp_path / "run", tmp_path / "prompts.jsonl", tmp_path / "out"
    shutil.copytree(trained / "run", run)
    shutil.rmtree(run / "aux_router", ignore_errors=True)
    prompts.write_text('{"segments": [{"type": "text", "text": "box 3"}]}\n')
    arguments = ("generate", run, "--from", prompts, "--out", out, "--mode", "text")
    succeeds(*arguments)
    succeeds(*arguments)
    succeeds("calibrate", run, "--steps", "1")
    assert "holds answers with other routing" in refuses(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mode", "text", "--images", "2"), "--images: no effect with --mode text"),
        (("--text-guidance", "3"), "--text-guidance: no effect with --mode mixed"),
        (("--mode", "text", "--drafts", "2"), "--drafts: no effect with --mode text"),
        (("--mode", "image", "--image-guidance", "2"), "no effect without an image in the prompt"),
        (("--mode", "image", "--stop", "."), "--stop: no effect with --mode image"),
        (("--mode", "text", "--stop", ""), "--stop: is empty; give a value"),
        (("--mode", "image", "--text-guidance", "nan"), "scale of text must be finite"),
        (("--repetition-penalty", "0"), "repetition_penalty 0.0: must be from 0.01 to 100"),
    ],
)
def test_options_without_effect_or_out_of_range_are_refused(trained, options, message):
    assert message in refuses("generate", trained / "run", "--prompt", "box", *options)


def test_a_file_of_prompts_is_answered(trained, tmp_path):
    image = {"type": "image", "image": "1.png"}
    rows = [[{"type": "text", "text": "box 3"}], [image, {"type": "text", "text": "box"}]]
    (tmp_path / "1.png").write_bytes((trained / "images" / "1.png").read_bytes())
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps({"segments": row}) + "\n" for row in rows))
    arguments = ("generate", trained / "run", "--from", prompts, "--out", out, "--mode", "image")
    assert succeeds(*arguments, "--batch", "1") == f"{out / 'results.jsonl'}\n"
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [1, 2]
    alone = tmp_path / "alone"
    one = ("generate", trained / "run", "--prompt", "box 3", "--mode", "image", "--out", alone)
    succeeds(*one)
    (segment,) = lines[0]["segments"]
    assert (out / segment["image"]).read_bytes() == (alone / "image_1.png").read_bytes()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    succeeds(*arguments, "--batch", "2", "--drafts", "2")
    assert before == {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert "holds answers with other sampling" in refuses(*arguments, "--seed", "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--from", "p.jsonl"), "--from needs --out"),
        (("--from", "p.jsonl", "--out", "o", "--prompt", "a"), "--prompt: no effect with --from"),
        (("--from", "p.jsonl", "--out", "o", "--samples", "2"), "--samples: no effect with --from"),
        (("--prompt", "a", "--batch", "2"), "--batch: no effect without --from"),
        (("--from", "missing.jsonl", "--out", "o"), "missing.jsonl"),
    ],
)
def test_options_that_do_not_fit_a_file_of_prompts_are_refused(trained, options, message):
    assert message in refuses("generate", trained / "run", *options)
