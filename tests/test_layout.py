"""Which saved variable belongs to which of an optimizer, as tables: saved, present, places or error."""

import pytest

from tf_adam_variants.state import layout
from tf_adam_variants.state.layout import Entry, Layout

SCALARS = [Entry(name, (), name) for name in layout.SCALARS]


def entries(*variables, slots=("momentum", "velocity")):
    """The entries of an optimizer's variables, each "name" or "name shape" or "name shape added_at"."""
    found = list(SCALARS)
    for text in variables:
        words = text.split()
        name, shape, added_at = words + ["8", ""][len(words) - 1 :]
        sizes = tuple(map(int, shape.split("x")))
        found += [Entry(slot, sizes, f"{name}_{slot}", int(added_at) if added_at else None) for slot in slots]
    return found


FITS = {  # saved, present, the places of the slots' variables
    "the same": ("a b", "a b", [0, 1]),
    "other names": ("a b", "c d", [0, 1]),
    "other numbers": ("dense dense_1", "dense_4 dense_5", [0, 1]),
    "numbers that overlap": ("dense dense_1", "dense_1 dense_2", [0, 1]),
    "the name of a model in front": ("net_a net_b", "a b", [0, 1]),
    "other order": ("a b", "b a", [1, 0]),
    "other order, and the name of a model in front": ("net_a net_b", "b a", [1, 0]),
    "other order in a model of another number": ("net_1_a net_1_b", "net_2_b net_2_a", [1, 0]),
    "one is frozen": ("a b c", "c", [2]),
    "one is frozen, in a model": ("net_a net_b", "b", [1]),
    "one is frozen, in a model of another number": ("net_1_a net_1_b", "net_2_b", [1]),
    "numbered ones in order": ("dense dense_1 dense_2", "dense_1 dense_2", [1, 2]),
}


@pytest.mark.parametrize("case", FITS)
def test_state_that_fits(case):
    saved, present, places = FITS[case]
    want = [0, 1, *(2 * place + i for place in places for i in (2, 3))]
    saved, present = entries(*saved.split()), entries(*present.split())
    assert layout.match(saved, present, "adamw") == want
    if want == list(range(len(saved))):
        layout.check_positions(saved, present, "adamw")
    else:
        with pytest.raises(ValueError, match=r"more variables or in another order.*goes by names"):
            layout.check_positions(saved, present, "adamw")


def test_variables_that_were_added_go_by_name():
    """Even where shapes and numbers would allow positions, as another call of `build` has another order."""
    cases = {
        "built at once here": (["b 8", "a 8 5"], ["a 8", "b 8"], [1, 0]),
        "added here": (["a 8", "b 8"], ["b 8", "a 8 5"], [1, 0]),
        "a model of another number": (["net_1_b 8", "net_1_a 8 5"], ["net_2_a 8", "net_2_b 8"], [1, 0]),
        "numbered, with the same names": (["dense_1 8", "dense 8 5"], ["dense 8", "dense_1 8"], [1, 0]),
        "added after the same number": (["a 8", "b 8 5"], ["c 8", "d 8 5"], [0, 1]),
    }
    for name, (saved, present, places) in cases.items():
        want = [0, 1, *(2 * place + i for place in places for i in (2, 3))]
        assert layout.match(entries(*saved), entries(*present), "adamw") == want, name
    for saved, present in (
        (["dense_1 8", "dense 8 5"], ["dense_2 8", "dense_3 8"]),  # which is which?
        (["a 8", "b 8 5"], ["c 8", "d 8"]),
    ):
        with pytest.raises(ValueError, match="does not belong to adamw"):
            layout.match(entries(*saved), entries(*present), "adamw")


ERRORS = {  # saved, present, the message
    "another shape": ("a", "a 1x8", r"2: saved momentum \(8,\) \(a_momentum\), .* has momentum \(1, 8\)"),
    "a variable more": ("a", "a b", r"it has 4 variables, .* 6\.\n  4: saved nothing, .* momentum \(8,\)"),
    "another variable": ("a b", "c", r"does not belong to adamw"),
    "numbers in another order": ("dense dense_1", "dense_1 dense", "another order"),
    "one of several numbers": ("dense_1 dense_2", "dense_3", "does not belong"),
    "numbers among others": ("dense conv dense_1", "dense_5 dense_6 conv_2", "does not belong"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_state_that_does_not_fit(case):
    saved, present, message = ERRORS[case]
    present = [present] if "1x8" in present else present.split()
    with pytest.raises(ValueError, match=message):
        layout.match(entries(*saved.split()), entries(*present), "adamw")


def test_options_are_not_frozen_layers():
    both, three = ("momentum", "velocity"), ("momentum", "velocity", "velocity_hat")
    for saved, present, frozen in ((three, both, "b"), (both, three, "b"), (three, both, "a b")):
        with pytest.raises(ValueError, match="does not belong"):
            layout.match(entries("a", "b", slots=saved), entries(*frozen.split(), slots=present), "adamw")
    average, velocity_hat = (entries("a", slots=(*both, one)) for one in ("average", "velocity_hat"))
    with pytest.raises(ValueError, match=r"saved average.*has velocity_hat"):
        layout.match(average, velocity_hat, "adamw")
    schedule = [entry for entry in entries("a") if entry.kind != "learning_rate"]
    with pytest.raises(ValueError, match="saved learning_rate"):
        layout.match(entries("a"), schedule, "adamw")


def test_master_weights_are_of_half_precision_variables_only():
    """A frozen variable may have one where those that train do not, and the other way around."""
    master = ("momentum", "velocity", "master_weight")
    a, b = entries("a"), entries("b", slots=master)[2:]
    assert layout.match([*a, *b], entries("b", slots=master), "adamw") == [0, 1, 4, 5, 6]
    with pytest.raises(ValueError, match="does not belong"):
        layout.match([*a, *b], a, "adamw")


def test_long_differences_are_cut():
    with pytest.raises(ValueError, match=r"(?s)saved nothing.*\n  and 3 more\nMake the optimizer") as error:
        layout.match(entries("a"), entries(*"abcde"), "lamb")
    assert str(error.value).count("saved nothing") == 5


def test_json():
    excluded = Entry("momentum", (2, 3), "a_momentum", None, ("exclude_from_weight_decay",))
    saved = Layout([excluded, Entry("iteration", (), "iteration", 7)], {"exclude_from_weight_decay": ["a"]})
    assert Layout.from_json(saved.to_json()) == saved
    old = b'[["momentum", [2, 3], "a_momentum"], ["velocity", [2, 3], "a_velocity", null]]'  # without numbers
    assert Layout.from_json(old) == (
        [
            Entry("momentum", (2, 3), "a_momentum", None, None),
            Entry("velocity", (2, 3), "a_velocity", None, None),
        ],
        {},
    )
    assert layout.kind_of("dense_kernel_velocity_hat") == "velocity_hat"
    assert layout.kind_of("rounding_seed") == "rounding_seed"
