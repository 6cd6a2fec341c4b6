"""Where an export lies, and what others load its backbone by."""

from dataclasses import dataclass
from pathlib import Path

from celora.models import efficientnet_lite, loading
from celora.models.backbone import Backbone
from celora.models.dual_backbone import DualBackbone


@dataclass(frozen=True)
class Place:
    """Where an export lies.

    Attributes:
        folder: absolute.
        merged: whether it holds a whole model, and no adapter.
    """

    folder: Path
    merged: bool

    def base(self, backbone: Backbone | DualBackbone) -> str:
        """What others load the backbone by: an absolute path, or the Hub's name of it."""
        if is_own(backbone):
            return str(self.folder / "backbone")
        if backbone.name == "minilm":
            return loading.EMBEDDED
        return str(Path(backbone.source).resolve()) if Path(backbone.source).is_dir() else backbone.source


def is_own(backbone: Backbone | DualBackbone) -> bool:
    """Whether nobody else has these weights in the form that transformers reads."""
    return backbone.name in ("random-vit", efficientnet_lite.NAME)


def write_own(folder: Path, backbone: Backbone | DualBackbone, exports: Path) -> None:
    """Write such weights, once for all exports in a folder where the disk can share them."""
    with loading.quiet():
        if backbone.name == efficientnet_lite.NAME:
            others = exports.glob(f"*/{folder.name}/{efficientnet_lite.WEIGHTS}")
            efficientnet_lite.write(folder, backbone.image_shape[1], others)
        else:
            loading.random_vit().save_pretrained(folder)
