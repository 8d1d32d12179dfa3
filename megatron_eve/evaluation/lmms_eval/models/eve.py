# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's model `eve`: a released EVE folder.

    --model_args pretrained=FOLDER,resize_rule=eval,repetition_penalty=1.0,template=qwen2,dtype=auto --batch_size 8

Arguments beyond the folder have the defaults of `AskSettings`. lmms-eval calls this class by its own rules: a request
is a tuple of the context, the generation settings (or the continuation), a function that gives the images, and the
record's place. Multiple choice in lmms-eval takes the SMALLEST returned number for the answer (task.py: argmin), so
`loglikelihood` returns the negative log-probability, summed over the continuation's tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from PIL import Image
from tqdm import tqdm

from megatron_eve.errors import ConfigError
from megatron_eve.evaluation.lmms_eval.asking import Asked, AskSettings, Decoding, ReleasedFolder

# What tasks may ask for; anything else in their generation_kwargs is refused rather than ignored.
KNOWN = {"max_new_tokens", "until", "temperature", "top_p", "num_beams", "do_sample"}


@register_model("eve")
class Eve(lmms):
    """A released folder behind lmms-eval's interface."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        dtype: str = "auto",
        resize_rule: str = "eval",
        template: str = "qwen2",
        repetition_penalty: float = 1.0,
    ) -> None:
        """lmms-eval always passes `max_batch_size`; it is not used: `batch_size` decides."""
        super().__init__()
        settings = AskSettings(
            template=template,  # type: ignore[arg-type]  # AskSettings refuses others
            resize_rule=resize_rule,  # type: ignore[arg-type]
            repetition_penalty=float(repetition_penalty),
            batch_size=int(batch_size),
        )
        self._join_processes()
        own = f"cuda:{self._local_rank}" if torch.cuda.is_available() else "cpu"
        chosen = own if device is None or self._world_size > 1 else device
        self.released = ReleasedFolder(Path(pretrained), settings, device=chosen, dtype=dtype)

    def _join_processes(self) -> None:
        """One process of `accelerate launch`, or the only one."""
        from accelerate import Accelerator

        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            self.accelerator = accelerator
        self._rank, self._local_rank = accelerator.process_index, accelerator.local_process_index
        self._world_size = accelerator.num_processes

    @property
    def batch_size(self) -> int:
        return self.released.settings.batch_size

    @property
    def max_length(self) -> int:
        return self.released.max_length

    @property
    def device(self) -> torch.device:
        return self.released.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer a request, in their order; requests with the same settings share batches."""
        answers = [""] * len(requests)
        groups: dict[Decoding, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(decoding(request.args[1]), []).append(index)
        with tqdm(total=len(requests), disable=self._rank != 0, unit=" answers") as bar:
            for settings, indices in groups.items():
                asked = [self._asked(requests[index].args) for index in indices]
                for position, answer in self.released.answers(asked, settings):
                    answers[indices[position]] = answer
                    bar.update()
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(negative log-probability, whether greedy decoding writes it) of each continuation.

        In a GenerationResult, whose content lmms-eval hands on: it turns a bare pair into its text (0.7.3,
        api/instance.py: unwrap_generation_output) and then cannot score it."""
        arguments = [
            # Unconditional requests of acc_mutual_info are (context, continuation) alone.
            request.args if len(request.args) > 2 else (*request.args, None, None, None, None)
            for request in requests
        ]
        continuations = [
            target if isinstance(target, str) else str(target(self._record(*place)))
            for _, target, _, *place in arguments
        ]
        asked = [self._asked(request) for request in arguments]
        found = dict(self.released.likelihoods(asked, continuations))
        pairs = [(-found[i].log_probability, found[i].is_greedy) for i in range(len(requests))]
        return [GenerationResult(text=pair) for pair in pairs]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: its tasks choose the next question from the last answer."""
        raise ConfigError(
            f"model eve answers single questions; {len(requests)} requests are of several rounds. Leave the task out"
        )

    def _asked(self, request: tuple[Any, ...]) -> Asked:
        """A request's question; its images are opened when it is asked and not kept: there are thousands."""
        context, _, images_of, *place = request

        def images() -> Sequence[Image.Image]:
            given = [] if images_of is None else list(images_of(self._record(*place)) or [])
            if others := {type(image).__name__ for image in given if not hasattr(image, "convert")}:
                raise ConfigError(
                    f"task {place[1]} gives {', '.join(sorted(others))}; model eve reads PIL images only"
                )
            return given

        return Asked(text=context, load_images=images)

    def _record(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]


def decoding(settings: dict[str, Any]) -> Decoding:
    """A task's generation_kwargs; `do_sample: false` wins over a temperature. Raises: ConfigError."""
    if unknown := set(settings) - KNOWN - {"max_gen_toks", "image_aspect_ratio"}:
        raise ConfigError(
            f"generation_kwargs {sorted(unknown)} are not known; use {', '.join(sorted(KNOWN))}"
        )
    if settings.get("do_sample") and not settings.get("temperature"):
        raise ConfigError(
            "generation_kwargs: do_sample is true without a temperature above 0; name one, or leave do_sample out"
        )
    until = settings.get("until") or ()
    is_sampled = settings.get("do_sample", True) and (settings.get("temperature") or 0) > 0
    return Decoding(
        max_new_tokens=int(settings.get("max_new_tokens", settings.get("max_gen_toks", 128))),
        until=(until,) if isinstance(until, str) else tuple(until),
        temperature=float(settings["temperature"]) if is_sampled else 0.0,
        top_p=settings.get("top_p") if is_sampled else None,
        num_beams=int(settings.get("num_beams") or 1),
    )
