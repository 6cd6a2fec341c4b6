"""What a user sets: `[model]`, the frozen backbone, and `[adapter]`, what is trained on it."""

from collections.abc import Mapping, Sequence
from typing import Literal

from celora.fields import Count, Positive, setting, settings

LAYERS = r"^(all|last:[1-9][0-9]*)$"


@settings
class Model:
    """The frozen backbone."""

    backbone: str = setting(
        "minilm", '"minilm" (embedded), "efficientnet-lite0" (a package), "random-vit", a local folder, or a Hub id'
    )
    own: tuple[str, ...] | None = setting(
        None,
        'instead of one backbone, whole models of the clients\' own, dealt to them in turn: "cnn-1" … "cnn-5", '
        'or "minilm:4" for the lowest layers of an encoder',
        min_length=1,
    )
    allow_download: bool = setting(False, "may the Hub be asked? otherwise only its local cache is read")
    pooling: Literal["mean", "cls", "last"] = setting("mean", "how a row's token vectors become one vector")
    max_length: Count = setting(128, "tokens kept of a text")
    image_size: Count | None = setting(
        None, "pixels of a side that images are resized to; none: as the backbone's own image processor says"
    )
    dropout: bool = setting(False, "the backbone's own dropout while training")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "of the frozen weights; adapters are float32")
    device: str = setting("auto", '"auto": CUDA if there is one, else "cpu"; or a torch device')


@settings
class Adapter:
    """The low-rank adapter at each adapted module, ΔW = s · B (C) A with s = alpha / rank, one s for all clients."""

    rank: Count = setting(8, "r; where clients have ranks of their own, the largest of them")
    ranks: Mapping[str, Count] | tuple[Count, ...] | None = setting(
        None,
        "{client = r, …}, others having `rank`; or tiers such as [2, 4, 8], each for as many clients; none: all `rank`",
    )
    alpha: Positive | None = setting(None, "s = alpha / rank; by default 2 · rank, as is common, so s = 2")
    targets: tuple[str, ...] | str = setting(
        ("query", "value"), 'PEFT\'s way: suffixes of module names, one regular expression, or "all-linear"'
    )
    layers: str = setting("all", 'which transformer layers: "all", or the topmost n as "last:n"', pattern=LAYERS)
    init: Literal["kaiming", "normal", "orthonormal"] = setting(
        "kaiming", "A as PEFT draws it; N(0, 1e-3²) as CE-LoRA's code; or A and B orthonormal with C = 0"
    )
    bases: Literal["shared", "secret"] = setting("shared", "A from the run's seed, or from each client's secret")

    def __post_init__(self) -> None:
        if self.ranks is not None and not self.ranks:
            raise ValueError("ranks: found none, expected {client = r} or tiers such as [4, 8]")
        given = self.ranks.values() if isinstance(self.ranks, Mapping) else self.ranks or ()
        if over := [rank for rank in given if rank > self.rank]:
            raise ValueError(f"ranks: found {max(over)}, expected at most rank = {self.rank}, the largest")

    def rank_of(self, client: str, clients: Sequence[str]) -> int:
        """The rank of a client among all: its own, or its tier's, the first tier going to the first clients."""
        if self.ranks is None:
            return self.rank
        if isinstance(self.ranks, Mapping):
            return self.ranks.get(client, self.rank)
        return self.ranks[clients.index(client) * len(self.ranks) // len(clients)]

    @property
    def lora_alpha(self) -> float:
        """`alpha`, or its default."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scaling(self) -> float:
        """s, the factor of ΔW."""
        return self.lora_alpha / self.rank
