"""Generation, and the command on top of it: text as it comes, speed, JSON, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, models

from fptq_compiler.cli import generate as generate_cli
from fptq_compiler.cli.entry import run
from fptq_compiler.errors import RuntimeInputError
from fptq_compiler.runtime.continuation import Continuation, follow
from fptq_compiler.runtime.generate import generate
from fptq_compiler.runtime.model import Cache, Model
from fptq_compiler.runtime.session import load
from fptq_compiler.runtime.session_file import SessionFile, write_session_file
from fptq_compiler.runtime.text_stream import TextStream
from tests.cached_model import CACHE_TYPES, HEADS, VOCABULARY, write_cached_model
from tests.words import word_tokenizer

PROMPT = [3, 1, 4, 1, 5]
WORDS = "w3 w1 w4 w1 w5"
TEMPLATE = "{% for m in messages %}w7 {{ m.content }} w8{% endfor %}"


def open_model(folder: Path, cache: str | None, **settings: Any) -> Model:
    path = write_cached_model(folder / f"{cache}.onnx", cache)
    write_session_file(path, SessionFile(**settings))
    return load(path, threads=1)


def by_whole_sequences(model: Model, count: int) -> list[int]:
    """Greedy tokens, each from one run over everything before it."""
    ids = list(PROMPT)
    for _ in range(count):
        logits, _ = model.step([ids], model.start(1))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("cache", [None, *CACHE_TYPES])
def test_greedy_tokens_are_the_likeliest(tmp_path: Path, cache: str | None) -> None:
    model = open_model(tmp_path, cache)
    found = list(generate(model, PROMPT, max_new_tokens=20))
    assert found == by_whole_sequences(model, 20)
    assert len(set(found)) > 3


def test_with_and_without_a_cache_the_draws_are_the_same(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"temperature": 1.5, "top_k": 9, "top_p": 0.95, "seed": 4}
    found = [
        list(generate(open_model(tmp_path, cache), PROMPT, max_new_tokens=20, **settings))
        for cache in (None, "float32")
    ]
    assert found[0] == found[1]
    other = {**settings, "seed": 5}
    model = open_model(tmp_path, "float32")
    assert found[0] != list(generate(model, PROMPT, max_new_tokens=20, **other))


def test_a_stop_token_ends_the_sequence_and_is_not_given(tmp_path: Path) -> None:
    model = open_model(tmp_path, "int8")
    free = list(generate(model, PROMPT, max_new_tokens=20))
    stop = free[5]
    stopped = list(generate(model, PROMPT, max_new_tokens=20, stop_ids=(stop, 99)))
    assert stopped == free[: free.index(stop)]


def test_the_end_of_the_context_ends_the_sequence(tmp_path: Path) -> None:
    model = open_model(tmp_path, "int8", context_length=len(PROMPT) + 3)
    assert len(list(generate(model, PROMPT, max_new_tokens=20))) == 3
    with pytest.raises(RuntimeInputError, match="leaves no room in the model's context of 8"):
        generate(model, [1] * 8, max_new_tokens=1)


def test_each_token_comes_as_soon_as_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = Model.step

    def counted(model: Model, ids: Any, cache: Cache) -> Any:
        steps.append(len(ids[0]))
        return step(model, ids, cache)

    monkeypatch.setattr(Model, "step", counted)
    tokens = generate(open_model(tmp_path, "int8"), PROMPT, max_new_tokens=3)
    assert steps == []
    for expected in ([5], [5, 1], [5, 1, 1]):
        next(tokens)
        assert steps == expected
    assert list(tokens) == []
    assert len(steps) == 3


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        ([], {}, "the prompt has no tokens"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"top_p": 2.0}, "top_p is 2"),
    ],
)
def test_what_cannot_be_generated_is_said_at_once(
    tmp_path: Path, ids: list[int], settings: dict[str, Any], message: str
) -> None:
    model = open_model(tmp_path, "int8")
    with pytest.raises(RuntimeInputError, match=message):
        generate(model, ids, **{"max_new_tokens": 1, **settings})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with a session file and a tokenizer beside it."""
    path = write_cached_model(tmp_path / "m.onnx", "int8", metadata={"fptq.heads": str(HEADS)})
    write_session_file(path, SessionFile(context_length=40, bos_token_id=6))
    word_tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path)
    return tmp_path


def call(folder: Path, *words: str) -> int:
    return run(generate_cli.command, [str(folder / "m.onnx"), "--threads", "1", *words])


def expected_words(folder: Path, prompt: list[int], count: int, **settings: Any) -> str:
    model = load(folder / "m.onnx", threads=1)
    found = generate(model, prompt, max_new_tokens=count, **settings)
    return " ".join(f"w{token}" for token in found)


def test_text_goes_to_stdout_and_speed_to_stderr(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder, "--prompt", WORDS, "--max-new-tokens", "6") == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == expected_words(folder, PROMPT, 6)
    assert "prompt: 5 tokens, " in shown.err
    assert "new: 6 tokens, " in shown.err
    assert shown.err.count("tokens/s") == 2
    assert "the context is full" not in shown.err


def test_quiet_says_the_text_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(folder, "--prompt", WORDS, "-q") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert len(shown.out.split()) == 40 - len(PROMPT)


def test_the_end_of_the_context_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(folder, "--prompt", WORDS) == 0
    assert "new: 35 tokens, " in (err := capsys.readouterr().err)
    assert err.rstrip().endswith("; the context is full")


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--temperature", "1.5", "--top-k", "9", "--top-p", "0.95", "--seed", "4"]
    assert call(folder, "--prompt", WORDS, "--max-new-tokens", "6", "--json", *settings) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    text = expected_words(folder, PROMPT, 6, temperature=1.5, top_k=9, top_p=0.95, seed=4)
    assert found["text"].strip() == text
    assert found["tokens"] == [int(word[1:]) for word in text.split()]
    assert (found["model"], found["prompt_tokens"]) == ("m.onnx", 5)
    assert found["prompt_tokens_per_second"] > 0
    assert found["decode_tokens_per_second"] > 0
    assert shown.err == ""


def test_chat_applies_the_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(folder, "--prompt", "w3", "--chat", "--max-new-tokens", "6") == 0
    assert capsys.readouterr().out.strip() == expected_words(folder, [7, 3, 8], 6)


def test_an_empty_prompt_begins_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(folder, "--prompt", "", "--max-new-tokens", "6") == 0
    assert capsys.readouterr().out.strip() == expected_words(folder, [6], 6)


def test_the_tokenizers_end_of_text_ends_where_the_session_file_has_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *_ = expected_words(folder, PROMPT, 1).split()
    word_tokenizer(eos_token=first).save_pretrained(folder)
    assert call(folder, "--prompt", WORDS) == 0
    shown = capsys.readouterr()
    assert shown.out == "\n"
    assert shown.err.strip() == "prompt: 5 tokens; new: 0 tokens"


def test_the_genai_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word_tokenizer(eos_token="w2").save_pretrained(folder)
    assert call(folder, "--genai-folder", str(folder / "genai")) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'genai'}\n"
    assert (folder / "genai" / "genai_config.json").is_file()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "give either --prompt TEXT or --genai-folder DIR"),
        (["--prompt", "w1", "--genai-folder", "x"], 2, "give either"),
        (["--prompt", "w1", "--provider", "abacus"], 3, "abacus is not available"),
        (["--prompt", "w1", "--temperature", "-1"], 2, "temperature"),
        (["--prompt", "w1", "--top-p", "0"], 2, "top-p"),
        (["--prompt", "w1 " * 40], 2, "leaves no room in the model's context of 40"),
        (["--prompt", "w1", "-v", "-q"], 2, "contradict"),
        (["--prompt", "w1", "--tokenizer", "nowhere"], 2, "does not exist"),
    ],
)
def test_what_is_refused(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    message: str,
) -> None:
    assert call(folder, *words) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_chat_without_a_template_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "chat_template.jinja").unlink()
    assert call(folder, "--prompt", "w1", "--chat") == 2
    assert "--chat: the tokenizer has no chat template" in capsys.readouterr().err


def test_a_template_that_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = "{{ raise_exception('only in pairs') }}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert call(folder, "--prompt", "w1", "--chat") == 3
    assert "chat template fails: only in pairs" in capsys.readouterr().err


def test_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cached_model(tmp_path / "m.onnx", "int8")
    assert call(tmp_path, "--prompt", "w1") == 3
    assert "say where one is with --tokenizer" in capsys.readouterr().err


def test_another_models_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = Tokenizer(models.WordLevel({"w1": VOCABULARY + 7, "?": 0}, unk_token="?"))
    words.save(str(folder / "tokenizer.json"))
    assert call(folder, "--prompt", "w1") == 2
    assert "is this the model's own tokenizer?" in capsys.readouterr().err


def test_a_model_that_is_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "m.onnx").write_bytes(b"nothing")
    assert call(folder, "--prompt", "w1") == 3
    assert "not an ONNX file" in capsys.readouterr().err


def test_text_appears_while_it_is_made() -> None:
    """Each word is said before the next token is asked for."""
    said: list[str] = []
    tokenizer = word_tokenizer()
    before: list[int] = []

    def tokens() -> Any:
        for token in (3, 4, 5):
            before.append(len(said))
            yield token

    result = follow(tokens(), TextStream(tokenizer, [1]), said.append)
    assert said == [" w3", " w4", " w5", ""]
    assert before == [0, 1, 2]
    assert (result.tokens, result.text) == ([3, 4, 5], " w3 w4 w5")


def test_speeds_count_what_was_timed() -> None:
    result = Continuation([1, 2, 3], "", prompt_seconds=0.5, decode_seconds=0.25)
    assert result.speeds(10) == (20, 8)
    one = Continuation([1], "", prompt_seconds=0.5, decode_seconds=0.0)
    assert one.speeds(10) == (20, None)
    assert Continuation([], "", 0.0, 0.0).speeds(10) == (None, None)


def test_help_and_version() -> None:
    runner = CliRunner()
    shown = runner.invoke(generate_cli.command, ["--help"])
    assert "Exit codes: 0 done, 1 our bug" in shown.output
    for parameter in generate_cli.command.params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name
            assert parameter.opts[-1] in shown.output
    assert runner.invoke(generate_cli.command, ["--version"]).output.startswith("fptq-compiler ")
