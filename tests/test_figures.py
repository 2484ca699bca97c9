"""The tables of README.md and docs/ are those of the results that are kept."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)


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


def test_the_sentences_with_numbers_of_the_benchmarks():
    def said(page, sentence):
        return sentence in " ".join((ROOT / page).read_text().split())

    dense, sparse = figures.numbers("benchmark"), figures.numbers("sparse_benchmark")
    times = [
        results[f"Keras {'Lamb' if rule == 'LAMB' else 'AdamW'}, graph"]["ms"] / results["fused, graph"]["ms"]
        for rules in dense.values()
        for rule, results in rules.items()
    ]
    assert said("README.md", f"a step {min(times):.1f} to {max(times):.1f} times as fast as Keras")
    theirs = f"{sparse['results']['keras Adam']['ms']:.0f}"
    ours = f"{sparse['results']['tav.AdamW lazy, fused']['ms']:.1f}"
    assert said("README.md", f'takes {ours} ms with `sparse_update="lazy"`, {theirs} ms with Keras\'s Adam')
    assert said(
        "docs/sparse.md",
        f"takes {theirs} ms per step with Keras's Adam and {ours} ms with the lazy, fused AdamW",
    )
    fused, pure = (
        [sparse["growing"][f"tav.AdamW lazy, {how}"][rows]["ms"] for rows in ("100000", "4000000")]
        for how in ("fused", "pure")
    )
    assert said(
        "docs/benchmarks.md",
        f"takes {fused[0]:.1f} ms on 100,000 rows and {fused[1]:.1f} ms on 4,000,000, "
        f"the pure one {pure[0]:.1f} and {pure[1]:.1f}.",
    )
    bert = dense["bert-base"]
    assert said(
        "docs/benchmarks.md",
        f"need {bert['AdamW']['fused, graph']['mib']:.0f} MiB more when fused "
        f"(LAMB {bert['LAMB']['fused, graph']['mib']:.0f}), "
        f"Keras's AdamW in a graph {bert['AdamW']['Keras AdamW, graph']['mib']:.0f}.",
    )


@pytest.mark.parametrize("name", figures.pictures())
def test_a_picture_is_drawn_from_the_results(name, tmp_path):
    picture = tmp_path / "picture.png"
    figures.program(name).picture(figures.numbers(name), picture)
    assert picture.stat().st_size > 10_000
    assert (ROOT / "docs" / "images" / f"{name}.png").exists()
