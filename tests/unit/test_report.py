"""celora.track.report: one whole page that loads nothing, says the worst, and takes no text on trust."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch

from celora.core.algorithm import Mixing
from celora.marks import MixingMatrix
from celora.track import folder, report
from celora.track.figures import heat_map
from celora.wire import record
from tests.unit.summaries import round_event, summary

EVIL = "<script>alert('x')</script>&\x1b[31m"
EVENTS = [round_event(index) for index in range(1, 22)]
WEIGHTS = torch.tensor([[0.6, 0.3, 0.1], [0.34, 0.32, 0.34], [0.0, 0.0, 1.0]])


class Tags(HTMLParser):
    """Fails on a tag that is closed and was not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(**changes: object) -> str:
    return report.page(summary(**changes), EVENTS, Mixing(tuple(summary()["clients"]), WEIGHTS))  # type: ignore[arg-type]


def test_the_page_is_balanced_holds_its_pictures_and_loads_nothing() -> None:
    text = page()
    tags = Tags(text)
    assert tags.open == []
    assert tags.seen.count("img") == 2
    assert not {"script", "link", "iframe"} & set(tags.seen)
    assert set(re.findall(r"(?:src|href)=.{6}|url\(", text)) == {'src="data:'}
    assert "default-src 'none'" in text
    for picture in re.findall(r"base64,([^\"]+)", text):
        assert base64.b64decode(picture).startswith(b"\x89PNG")


def test_every_text_from_outside_is_escaped() -> None:
    told = summary(
        EVIL, notices=[EVIL], excluded={EVIL: EVIL}, excluded_replies={"3": {EVIL: EVIL}}, settings={EVIL: EVIL}
    )
    told["clients"] = {EVIL: told["clients"]["site-a"]}
    text = report.page(told, EVENTS, Mixing((EVIL, "$x^{ 病院"), torch.eye(2)))
    assert "script" not in Tags(text).seen
    assert "\x1b" not in text
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;" in text


def test_harmed_clients_are_marked_rows() -> None:
    rows = re.findall(r'<tr class="harmed"><td>([^<]+)', page())
    assert rows == ["site-b"]
    assert "▼ -0.020" in page()
    assert "1 of 3 clients are below their local-only twin." in page()


def test_head_and_data_summary_have_lines_of_their_own() -> None:
    text = page()
    assert re.search(r"<td>head, up[^<]*</td><td>2\.3 MiB</td>", text)
    assert re.search(r"<td>data summary, up[^<]*</td><td>36\.0 KiB, each time</td>", text)


def test_who_learned_from_whom_is_said_in_sentences() -> None:
    assert report.sentences(Mixing(("a", "b", "c"), WEIGHTS)) == [
        "a kept 60 % of its own and learned most from b (30 %).",
        "b kept 32 % of its own and learned from all others alike.",
        "c kept 100 % of its own and was left alone.",
    ]
    assert "site-a kept 60 % of its own" in page()


def test_what_was_left_out_is_told_with_its_reason() -> None:
    text = page(excluded_replies={"3": {"site-a": "no reply within 5 s"}})
    assert "site-z: 3 rows, fewer than 10" in text
    assert "round 3: site-a: no reply within 5 s" in text
    assert "class &#x27;rare&#x27; is withheld" in text
    assert "&quot;lr&quot;: 0.001" in text


@pytest.mark.parametrize("events", [[], EVENTS[:1]])
def test_a_page_can_be_made_of_little(events: list[dict[str, object]]) -> None:
    told = summary(clients={}, excluded={}, notices=[])
    told["metrics"] = dict.fromkeys(told["metrics"])
    assert "Who learned" not in report.page(told, events, None)


def test_many_clients_fit_without_names() -> None:
    many = tuple(f"client-{i}" for i in range(60))
    assert Tags(report.page(summary(), EVENTS, Mixing(many, torch.full((60, 60), 1 / 60)))).open == []


def test_lists_of_neighbours_are_told_and_not_drawn() -> None:
    mixing = Mixing(("a", "b", "c"), torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.1, 0.9]]),
                    torch.tensor([[0, 2], [1, 0], [2, 1]], dtype=torch.int32))  # fmt: skip
    assert report.sentences(mixing) == [
        "a kept 50 % of its own and learned most from c (50 %).",
        "b kept 100 % of its own and was left alone.",
        "c kept 10 % of its own and learned most from b (90 %).",
    ]
    assert Tags(report.page(summary(), EVENTS, mixing)).seen.count("img") == 1
    many = Mixing(
        tuple(map(str, range(500))), torch.full((500, 200), 1 / 200), torch.arange(200).expand(500, 200).int()
    )
    assert report.sentences(many)[0] == "0 kept 0 % of its own and learned from 199 others alike."


@record
class Server:
    rounds: int
    who: Annotated[Mixing, MixingMatrix()]


@pytest.mark.parametrize("dense", [2, 3])
def test_who_learned_from_whom_is_kept_as_a_matrix_or_for_many_clients_as_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: int
) -> None:
    monkeypatch.setattr(folder, "DENSE", dense)
    listed = torch.tensor([[0, 2], [1, 0], [2, 1]], dtype=torch.int32)
    mixing = Mixing(("a", "b", "c"), torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]], dtype=torch.float64), listed)
    run = folder.RunFolder(tmp_path)
    assert run.similarity() is None
    for index in (1, 2):
        run.mixing(Server(index, mixing), index)
    names = sorted(path.name for path in (tmp_path / "similarity").iterdir())
    suffix = "npy" if dense == 3 else "npz"
    assert names == ["clients.json", f"round_0001.{suffix}", f"round_0002.{suffix}"]
    found = run.similarity()
    assert found is not None
    assert found.clients == mixing.clients
    assert torch.equal(found.dense().double(), mixing.dense())
    assert report.sentences(found) == report.sentences(mixing)


@pytest.mark.parametrize(
    ("weights", "neighbours", "message"),
    [
        (torch.ones(2, 3), None, r"found \(2, 3\), expected \(2, 2\)"),
        (torch.ones(2, 3), torch.zeros(2, 2), r"found \(2, 3\), expected \(2, 2\)"),
        (torch.ones(3, 1), torch.zeros(3, 1), "weights of 2 clients"),
    ],
)
def test_an_impossible_mixing_is_refused(weights: torch.Tensor, neighbours: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixing(("a", "b"), weights, neighbours)


def test_the_file_is_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    report.write(tmp_path, summary(), EVENTS, None)
    report.write(tmp_path, summary(), EVENTS, None)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").endswith("</html>\n")


def test_a_heat_map_of_many_clients_shows_means_of_neighbours() -> None:
    weights = np.random.default_rng(0).random((1001, 1001))
    (image,) = heat_map(weights, [f"c{i}" for i in range(1001)]).axes[0].images
    shown = np.asarray(image.get_array())
    assert shown.shape == (334, 334)
    assert shown[0, 1] == pytest.approx(weights[:3, 3:6].mean())
    assert shown[-1, -1] == pytest.approx(weights[999:, 999:].mean())
    assert list(image.get_extent()) == [-0.5, 1000.5, 1000.5, -0.5]
    (image,) = heat_map(weights[:9, :9], [f"c{i}" for i in range(9)]).axes[0].images
    np.testing.assert_allclose(image.get_array(), weights[:9, :9], rtol=1e-6)
