# SPDX-License-Identifier: Apache-2.0
"""The two demonstrations as lists of steps over the public commands.

    OUT/data/           easy-VQA, photographs, tokenizer, shards     OUT/steps/   what is done, and its seconds
    OUT/text, stage1 .. stage3/   run folders of the trainer         OUT/logs/    output of the other commands
    OUT/hf/             the released model                           OUT/results.*, samples.*, curves.png, summary.*

eve_tiny makes its language model itself, from text alone; smollm2 imports SmolLM2-135M-Instruct and also shows that its
text survives stage 2.1.
"""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_eve.config.schema import RunConfig
from megatron_eve.errors import ConfigError
from megatron_eve.run_files import DONE_FILE
from megatron_eve.train import configure
from tools.demo.steps import Step
from tools.process import Command

CAPTION_SHARE = 0.85  # of stage 2.2, in which a small model learns to see
PHOTO_SHARE = 0.02  # of the caption stages' samples: 23 photographs beside 4,000 drawings
TRAIN_LOG = "train.log"
ONE_THREAD = (("OMP_NUM_THREADS", "1"),)  # a tiny model's matrices are too small to share
SET_BY_DEMO = ("run_dir", "data.sources", "data.tokenizer", "checkpoint.load_weights_from")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """The user's choices."""

    out: Path
    overrides: tuple[str, ...] = ()
    train_images: int | None = None  # None: all 4,000
    test_images: int | None = None  # None: all 1,000


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One training run of a demonstration."""

    name: str  # of its folder and step
    config: RunConfig

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """A demonstration."""

    steps: tuple[Step, ...]
    stages: tuple[Stage, ...]
    reports: tuple[str, ...]  # files in OUT that are shown at the end


def eve_tiny(options: DemoOptions) -> Demo:
    """A small Qwen2.5-shaped language model made from text, then stages 1 to 3. Raises: ConfigError."""
    paths = _Paths(options)
    tokenizer = paths.data / "tokenizer"
    stages = tuple(
        _stage(options, recipe=f"eve_tiny_{name}", name=name, sources=sources, tokenizer=tokenizer,
               weights=None if before is None else options.out / before)
        for name, sources, before in (
            ("text", paths.text, None),
            ("stage1", paths.captions, "text"),
            ("stage2_1", paths.captions, "stage1"),
            ("stage2_2", paths.captions_and_questions, "stage2_1"),
            ("stage3", paths.questions, "stage2_2"),
        )
    )  # fmt: skip
    corpus = [paths.easy_vqa / f"{n}.json" for n in ("text", "captions_train", "questions_train")]
    size = stages[0].config.model.vocab_size
    train_tokenizer = paths.step(
        "tokenizer",
        ["data_prep", "tokenizer", "train", *corpus, paths.photos / "captions.json", tokenizer,
         "--vocab-size", size, "--overwrite"],
    )  # fmt: skip
    steps = (
        *paths.data_steps(),
        train_tokenizer,
        paths.shards_step(with_text=True),
        *(_train_step(stage, options) for stage in stages),
        *paths.closing_steps(stages, tokenizer=tokenizer, batch_size=256, evaluate_env=ONE_THREAD),
    )
    return Demo(steps=steps, stages=stages, reports=("results.md",))


def smollm2(options: DemoOptions) -> Demo:
    """SmolLM2-135M-Instruct, then stages 1 to 3. Raises: ConfigError."""
    paths = _Paths(options)
    out = options.out
    llm, weights = out / "smollm2-hf", out / "smollm2-weights"
    stages = tuple(
        _stage(options, recipe=f"smollm2_{name}", name=name, sources=sources, tokenizer=llm,
               weights=before)
        for name, sources, before in (
            ("stage1", paths.captions, weights),
            ("stage2_1", paths.captions, out / "stage1"),
            ("stage2_2", paths.captions_and_questions, out / "stage2_1"),
            ("stage3", paths.questions, out / "stage2_2"),
        )
    )  # fmt: skip
    first, second, third, fourth = (_train_step(stage, options) for stage in stages)
    steps = (
        *paths.data_steps(),
        paths.shards_step(with_text=False),
        paths.step("llm", ["data_prep", "demo", "smollm2", llm, "--overwrite"]),
        paths.import_step(llm, weights, config=stages[0].config),
        first,
        second,
        paths.frozen_step(llm),
        third,
        fourth,
        *paths.closing_steps(
            stages,
            tokenizer=llm,
            batch_size=64,
            text_step=paths.text_step(llm),
            must_see=("color",),  # shapes take several times the captions that fit into an hour
        ),
    )
    return Demo(steps=steps, stages=stages, reports=("text_loss.md", "results.md"))


class _Paths:
    """Where everything of one demonstration lies, and the steps that all have."""

    def __init__(self, options: DemoOptions) -> None:
        self.options = options
        self.out = options.out
        self.data = options.out / "data"
        self.easy_vqa = self.data / "easy-vqa"
        self.photos = self.data / "photos"
        shards = self.data / "shards"
        self.text = ((shards / "text", 1.0),)
        self.captions = ((shards / "captions", 1 - PHOTO_SHARE), (shards / "photos", PHOTO_SHARE))
        self.questions = ((shards / "questions", 1.0),)
        self.captions_and_questions = (
            (shards / "captions", CAPTION_SHARE),
            (shards / "questions", 1 - CAPTION_SHARE),
        )

    def step(
        self, name: str, *calls: Sequence[object], env: tuple[tuple[str, str], ...] = ()
    ) -> Step:
        """A step of `python -m` calls that share a log."""
        log = self.out / "logs" / f"{name}.log"
        arguments = [("-m", *map(str, call)) for call in calls]
        return Step(
            name=name, commands=tuple(Command(arguments=a, log=log, env=env) for a in arguments)
        )

    def data_steps(self) -> list[Step]:
        """What comes from packages."""
        return [
            self.step("easy-vqa", ["data_prep", "demo", "easy-vqa", self.easy_vqa, "--overwrite"]),
            self.step("photos", ["data_prep", "demo", "photos", self.photos, "--overwrite"]),
        ]

    def shards_step(self, *, with_text: bool) -> Step:
        """build-shards keeps finished parts of its own, so nothing is replaced here."""
        calls: list[list[object]] = []
        train = self.easy_vqa
        if self.options.train_images is not None:
            train = self.data / "first-images"
            calls += [
                ["tools.demo.first_images", self.easy_vqa / f"{name}_train.json",
                 train / f"{name}_train.json", "--images", self.options.train_images]
                for name in ("captions", "questions")
            ]  # fmt: skip
        if with_text:
            calls.append(self._build(self.easy_vqa / "text.json", self.easy_vqa, self.text))
        calls += [
            self._build(train / "captions_train.json", self.easy_vqa, self.captions),
            self._build(train / "questions_train.json", self.easy_vqa, self.questions),
            self._build(self.photos / "captions.json", self.photos, self.captions[1:]),
        ]
        return self.step("shards", *calls)

    def _build(
        self, annotations: Path, images: Path, sources: Sequence[tuple[Path, float]]
    ) -> list[object]:
        return ["data_prep", "build-shards", annotations, images, sources[0][0]]

    def import_step(self, llm: Path, weights: Path, *, config: RunConfig) -> Step:
        """Hugging Face -> distributed, and straight back as the model before any training."""
        return self.step(
            "import",
            ["checkpoints_convert", "hf-to-megatron", llm, weights, "--dtype", config.train.dtype,
             "--patch-embed-dim", config.model.patch_embed_dim, "--overwrite"],
            ["checkpoints_convert", "megatron-to-hf", weights, self.out / "hf-imported",
             "--tokenizer", llm, "--image-edge", config.data.image_edge, "--overwrite"],
        )  # fmt: skip

    def frozen_step(self, llm: Path) -> Step:
        """Every text tensor after stage 2.1 is the language model's, byte for byte."""
        released = self.out / "hf-stage2_1"
        return self.step(
            "text-frozen",
            _release(self.out / "stage2_1", released, tokenizer=llm),
            ["checkpoints_convert", "verify", llm, released, "--allow-extra"],
        )

    def text_step(self, llm: Path) -> Step:
        """The text loss of all four models."""
        out = self.out
        return self.step(
            "text-loss",
            ["tools.demo.text_loss", out, "--llm", llm, "--imported", out / "hf-imported",
             "--stage2-1", out / "hf-stage2_1", "--stage3", out / "hf"],
        )  # fmt: skip

    def closing_steps(
        self,
        stages: Sequence[Stage],
        *,
        tokenizer: Path,
        batch_size: int,
        evaluate_env: tuple[tuple[str, str], ...] = (),
        text_step: Step | None = None,
        must_see: Sequence[str] = (),
    ) -> list[Step]:
        """Release, evaluation, things to look at."""
        number = self.options.test_images
        evaluate: list[object] = ["megatron_eve.evaluation.easy_vqa", self.out / "hf", self.easy_vqa, self.out,
                                  "--batch-size", batch_size]  # fmt: skip
        evaluate += [] if number is None else ["--images", number]
        evaluate += ["--must-see", *must_see] if must_see else []
        runs = [stage.run_dir for stage in stages]
        curves = self.out / "curves.png"
        return [
            self.step("release", _release(runs[-1], self.out / "hf", tokenizer=tokenizer)),
            *([text_step] if text_step is not None else []),
            self.step("evaluate", evaluate, env=evaluate_env),
            self.step("samples", ["tools.demo.samples", self.out, self.easy_vqa]),
            self.step("curves", ["tools.plot", *runs, "--out", curves, "--overwrite"]),
        ]


def _release(run: Path, folder: Path, *, tokenizer: Path) -> list[object]:
    return ["checkpoints_convert", "megatron-to-hf", run, folder, "--tokenizer", tokenizer,
            "--overwrite"]  # fmt: skip


def _stage(
    options: DemoOptions,
    *,
    recipe: str,
    name: str,
    sources: Sequence[tuple[Path, float]],
    tokenizer: Path,
    weights: Path | None,
) -> Stage:
    overrides = _stage_overrides(
        options.out / name, sources=sources, tokenizer=tokenizer, weights=weights
    )
    for override in options.overrides:
        if override.startswith(SET_BY_DEMO):
            raise ConfigError(
                f"--override {override}: the demo sets {', '.join(SET_BY_DEMO)} itself; train with "
                "`python -m megatron_eve.train` to choose them."
            )
    return Stage(name=name, config=configure(recipe, overrides=[*overrides, *options.overrides]))


def _stage_overrides(
    run_dir: Path, *, sources: Sequence[tuple[Path, float]], tokenizer: Path, weights: Path | None
) -> list[str]:
    fields = [f"run_dir={run_dir}", f"data.tokenizer={tokenizer}"]
    for number, (path, proportion) in enumerate(sources):
        fields.append(f"data.sources.{number}.path={path}")
        if len(sources) > 1:
            fields.append(f"data.sources.{number}.proportion={proportion}")
    if weights is not None:
        fields.append(f"checkpoint.load_weights_from={weights}")
    return fields


def _train_step(stage: Stage, options: DemoOptions) -> Step:
    """One training run: as many processes as its recipe asks for, on a port that is free."""
    config = stage.config
    overrides = _stage_overrides(
        stage.run_dir,
        sources=[(Path(source.path), source.proportion) for source in config.data.sources],
        tokenizer=Path(config.data.tokenizer),
        weights=_optional_path(config.checkpoint.load_weights_from),
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
    processes = ("--nproc-per-node", str(config.parallel.world_size))
    command = Command(
        arguments=(*launcher, *processes, "-m", "megatron_eve.train", config.recipe, *overrides,
                   *options.overrides),
        log=stage.run_dir / TRAIN_LOG,
        env=ONE_THREAD,
        stop_signal=signal.SIGTERM,  # the trainer saves and ends
    )  # fmt: skip
    return Step(name=stage.name, commands=(command,), proof=stage.run_dir / DONE_FILE)


def _optional_path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


DEMOS: dict[str, Callable[[DemoOptions], Demo]] = {"eve-tiny": eve_tiny, "smollm2": smollm2}
