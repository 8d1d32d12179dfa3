# SPDX-License-Identifier: Apache-2.0
"""Photographs of many sizes that scikit-image, scikit-learn and matplotlib ship in their wheels, with short captions
written by looking at them, as an EVE/LLaVA caption data set. Files are copied unchanged. For checking decoding and
resizing on real images and for overfitting tests; too few to learn from.

    OUT/images/NAME    OUT/captions.json
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_eve.errors import DataError
from megatron_eve.whole import write_json

from ..output import new_folder
from .packages import package_folder


@dataclass(frozen=True, slots=True)
class Photo:
    """One file of a package and what can be seen on it."""

    module: str
    path: str
    caption: str


INSTALL = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
SKIMAGE, SKLEARN, MATPLOTLIB = "skimage", "sklearn", "matplotlib"
PHOTOS = (
    Photo(SKIMAGE, "data/astronaut.png", "An astronaut in an orange suit in front of a flag."),
    Photo(SKIMAGE, "data/brick.png", "A gray brick wall seen from close up."),
    Photo(SKIMAGE, "data/camera.png", "A man in a dark coat looks through a camera on a tripod."),
    Photo(SKIMAGE, "data/cell.png", "A single bright round cell under a microscope."),
    Photo(SKIMAGE, "data/chelsea.png", "The face of a ginger tabby cat."),
    Photo(SKIMAGE, "data/clock_motion.png", "A blurred gray photograph of something in motion."),
    Photo(SKIMAGE, "data/coffee.png", "A cup of coffee on a red saucer with a spoon."),
    Photo(SKIMAGE, "data/coins.png", "Four rows of old coins on a dark background."),
    Photo(SKIMAGE, "data/grass.png", "Grass in black and white, seen from above."),
    Photo(SKIMAGE, "data/gravel.png", "Many small gray stones."),
    Photo(SKIMAGE, "data/hubble_deep_field.jpg", "Many distant galaxies on a black sky."),
    Photo(SKIMAGE, "data/ihc.png", "Brown and blue stained tissue under a microscope."),
    Photo(SKIMAGE, "data/microaneurysms.png", "Dark blood vessels on a gray background."),
    Photo(SKIMAGE, "data/moon.png", "The gray surface of the moon with craters."),
    Photo(SKIMAGE, "data/motorcycle_left.png", "A red motorcycle parked in a garage."),
    Photo(SKIMAGE, "data/motorcycle_right.png", "A red motorcycle stands in front of shelves."),
    Photo(SKIMAGE, "data/page.png", "A page of printed text about region-based segmentation."),
    Photo(SKIMAGE, "data/retina.jpg", "The back of an eye with red blood vessels."),
    Photo(SKIMAGE, "data/rocket.jpg", "A rocket on its launch pad at dusk."),
    Photo(SKIMAGE, "data/text.png", "Handwritten marks on gray paper."),
    Photo(SKLEARN, "datasets/images/china.jpg", "A Chinese temple above trees and a lake."),
    Photo(SKLEARN, "datasets/images/flower.jpg", "An orange dahlia in front of dark leaves."),
    Photo(
        MATPLOTLIB,
        "mpl-data/sample_data/grace_hopper.jpg",
        "A woman with glasses in a dark navy uniform in front of a flag.",
    ),
)


def write_photos(out: Path, *, overwrite: bool) -> int:
    """Write the data set to `out`; returns the number of photographs.

    Raises: ConfigError if a package is missing; DataError if its version lacks one of the files.
    """
    records = []
    with new_folder(out, overwrite=overwrite) as folder:
        (folder / "images").mkdir()
        for photo in PHOTOS:
            source = package_folder(photo.module, install=INSTALL[photo.module]) / photo.path
            if not source.is_file():
                raise DataError(
                    f"{source} is missing; install the version of {INSTALL[photo.module]} that "
                    "constraints.txt names."
                )
            shutil.copyfile(source, folder / "images" / source.name)
            records.append(
                {
                    "id": f"photo-{source.stem}",
                    "image": f"images/{source.name}",
                    "conversations": [
                        {"from": "human", "value": "<image>"},
                        {"from": "gpt", "value": photo.caption},
                    ],
                }
            )
        write_json(folder / "captions.json", records)
    return len(records)
