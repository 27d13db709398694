"""The page of a sweep."""

import xml.etree.ElementTree as ET
from typing import Any

from launch import pareto

ROW: dict[str, Any] = {
    "point": "sae.k=<b>8</b>",
    "state": "evaluated",
    "l0": 8.0,
    "explained_variance": 0.5,
    "ce_loss_score": 0.75,
    "kl_div_score": 0.7,
    "dead_fraction": 0.01,
    "tokens_per_s": 12345,
    "features": "sae.k=8/features/index.html",
}
BARE = {**dict.fromkeys(ROW), "point": "sae.k=9", "state": "not finished"}


def marks(picture: str) -> list[ET.Element]:
    return [node for node in ET.fromstring(picture).iter() if node.tag.endswith("circle")]


def test_each_evaluated_point_is_a_mark_in_both_panels_that_links_to_its_features() -> None:
    second = {**ROW, "point": "sae.k=16", "l0": 16.0, "ce_loss_score": 0.9}
    picture = pareto.picture([ROW, second, BARE])
    assert len(marks(picture)) == 4
    assert picture.count('href="sae.k%3D8/features/index.html"') == 4
    first, other = marks(picture)[:2]
    assert float(first.attrib["cx"]) < float(other.attrib["cx"])  # more latents are further right
    assert float(first.attrib["cy"]) > float(other.attrib["cy"])  # a better score is further up


def test_one_point_alone_and_equal_values_have_ticks_too() -> None:
    for rows in ([ROW], [ROW, dict(ROW)], [{**ROW, "l0": 0.0, "ce_loss_score": 0.0}], [{**ROW, "ce_loss_score": -3e5}]):
        assert marks(pareto.picture(rows))
    assert "nothing is evaluated yet" in pareto.picture([BARE])


def test_names_are_shown_as_text() -> None:
    page = pareto.page("a <script>", [ROW, BARE])
    assert "<script>" not in page
    assert "<b>8</b>" not in page
    assert "&lt;b&gt;8&lt;/b&gt;" in page
    assert ">12,345<" in page
    assert ">1.00%<" in page
    assert page.count("<td>-</td>") == 8  # dense latents were not measured of either
