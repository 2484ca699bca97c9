"""The tables of README.md and docs/ are those of the results that are kept."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)


@pytest.mark.slow
@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_results(page):
    assert figures.written(page.read_text()) == page.read_text()


def test_a_changed_number_is_seen():
    page = (ROOT / "docs" / "arguments.md").read_text()
    begin, end = figures.MARK.search(page).span()
    changed = page[:begin] + re.sub(r"(\d)\.(\d)", r"\2.\1", page[begin:end], count=1) + page[end:]
    assert changed != page
    assert figures.written(changed) == page


def test_an_empty_mark_is_filled_and_its_neighbour_left_alone():
    mark, end = "<!-- numbers: half_precision -->\n\n", "<!-- end of numbers -->"
    page = f"{mark}{end}\n\n## Text\n\n{mark}old\n\n{end}\n"
    table = figures.program("half_precision").markdown(figures.numbers("half_precision"))
    assert figures.written(page) == f"{mark}{table}\n\n{end}\n\n## Text\n\n{mark}{table}\n\n{end}\n"


@pytest.mark.slow
def test_all_results_are_shown_and_every_mark_has_its_own():
    pages = "".join(page.read_text() for page in figures.PAGES)
    kept = set(figures.RESULTS)
    marked = {name for _, name, _, _ in figures.MARK.findall(pages)}
    assert marked <= kept
    assert kept <= marked | set(figures.pictures())
    assert (
        pages.count("<!-- numbers: ")
        == pages.count("<!-- end of numbers -->")
        == len(figures.MARK.findall(pages))
    )


def test_the_numbers_in_the_sentences_about_benchmarks():
    """Pages say them in their own words, with these units."""
    dense, sparse = figures.numbers("benchmark"), figures.numbers("sparse_benchmark")
    times = [
        results[f"Keras {'Lamb' if rule == 'LAMB' else 'AdamW'}, graph"]["ms"] / results["fused, graph"]["ms"]
        for rules in dense.values()
        for rule, results in rules.items()
    ]
    theirs = f"{sparse['results']['keras Adam']['ms']:.0f} ms"
    ours = f"{sparse['results']['tav.AdamW lazy, fused']['ms']:.1f} ms"
    growing = {how: sparse["growing"][f"tav.AdamW lazy, {how}"] for how in ("fused", "pure")}
    few, many = ({how: f"{own[n]['ms']:.1f}" for how, own in growing.items()} for n in ("100000", "4000000"))
    bert = dense["bert-base"]
    mebibytes = [bert[rule]["fused, graph"]["mib"] for rule in ("AdamW", "LAMB")]
    mebibytes.append(bert["AdamW"]["Keras AdamW, graph"]["mib"])
    range_of_times = rf"{min(times):.1f}( to |[-\u2013]){max(times):.1f} ?(times|x)"
    for page, *patterns in (
        ("README.md", range_of_times, theirs, ours),
        ("docs/sparse.md", theirs, ours),
        ("docs/benchmarks.md", *few.values(), *many.values(), *(f"{mib:.0f}" for mib in mebibytes)),
    ):
        text = " ".join((ROOT / page).read_text().split())
        for pattern in patterns:
            assert re.search(rf"(?<![\d.]){pattern}\b", text), (page, pattern)


@pytest.mark.slow
def test_pictures_are_drawn_from_the_results(tmp_path):
    for name in figures.pictures():
        picture = tmp_path / f"{name}.png"
        figures.program(name).picture(figures.numbers(name), picture)
        assert picture.stat().st_size > 10_000
        assert (ROOT / "docs" / "images" / f"{name}.png").exists()
