# SPDX-License-Identifier: Apache-2.0
"""python -m megatron_eve.generate: the answer on stdout as it comes, every wrong thing named on stderr."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eve.generate import main
from megatron_eve.inference.engine import Engine, Request
from megatron_eve.inference.prompts import ChatTurn
from megatron_eve.inference.sampling import SamplingOptions


def test_prints_the_engines_answer(
    engine: Engine, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(engine.info.folder)
    images = tuple(engine.image(path.read_bytes()) for path in pictures[:2])
    prompt = engine.prompt([ChatTurn("user", "How many?", images)])
    expected = engine.answer([Request(prompt, SamplingOptions(max_new_tokens=6))])[0].text
    shown = [str(path) for path in pictures[:2]]
    arguments = [folder, "--image", shown[0], "--image", shown[1], "--max-new-tokens", "6"]
    assert main([*arguments, "--prompt", "How many?", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    sampled = [*arguments, "--prompt", "x", "--temperature", "1.5", "--seed", "1"]
    assert main(sampled) == main(sampled) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert main([*arguments, "--template", "plain", "--dtype", "bfloat16"]) == 0
    assert main([folder, "--prompt", "How many shapes?", "--max-new-tokens", "2"]) == 0


def test_wrong_input_is_named(
    engine: Engine, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, good = str(engine.info.folder), ["--image", str(pictures[0])]
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:60])
    question = ["--prompt", "What?"]
    for arguments, message, code in (
        ([str(tmp_path), *question], "is no released folder: config.json not found", 1),
        (
            [folder, "--image", str(tmp_path / "no.png"), *question],
            "no.png cannot be read (No such",
            1,
        ),
        ([folder, "--image", str(broken), *question], "broken.png cannot be used as an image", 1),
        ([folder, *good, "--prompt", "a <image>"], "turn 0 spells <image>", 1),
        ([folder, "--prompt", "  "], "turn 0 is empty; give a question, an image, or both", 1),
        ([folder, "--prompt", "\udcff"], "turn 0 holds half of a surrogate pair", 1),
        ([folder, "--image", str(tmp_path), *question], "cannot be read (Is a directory)", 1),
        ([folder, *good, *question, "--top-p", "2"], "top_p is 2.0, expected above 0", 2),
        ([folder, *good, *question, "--device", "tpu"], "device is 'tpu', expected cpu, cuda", 2),
        ([folder, *good, *question, "--max-new-tokens", "999"], "the model has 256 positions", 2),
    ):
        assert main(arguments) == code, arguments
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""


@pytest.mark.parametrize(
    "arguments", [[], ["--template", "plain"], ["--template", "plain", "--prompt", "x"]]
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["folder", *arguments])
    assert stop.value.code == 2
    assert "--p" in capsys.readouterr().err


def test_no_transformers_and_no_megatron_core(engine: Engine) -> None:
    """Answering needs neither; both take seconds to import, and the folder's Python files are not run."""
    code = (
        "import sys\nfrom megatron_eve.generate import main\n"
        f"main([{str(engine.info.folder)!r}, '--prompt', 'What?', '--max-new-tokens', '1'])\n"
        "print(sorted({'transformers', 'megatron'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr
